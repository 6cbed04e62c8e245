"""A figure measured on a sample of rows, as a value and as plain metrics.

This module does not import torch, because config checks import it. rlhf/evaluation/intervals.py computes such
figures.
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
        """As plain metrics: NAME, NAME_low, NAME_high and NAME_rows; for A/B: A/B, A_low/B and so on."""
        return {
            add_suffix(name, suffix): float(value)
            for suffix, value in zip(INTERVAL_SUFFIXES, self, strict=True)
        }

    @classmethod
    def found(cls, name: str, metrics: Mapping[str, float]) -> Sampled | None:
        """Read the figure from plain metrics; None if it has no interval there."""
        names = [add_suffix(name, suffix) for suffix in INTERVAL_SUFFIXES]
        if not all(each in metrics for each in names):
            return None
        value, low, high, rows = (metrics[each] for each in names)
        return cls(value, low, high, int(rows))


INTERVAL_SUFFIXES = ("", "_low", "_high", "_rows")


def add_suffix(name: str, suffix: str) -> str:
    """The metric's name with a suffix before the first slash. After the slash is the name of a model."""
    metric, slash, model = name.partition("/")
    return f"{metric}{suffix}/{model}" if slash else f"{name}{suffix}"


def reward_parts(metric: str, metrics: Iterable[str]) -> list[str]:
    """Names of the rewards that have their own figures, METRIC/REWARD/POLICY. Empty for a single reward."""
    rest = (name.removeprefix(f"{metric}/") for name in metrics if name.startswith(f"{metric}/"))
    return [*dict.fromkeys(part for part in (name.rpartition("/")[0] for name in rest) if part)]
