"""A sweep over seeds only: its policies side by side, each figure as the mean of the trials."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.evaluation.sampled import Sampled
from rlhf.pipeline.recipe import last_evaluation
from rlhf.report.policies import GAINS, Cost, Point
from rlhf.tracking.tables import Cells

FIGURES = {
    "gold_mean": ("gold score", "+z.2f"),
    "judge_mean": ("judge's score", "+z.2f"),
    "score_mean": ("learned score", "+z.2f"),
    "gold_gain": ("gold gain over the start", "+z.2f"),
    "gold_over_base": ("gold gain over base", "+z.2f"),
    "judge_gain": ("judge's gain over the start", "+z.2f"),
    "judge_over_base": ("judge's gain over base", "+z.2f"),
    "win_rate": ("win rate", "z.2f"),
    "kl": ("KL", "z.1f"),
    "length_mean": ("tokens", "z.0f"),
    "stop_rate": ("ends by itself", ".0%"),
    "task_gain": ("task gain", "+z.3f"),
    "retention_perplexity_ratio": ("perplexity against base", "z.2f"),
    "question_accuracy": ("questions right", "z.2f"),
}
"""Metrics of `evaluate` that end in /POLICY: (words, format)."""
COSTS = {"seconds": ("seconds", ",.0f"), "gib": ("peak GiB of its stage", ".2f")}


class OverSeeds:
    """The policies of several runs that differ only in their seed."""

    def __init__(self, directories: Sequence[Path]) -> None:
        """
        Args:
            directories: those of the runs, which must be done.
        """
        files = [directory / "summary.json" for directory in directories]
        self.runs: list[dict[str, Any]] = [
            json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()
        ]
        self.titles: dict[str, str] = {}
        """Policy -> its title in tables, for the policies that every run has."""
        policies = [run.get("policies", {}) for run in self.runs]
        if len(policies) > 1:
            self.titles = {
                name: each["title"]
                for name, each in policies[0].items()
                if all(name in other for other in policies)
            }

    def cells(self) -> Cells:
        """One row per policy, one column per figure: the mean, the lowest and the highest. No rows if the
        runs compared no policies.
        """
        columns: list[tuple[str, list[str]]] = []
        for metric, (words, spec) in FIGURES.items():
            columns.append((words, [_cell(self._metrics(metric, name), spec) for name in self.titles]))
        for cost, (words, spec) in COSTS.items():
            columns.append((words, [_cell(self._costs(cost, name), spec) for name in self.titles]))
        columns = [column for column in columns if any(cell != "-" for cell in column[1])]
        rows = [
            [title, *(cells[index] for _, cells in columns)]
            for index, title in enumerate(self.titles.values())
        ]
        return Cells([f"{len(self.runs)} seeds", *(words for words, _ in columns)], rows)

    def points(self) -> tuple[list[Point], str]:
        """The points of the picture, and the label of its gain. Points are means; their bars reach from the
        lowest to the highest seed."""
        for metric, words in GAINS.items():
            gains = {name: self._metrics(metric, name) for name in self.titles}
            if any(gains.values()):
                return [self._point(name, values) for name, values in gains.items() if values], words
        return [], ""

    def _point(self, name: str, gains: list[float]) -> Point:
        kl, seconds, gib = self._metrics("kl", name), self._costs("seconds", name), self._costs("gib", name)
        return Point(
            self.titles[name],
            Sampled(_mean(gains), min(gains), max(gains), len(gains)),
            _mean(kl) if kl else None,
            Cost(_mean(seconds), _mean(gib) if gib else None) if seconds else None,
        )

    def _metrics(self, metric: str, policy: str) -> list[float]:
        """The metric of each run; empty if a run lacks it."""
        return _known([last_evaluation(run["stages"])[1].get(f"{metric}/{policy}") for run in self.runs])

    def _costs(self, cost: str, policy: str) -> list[float]:
        return _known([run["policies"][policy].get(cost) for run in self.runs])


def policies_json(titles: Mapping[str, str], costs: Mapping[str, Cost | None]) -> dict[str, dict[str, Any]]:
    """The entry of each compared policy in summary.json."""
    return {
        name: {"title": title, **(cost._asdict() if (cost := costs[name]) else {})}
        for name, title in titles.items()
    }


def _known(values: Sequence[float | None]) -> list[float]:
    return [] if any(value is None for value in values) else [value for value in values if value is not None]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _cell(values: Sequence[float], spec: str) -> str:
    if not values:
        return "-"
    return f"{_mean(values):{spec}} ({min(values):{spec}} to {max(values):{spec}})"
