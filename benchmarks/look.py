"""How the benchmarks' tables and pictures look."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, THEIRS, OTHER = "#0072b2", "#d55e00", "#555555"
"""Told apart by the colour-blind too (Okabe and Ito 2008), and by their markers."""
STYLE = {
    "font.size": 9,
    "figure.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "legend.fontsize": 8,
    "legend.frameon": False,
}


def new_console() -> Console:
    """Wide enough for the tables where no terminal says how wide it is."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def new_figure(title: str, num_panels: int) -> tuple[Figure, list[Axes]]:
    """A row of panels."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("The pictures need matplotlib: pip install -e '.[bench]'")
    matplotlib.use("Agg")
    matplotlib.rcParams.update(STYLE)
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, num_panels, figsize=(4.2 * num_panels, 3.2), layout="constrained", squeeze=False
    )
    figure.suptitle(title)
    return figure, list(axes[0])


def label(axes: Axes, x: str, y: str, *, from_0: bool = True) -> None:
    """The horizontal axis begins at 0; the vertical one too, where proportions are to be seen."""
    axes.set(xlabel=x, ylabel=y)
    axes.set_xlim(left=0)
    if from_0:
        axes.set_ylim(bottom=0)
    axes.legend()


def save(figure: Figure, path: Path) -> None:
    """As PNG, without the date: equal figures make equal files."""
    figure.savefig(path, dpi=160, metadata={"Software": None})
