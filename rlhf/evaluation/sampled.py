"""A figure that was measured on a sample of rows, as a value and as plain metrics.

It needs no torch, because checks of the config import it. rlhf/evaluation/intervals.py makes such figures.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Sampled(NamedTuple):
    """A figure, its 95% interval, and the number of rows behind it."""

    value: float
    low: float
    high: float
    rows: int

    def metrics(self, name: str) -> dict[str, float]:
        """As plain figures: NAME, NAME_low, NAME_high and NAME_rows; of A/B they are A_low/B and so on."""
        return {beside(name, end): float(value) for end, value in zip(ENDS, self, strict=True)}

    @classmethod
    def found(cls, name: str, metrics: Mapping[str, float]) -> Sampled | None:
        """Read what `metrics` wrote; None for a figure without an interval."""
        names = [beside(name, end) for end in ENDS]
        if not all(each in metrics for each in names):
            return None
        value, low, high, rows = (metrics[each] for each in names)
        return cls(value, low, high, int(rows))


ENDS = ("", "_low", "_high", "_rows")


def beside(name: str, end: str) -> str:
    """The name of a figure's interval: what is behind the first / names a model, and stays behind."""
    metric, slash, model = name.partition("/")
    return f"{metric}{end}/{model}" if slash else f"{name}{end}"


def parts_of(metric: str, metrics: Iterable[str]) -> list[str]:
    """The rewards, where there are several, of which each has a figure of its own: METRIC/REWARD/POLICY."""
    ours = (name.removeprefix(f"{metric}/") for name in metrics if name.startswith(f"{metric}/"))
    return [*dict.fromkeys(part for part in (name.rpartition("/")[0] for name in ours) if part)]
