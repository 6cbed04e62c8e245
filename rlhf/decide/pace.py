"""How long pilots take: what the planner predicts, corrected by what earlier pilots took on this machine."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping

from rlhf.config import ConfigError
from rlhf.pipeline.recipe import kind_of

UNITS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
"""Unit of a time -> seconds."""
GPU_HOURS = "gpuh"
PRIOR_SECONDS = 5.0
"""Seconds that count as predicted correctly in advance, so that very short stages correct little."""


def budget_seconds(budget: str | float, price_per_hour: float, ranks: int) -> float:
    """The budget as seconds on this machine.

    Args:
        budget: a time (`90s`, `30m`, `2h`), GPU hours (`16gpuh`), or an amount of money.
        price_per_hour: of the machine.
        ranks: number of its GPUs.

    Raises:
        ConfigError: it is none of these, or not above 0.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]*)\s*", str(budget).lower())
    unit = found.group(2) if found else "?"
    seconds = math.nan
    if found and unit in UNITS:
        seconds = float(found.group(1)) * UNITS[unit]
    elif found and unit in ("", GPU_HOURS):
        share = 1 / price_per_hour if not unit else 1 / ranks
        seconds = float(found.group(1)) * share * UNITS["h"]
    if not seconds > 0:
        raise ConfigError(
            f"budget={budget}: give a time such as 90s, 30m or 2h, GPU hours such as 16gpuh, or an amount of "
            "money without a unit (evaluate.price_per_hour is the price)."
        )
    return seconds


class Pace:
    """The time that stages take, compared with the prediction."""

    def __init__(self) -> None:
        self._taken: dict[str, float] = defaultdict(float)
        self._predicted: dict[str, float] = defaultdict(float)
        self._overheads: list[float] = []

    def add(self, predicted: Mapping[str, float], taken: Mapping[str, float], seconds: float) -> None:
        """Note a finished pilot.

        Args:
            predicted: stage -> seconds that the planner predicted.
            taken: stage -> seconds.
            seconds: of the full pilot. What no stage took is the overhead of a pilot.
        """
        for stage, each in predicted.items():
            if stage in taken:
                self._predicted[kind_of(stage)] += each
                self._taken[kind_of(stage)] += taken[stage]
        self._overheads.append(max(0.0, seconds - sum(taken.values())))

    def seconds(self, predicted: Mapping[str, float]) -> float:
        """What a pilot takes.

        Args:
            predicted: stage -> seconds that the planner predicts.
        """
        return self.overhead + sum(self.factor(kind_of(stage)) * each for stage, each in predicted.items())

    @property
    def overhead(self) -> float:
        """Mean seconds of a pilot that no stage takes."""
        return sum(self._overheads) / len(self._overheads) if self._overheads else 0.0

    def factor(self, kind: str) -> float:
        """Time over predicted time of stages of this kind. While there was none of it, that of all stages,
        but at least 1: answers may end early, which makes no training shorter."""
        if kind in self._predicted:
            return (PRIOR_SECONDS + self._taken[kind]) / (PRIOR_SECONDS + self._predicted[kind])
        taken, predicted = sum(self._taken.values()), sum(self._predicted.values())
        return max(1.0, (PRIOR_SECONDS + taken) / (PRIOR_SECONDS + predicted))
