"""How often a function may raise is counted over all ranks' answers, however the ranks share them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.experiments import build
from helpers.jobs import small_job, tiny_base, user
from helpers.spawned import start_ranks
from rlhf.data.schema import PromptRow
from rlhf.distributed.compute import Compute
from rlhf.rewards.reward import RewardError
from rlhf.stages.generate import GenerateStage

ANSWERS = [f"{number:>{number + 2}}" for number in range(40)]
"""Of rising length, so of two ranks the first one has the odd ones."""


def strict(prompts: list[str], completions: list[str]) -> list[float]:
    """Raises for two answers, which one rank has."""
    if {"37", "39"} & {each.strip() for each in completions}:
        raise ZeroDivisionError("division by zero")
    return [float(len(each)) for each in completions]


def scored(compute: Compute, model: Path, directory: Path) -> list[Any]:
    """The scores with two raises of 40 allowed, and what is said where one is."""
    found: list[Any] = []
    for share in (0.05, 0.04):
        reward = f"generate.reward=python:{__name__}:strict"
        stage = build("stage=generate", reward, f"generate.max_unscored={share}").stages["generate"]
        assert isinstance(stage, GenerateStage)
        base, name = tiny_base(model), f"{compute.rank}-{share}"
        job = small_job("generate", directory / name, base, compute=compute)
        try:
            scores = stage.score(job, [PromptRow(user("?"))] * len(ANSWERS), ANSWERS)
        except RewardError as error:
            found.append(str(error))
        else:
            assert scores is not None
            found.append((int(scores.score_B.isnan().sum()), scores.usage))
    return found


@pytest.mark.slow
def test_what_one_rank_may_all_ranks_may(tiny_model: Path, tmp_path: Path) -> None:
    for rank, found in start_ranks(scored, 2, tiny_model, tmp_path, timeout=60, seconds=200)().items():
        assert isinstance(found, list), f"rank {rank}: {found}"
        (unscored, usage), refused = found
        assert (unscored, usage) == (2, {"raised": 2.0})
        assert "ZeroDivisionError: division by zero" in refused or "on another rank" in refused, refused
