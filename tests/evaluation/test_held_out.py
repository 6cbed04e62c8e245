"""What the gold score says of a policy's answers while it learns."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.jobs import user
from rlhf.data.schema import PromptRow
from rlhf.evaluation.held_out import FILE, AtStep, gold_over_steps, lost_since_peak, write_answers
from rlhf.rewards.reward import Prompts, RewardError


def answer(row: PromptRow, response: str, kl: float) -> dict[str, object]:
    return {**asdict(row), "response": response, "kl": kl, "score": 1.0, "token_ids": [7, 8]}


def at(step: int, *gold: float) -> AtStep:
    return AtStep(step, torch.zeros(len(gold)), torch.tensor(gold))


def test_each_evaluation_is_scored_with_all_that_its_prompts_had(tmp_path: Path) -> None:
    rows = [
        PromptRow(user("2 + 2"), columns={"answer": 4}, is_text=True),
        PromptRow(user("ü\u2028?"), columns={"answer": [5, None]}),
    ]
    for step, kl in ((0, 0.0), (3, 1.5)):
        said = [answer(row, f"{step}\n\u2028🙂", kl * number) for number, row in enumerate(rows)]
        write_answers(tmp_path / f"{step}", step, said)
    path = tmp_path / FILE
    path.write_bytes((tmp_path / "0").read_bytes() + (tmp_path / "3").read_bytes())
    seen: list[tuple[Prompts, Sequence[str]]] = []

    def gold(prompts: Prompts, completions: Sequence[str]) -> Tensor:
        seen.append((prompts, completions))
        return torch.tensor([float(len(seen)), math.nan])

    found = gold_over_steps(path, gold, ["answer"])
    assert [(each.step, each.kl_B.tolist()) for each in found] == [(0, [0.0, 0.0]), (3, [0.0, 1.5])]
    assert found[1].row() == {
        "step": 3, "kl": 0.75, "gold": 2.0, "gold_low": None, "gold_high": None, "rows": 1,
    }  # fmt: skip
    prompts, completions = seen[1]
    assert [row.columns for row in prompts] == [row.columns | {"completion_ids": [7, 8]} for row in rows]
    assert [(row.prompt, row.is_text) for row in prompts] == [(row.prompt, row.is_text) for row in rows]
    assert list(completions) == ["3\n\u2028🙂"] * 2
    with pytest.raises(RewardError, match="no prompt has the column solution"):
        gold_over_steps(path, gold, ["solution"])


def test_no_score_is_null_and_no_zero() -> None:
    assert json.dumps(at(2, math.nan, math.nan).row()) == (
        '{"step": 2, "kl": 0.0, "gold": null, "gold_low": null, "gold_high": null, "rows": 0}'
    )


def test_one_half_chooses_the_peak_and_the_other_judges_it() -> None:
    start, peak, kept = at(0, 0.0, 0.5, 0.0, 0.5), at(4, 0.9, 0.6, 0.9, 0.4), at(8, 0.5, 0.2, 0.5, 0.2)
    found = lost_since_peak([start, peak, kept], 8)
    assert found["gold_peak_step"] == 4  # by the first and third prompt; step 0 is higher on the others
    assert found["gold_lost"] == pytest.approx(0.3) and found["gold_lost_rows"] == 2


def test_a_policy_that_keeps_its_peak_lost_nothing() -> None:
    found = lost_since_peak([at(0, 0.0, 0.5, 0.1, 0.5), at(4, 0.9, 0.6, 0.9, 0.4)], 4)
    assert (found["gold_peak_step"], found["gold_lost"], found["gold_lost_low"]) == (4, 0.0, 0.0)


@pytest.mark.parametrize(
    ("steps", "kept"),
    [
        ([], 0),
        ([at(0, 1.0, 1.0)], 4),
        ([at(0, math.nan, 1.0)], 0),
        ([at(0, 1.0, math.nan)], 0),
        ([at(0, 1.0)], 0),
    ],
)
def test_without_scores_in_both_halves_nothing_is_said(steps: list[AtStep], kept: int) -> None:
    assert lost_since_peak(steps, kept) == {}
