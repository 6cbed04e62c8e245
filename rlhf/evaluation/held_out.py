"""Answers to held-out prompts from each evaluation during a policy's training, and their gold scores.

Learned score and gold score diverge when a policy exploits errors of the reward (Gao et al. 2022,
arXiv:2210.10760).

Dimensions: B held-out prompts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.data.schema import PromptRow
from rlhf.evaluation.intervals import mean
from rlhf.rewards.combined import scored
from rlhf.rewards.reward import Reward, RewardError, with_token_ids

FILE = "held_out_answers.jsonl"
"""File in the artifact of a policy that learned from scores: one line per answer, ordered by evaluation."""
SELECTION_HALF, TEST_HALF = slice(0, None, 2), slice(1, None, 2)
"""Halves of the held-out prompts. One selects a policy, the other measures it: on the prompts that selected
it, a policy looks better than it is."""


class AtStep(NamedTuple):
    """A policy after one step of its training."""

    step: int
    kl_B: Tensor
    """KL from the reference, in nats per sequence."""
    gold_B: Tensor
    """Gold scores; NaN for no score."""

    def row(self) -> dict[str, Any]:
        """Means as JSON values; null if no answer has a score."""
        gold = mean(finite(self.gold_B))
        means = {
            "kl": float(self.kl_B.mean()),
            "gold": gold.value,
            "gold_low": gold.low,
            "gold_high": gold.high,
        }
        return {
            "step": self.step,
            **{name: value if math.isfinite(value) else None for name, value in means.items()},
            "rows": gold.rows,
        }


def finite(score_B: Tensor) -> Tensor:
    """The finite scores, as fp64."""
    return score_B[score_B.isfinite()].double()


def gold_over_steps(path: Path, gold: Reward, needed: Iterable[str]) -> list[AtStep]:
    """Score the answers of each evaluation with the gold reward.

    Args:
        path: the path of a `FILE`.
        needed: columns of the prompts that the reward requires.

    Raises:
        RewardError: the reward cannot score them, or a column is missing.
    """
    steps = []
    for step, group in groupby(_lines(path), key=lambda answer: answer["step"]):
        answers = list(group)
        prompts = [
            PromptRow(**{each.name: answer[each.name] for each in fields(PromptRow)}) for answer in answers
        ]
        for name in needed:
            if not any(name in row.columns for row in prompts):
                raise RewardError(f"no prompt has the column {name}.")
        rows = with_token_ids(prompts, [torch.tensor(each["token_ids"]) for each in answers])
        gold_B = scored(gold, rows, [each["response"] for each in answers]).score_B
        steps.append(AtStep(step, torch.tensor([each["kl"] for each in answers]), gold_B))
    return steps


def write_answers(path: Path, step: int, answers: Iterable[Mapping[str, Any]]) -> None:
    """Write the answers of one evaluation."""
    lines = (json.dumps({"step": step, **answer}, ensure_ascii=False) + "\n" for answer in answers)
    path.write_text("".join(lines), encoding="utf-8")


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def lost_since_peak(steps: Sequence[AtStep], published: int) -> dict[str, float]:
    """Gold score of the best step minus that of the published step, on prompts that did not select the best
    step.

    Args:
        published: the step whose weights are published.

    Returns:
        `gold_peak_step` and `gold_lost`; empty if a half has no score, or `published` is not among the steps.
    """
    scores = {at.step: finite(at.gold_B[SELECTION_HALF]) for at in steps}
    scores = {step: gold_B for step, gold_B in scores.items() if len(gold_B)}
    by_step = {at.step: at for at in steps}
    if published not in by_step or not scores:
        return {}
    peak = max(scores, key=lambda step: float(scores[step].mean()))
    lost_B = finite(by_step[peak].gold_B[TEST_HALF].double() - by_step[published].gold_B[TEST_HALF].double())
    return {"gold_peak_step": peak, **mean(lost_B).metrics("gold_lost")} if len(lost_B) else {}
