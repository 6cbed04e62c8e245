"""Which of several answers the reward likes best."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from helpers.jobs import user
from rlhf.data.schema import PromptRow
from rlhf.evaluation.best_of_n import best_answers, kl_bound
from rlhf.rewards.reward import Prompts, last_messages
from rlhf.rl.rollout import Rollout


def test_the_best_answer_of_each_prompt_is_taken() -> None:
    texts = ["b", "a", "c", "", "", "", "a", "", "a"]  # of three prompts, three each
    ids = [torch.tensor([1])] * len(texts)
    rollout = Rollout(ids, ids, torch.ones(len(texts), dtype=torch.bool))
    rows = [PromptRow(user(f"Say {letter}")) for letter in "xyz"]
    seen: list[str] = []

    def reward(prompts: Prompts, completions: Sequence[str]) -> torch.Tensor:
        seen.extend(last_messages(prompts))
        return torch.tensor([float(ord(text)) if text else math.nan for text in completions])

    # c is the highest; without any score the first is taken, and of equal ones the first
    assert best_answers(reward, rows, rollout, texts, of=3, key="a test").tolist() == [2, 3, 6]
    assert [asked.split()[-1] for asked in seen] == list("xxxyyyzzz")


@pytest.mark.parametrize(("of", "nats"), [(2, math.log(2) - 0.5), (16, math.log(16) - 15 / 16)])
def test_the_bound_of_the_distance(of: int, nats: float) -> None:
    assert kl_bound(of) == pytest.approx(nats)
    assert kl_bound(1) == 0
