"""A learned reward on several ranks: each encodes its share of the texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.jobs import TINY, user
from rlhf.data.schema import PromptRow
from rlhf.distributed.compute import Compute
from rlhf.models.base import load_tokenizer
from rlhf.models.value_head import load_scalar_model
from rlhf.rewards.model import LearnedReward
from rlhf.rewards.reward import RewardError

PROMPTS = [PromptRow(user(f"Say {n}")) for n in range(5)]
ANSWERS = ["a", "bb" * 40, "", "dddd", "e" * 7]


class Writer:
    """A tokenizer that notes what it encodes."""

    is_fast = False
    """So that it is called, not what lies behind it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.texts = tokenizer, list[str]()

    def __call__(self, text: str, **how: Any) -> Any:
        self.texts.append(text)
        return self._tokenizer(text, **how)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


@dataclass(frozen=True)
class Meeting(Compute):
    """One of two ranks, which meets the other on a list."""

    parts: dict[int, Sequence[Any]] = field(default_factory=dict)

    def collect(self, mine: Sequence[Any], lengths: Sequence[int], group_size: int = 1) -> list[Any]:
        self.parts[self.rank] = mine
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        found: list[Any] = [None] * len(lengths)
        for rank, part in self.parts.items():
            for index, result in zip(order[rank::2], part, strict=True):
                found[index] = result
        return [result for result in found if result is not None]


def rewards(model: Path) -> list[LearnedReward]:
    parts: dict[int, Sequence[Any]] = {}
    scalar = load_scalar_model(model, TINY, torch.float32, new_head=True)
    return [
        LearnedReward(
            model, scalar, Writer(load_tokenizer(model, TINY)), 1000,  # type: ignore[arg-type]  # it acts as one
            Meeting("cpu", "float32", rank=rank, world_size=2, parts=parts),
        )
        for rank in range(2)
    ]  # fmt: skip


def test_each_text_is_encoded_by_one_rank_and_all_have_all_ids(tiny_model: Path) -> None:
    first, second = rewards(tiny_model)
    first._all_ids(PROMPTS, ANSWERS)
    found = second._all_ids(PROMPTS, ANSWERS)
    alone = LearnedReward(
        tiny_model, first.model, load_tokenizer(tiny_model, TINY), 1000, Compute("cpu", "float32")
    )
    assert found == alone._all_ids(PROMPTS, ANSWERS)
    assert isinstance(first.tokenizer, Writer) and isinstance(second.tokenizer, Writer)
    encoded = [[text for text in each.tokenizer.texts if text in ANSWERS] for each in (first, second)]
    assert sorted([*encoded[0], *encoded[1]]) == sorted(ANSWERS)
    assert sorted(map(len, encoded)) == [2, 3]


def test_a_row_that_is_too_long_ends_both_ranks(tiny_model: Path) -> None:
    for each in rewards(tiny_model):  # the first one has it in its share
        with pytest.raises(RewardError, match="the reward model reads 1024 tokens"):
            each._all_ids(PROMPTS, [*ANSWERS[:4], "x" * 3000])
