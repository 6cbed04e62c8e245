"""Style of the benchmarks' tables and pictures."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, THEIRS, OTHER = "#0072b2", "#d55e00", "#808080"
"""Colours that colour-blind readers can distinguish (Okabe and Ito 2008) and that are visible in both
themes."""
THEMES = {"light": "#24292f", "dark": "#cfd0d0"}
"""Colour of text and axes; the background is the page's own."""
STYLE: Any = {
    "font.size": 9,
    "figure.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": OTHER,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 5,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "savefig.transparent": True,
    "svg.fonttype": "none",  # text stays text, in the reader's own font
    "svg.hashsalt": "rlhf",
}


def new_console() -> Console:
    """A console that is wide enough for the tables if there is no terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def new_figure(title: str, num_panels: int) -> tuple[Figure, list[Axes]]:
    """A row of panels."""
    from matplotlib.figure import Figure

    width = min(4.2 * num_panels, 9.0)  # no wider than a page
    figure = Figure(figsize=(width, 3.2), layout="constrained")
    axes = figure.subplots(1, num_panels, squeeze=False)
    figure.suptitle(title)
    return figure, list(axes[0])


def label(axes: Axes, x: str, y: str, *, from_0: bool = True) -> None:
    """Label the axes. The horizontal axis begins at 0; with `from_0` the vertical one too, to show
    proportions."""
    axes.set(xlabel=x, ylabel=y)
    axes.set_xlim(left=0)
    if from_0:
        axes.set_ylim(bottom=0)
    axes.legend()


def save(draw: Callable[[], Figure], path: Path) -> None:
    """Draw a picture for both themes: NAME-light.svg and NAME-dark.svg for NAME.svg.

    No date is written, so equal figures give equal files.
    """
    try:
        import matplotlib
    except ImportError:
        sys.exit("The pictures need matplotlib: pip install -e '.[bench]'")
    names: Any = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    for theme, colour in THEMES.items():
        with matplotlib.rc_context({**STYLE, **dict.fromkeys(names, colour)}):
            target = path.with_name(f"{path.stem}-{theme}.svg")
            draw().savefig(target, metadata={"Date": None})
