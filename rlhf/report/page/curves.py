"""Curves of a run from its logged metrics, thinned so that a page stays small."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

MAX_CURVE_POINTS = 400
"""Most points of one curve."""
MAX_PAGE_POINTS = 60_000
"""Most points of all curves of a page together."""
MIN_CURVE_POINTS = 20
FIRST_CURVES = (
    "held_out_score", "score", "loss", "held_out_loss", "held_out_accuracy", "held_out_kl", "kl",
    "train_accuracy", "train_margin", "explained_variance", "entropy", "held_out_length", "length",
    "stop_rate", "reward", "grad_norm", "lr",
)  # fmt: skip
"""The curves that are shown first, after those with a gate."""
UNITS = (
    (r"explained_variance", "share of the variance"),
    (r"(accuracy|rate|share|fraction)$|^distinct_", "share"),
    (
        r"(^|_)(kl|kl_last|kl_k3|entropy|engine_mismatch|engine_mismatch_max)$|^(held_out_|train_)?loss",
        "nats",
    ),
    (r"(length|tokens)(_p95|_mean)?$", "tokens"),
    (r"seconds", "seconds"),
    (r"(score|reward|return|value|margin)(_p95|_last)?$", "score"),
    (r"bytes$", "bytes"),
    (r"gib$", "GiB"),
    (r"^lr$", "learning rate"),
    (r"^episodes$|^rows", "number"),
)
"""(Pattern in a metric's name, its unit); the first match counts."""
Bounds = tuple[float | None, float | None]


def unit_of(metric: str) -> str:
    """The unit of a logged metric; without a known unit, its name in words."""
    return next((unit for pattern, unit in UNITS if re.search(pattern, metric)), metric.replace("_", " "))


def extremes_of(metric: str) -> Bounds:
    """The smallest and the largest possible value of a metric, if it is a share."""
    unit = unit_of(metric)
    return (0.0 if unit == "share" else None), (1.0 if unit.startswith("share") else None)


@dataclass(frozen=True)
class Curve:
    """One line of a chart. A value that is not finite is None."""

    name: str
    x: list[float]
    y: list[float | None]
    marks: bool = False
    """Whether to draw points without a line: they are not steps of one course."""

    def thinned(self, most: int) -> Curve:
        """The curve with at most `most` points: the lowest and the highest of each stretch, so that no spike
        is lost."""
        if len(self.x) <= most:
            return self
        kept: list[int] = []
        stretches = max(1, most // 2)
        for number in range(stretches):
            span = range(number * len(self.x) // stretches, (number + 1) * len(self.x) // stretches)
            known = [index for index in span if self.y[index] is not None]
            ends = {min(known, key=self._at), max(known, key=self._at)} if known else {span[0]}
            kept += sorted(ends)
        return replace(self, x=[self.x[index] for index in kept], y=[self.y[index] for index in kept])

    def _at(self, index: int) -> float:
        value = self.y[index]
        assert value is not None
        return value


@dataclass
class Chart:
    """A chart, and the values of its table."""

    title: str
    x: str
    """Label of the horizontal axis."""
    y: str
    """Label of the vertical axis."""
    curves: list[Curve] = field(default_factory=list)
    bounds: Bounds = (None, None)
    """The healthy range: the bounds of the gate with the curve's name, or the stage's range for the curve."""
    unit: str = ""
    """Unit of the vertical axis; empty to use `y`."""
    extremes: Bounds = (None, None)
    """The smallest and the largest possible value: limits of the vertical axis."""
    diagonal: bool = False
    """Whether to draw the line y = x, on which a perfect result lies."""

    @property
    def healthy(self) -> str:
        """The healthy range in words; empty if none is known."""
        low, high = self.bounds
        least = [] if low is None else [f"at least {low:.4g}"]
        return " and ".join(least if high is None else [*least, f"at most {high:.4g}"])

    @property
    def alt_text(self) -> str:
        """The chart in words, for screen readers."""
        parts = []
        for curve in self.curves[:6]:
            known = [value for value in curve.y if value is not None]
            if known:
                span = (
                    f"from {known[0]:.4g} to {known[-1]:.4g}, between {min(known):.4g} and {max(known):.4g}"
                )
                parts.append(f"{curve.name}: {len(known)} points, {span}")
        return f"{self.title}. {'; '.join(parts) or 'no figures'}. The figures are in the table below it."

    def as_json(self, most: int) -> dict[str, Any]:
        """The chart for the script that draws it, with at most `most` points per curve."""
        curves = [curve.thinned(most) for curve in self.curves]
        return {
            "x": self.x,
            "y": self.y,
            "low": self.bounds[0],
            "high": self.bounds[1],
            "unit": self.unit or self.y,
            "least": self.extremes[0],
            "most": self.extremes[1],
            "diagonal": self.diagonal,
            "curves": [
                {
                    "name": curve.name,
                    "x": [*map(_short, curve.x)],
                    "y": [*map(_short, curve.y)],
                    "marks": curve.marks,
                }
                for curve in curves
            ],
        }


def points_each(charts: Iterable[Chart]) -> int:
    """Most points of each curve, so that all curves together stay below `MAX_PAGE_POINTS`."""
    curves = sum(len(chart.curves) for chart in charts)
    return max(MIN_CURVE_POINTS, min(MAX_CURVE_POINTS, MAX_PAGE_POINTS // max(1, curves)))


def logged(path: Path) -> dict[str, dict[str, Curve]]:
    """Stage -> metric -> curve, from a metrics.jsonl. Half-written lines are left out."""
    found: dict[str, dict[str, Curve]] = {}
    if not path.is_file():
        return found
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:  # a live run is writing it
                continue
            if row.get("summary"):
                continue
            stage, step = row["stage"], row["step"]
            curves = found.setdefault(stage, {})
            for name, value in row.items():
                prefix, slash, metric = name.partition("/")
                if slash and prefix == stage:
                    curve = curves.setdefault(metric, Curve(metric, [], []))
                    curve.x.append(step)
                    curve.y.append(value)
    return found


def healthy_range(curve: Curve, low: float | None, high: float | None, from_start: bool) -> Bounds:
    """The healthy range of a curve. With `from_start`, `low` and `high` are relative to step 0; without a
    logged step 0 there is no range."""
    if not from_start:
        return low, high
    start = curve.y[0] if curve.x and curve.x[0] == 0 else None
    if start is None:
        return None, None
    return None if low is None else start + low, None if high is None else start + high


def in_order(curves: Mapping[str, Curve], bounds: Mapping[str, Bounds]) -> list[str]:
    """The names of a stage's curves, the most informative first."""
    rank = {name: place for place, name in enumerate(FIRST_CURVES)}
    return sorted(curves, key=lambda name: (name not in bounds, rank.get(name, len(rank)), name))


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson correlation; None for fewer than 3 points, or if one side does not vary."""
    if len(x) < 3:
        return None
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    both = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    spread = math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))
    return both / spread if spread else None


def _short(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return value if value == int(value) else float(f"{value:.5g}")
