"""The answers to held-out prompts of each evaluation in a policy's training, and what the gold score says of
them: learned score and gold score part where a policy learns what the reward likes by mistake (Gao et al.
2022, arXiv:2210.10760).

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
"""In the artifact of a policy that learned from scores: a line for each answer, evaluation by evaluation."""
CHOICE, JUDGED = slice(0, None, 2), slice(1, None, 2)
"""Halves of the held-out prompts. The first chooses among several policies, the second judges the chosen one:
on the prompts that chose it, the luckiest looks better than it is."""


class AtStep(NamedTuple):
    """A policy after one step of its training."""

    step: int
    kl_B: Tensor
    """Nats a sequence, from the reference."""
    gold_B: Tensor
    """NaN for no score."""

    def row(self) -> dict[str, Any]:
        """As JSON values, each a mean; null where nothing has a score."""
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
    """Without what is no score."""
    return score_B[score_B.isfinite()].double()


def gold_over_steps(path: Path, gold: Reward, needed: Iterable[str]) -> list[AtStep]:
    """Let the gold reward score the answers of each evaluation.

    Args:
        path: a `FILE`.
        needed: columns of the prompts that the reward cannot do without.

    Raises:
        RewardError: it cannot score them.
    """
    found = []
    for step, answers in groupby(_lines(path), key=lambda answer: answer["step"]):
        said = list(answers)
        prompts = [PromptRow(**{each.name: line[each.name] for each in fields(PromptRow)}) for line in said]
        for name in needed:
            if not any(name in row.columns for row in prompts):
                raise RewardError(f"no prompt has the column {name}.")
        rows = with_token_ids(prompts, [torch.tensor(each["token_ids"]) for each in said])
        gold_B = scored(gold, rows, [each["response"] for each in said]).score_B
        found.append(AtStep(step, torch.tensor([each["kl"] for each in said]), gold_B))
    return found


def write_answers(path: Path, step: int, answers: Iterable[Mapping[str, Any]]) -> None:
    """Write those of one evaluation."""
    lines = (json.dumps({"step": step, **answer}, ensure_ascii=False) + "\n" for answer in answers)
    path.write_text("".join(lines), encoding="utf-8")


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def lost_since_peak(found: Sequence[AtStep], kept: int) -> dict[str, float]:
    """How much lower the gold score of the kept weights is than that of the step where it was highest, on
    prompts that did not choose this step.

    Args:
        kept: the step whose weights are published.

    Returns:
        `gold_peak_step` and `gold_lost`; nothing where a half has no score, or `kept` is not among the steps.
    """
    chosen = {at.step: finite(at.gold_B[CHOICE]) for at in found}
    chosen = {step: gold_B for step, gold_B in chosen.items() if len(gold_B)}
    steps = {at.step: at for at in found}
    if kept not in steps or not chosen:
        return {}
    peak = max(chosen, key=lambda step: float(chosen[step].mean()))
    lost_B = finite(steps[peak].gold_B[JUDGED].double() - steps[kept].gold_B[JUDGED].double())
    return {"gold_peak_step": peak, **mean(lost_B).metrics("gold_lost")} if len(lost_B) else {}
