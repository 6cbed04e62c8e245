"""The Pareto front of a sweep: trials that no other trial beats in gain and loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FRONT_COLOUR, OTHER_COLOUR = "#0072b2", "#d55e00"
"""Colours that the colour-blind can distinguish (Okabe and Ito 2008)."""


class Point(NamedTuple):
    """One trial's gain and loss against the base model."""

    name: str
    gain: float
    loss: float


BASE = Point("base", 0.0, 0.0)


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points for which no other point is at least as good in both and better in one; sorted by loss."""

    def beaten(point: Point) -> bool:
        return any(
            other.gain >= point.gain and other.loss <= point.loss and other[1:] != point[1:]
            for other in points
        )

    return sorted((point for point in points if not beaten(point)), key=lambda point: point.loss)


def draw(points: Sequence[Point], gain: str, loss: str) -> Figure:
    """Draw gain against loss, and the front. The base model is one of the points.

    Args:
        gain: label of the gain axis.
        loss: label of the loss axis.
    """
    from matplotlib.figure import Figure

    points = [BASE, *points]
    front = pareto_front(points)
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.step([point.loss for point in front], [point.gain for point in front], where="post", color="#808080")
    for point in points:
        axes.plot(point.loss, point.gain, "o", color=FRONT_COLOUR if point in front else OTHER_COLOUR)
        axes.annotate(point.name, (point.loss, point.gain), xytext=(6, 4), textcoords="offset points")
    axes.set(xlabel=f"{loss} (less is better)", ylabel=f"{gain} (more is better)")
    axes.margins(x=0.18, y=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#808080", alpha=0.25, linewidth=0.6)
    return figure
