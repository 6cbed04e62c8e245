"""Ranks that run sharded weights in step: what rank 0 asks alone, and who is missing."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.jobs import TINY, user
from helpers.ranks import write_large
from helpers.spawned import start_ranks
from rlhf.distributed.compute import Compute, Zero
from rlhf.distributed.heartbeat import Heartbeat
from rlhf.generation.policy_model import PolicyModel

ZERO: list[Zero] = ["zero3", "fsdp2"]


@pytest.fixture
def large(tmp_path: Path, tiny_model: Path) -> Path:
    write_large(tmp_path / "large", tiny_model, is_tied=False)
    return tmp_path / "large"


def rows(policy: PolicyModel, count: int) -> list[str]:
    return policy.sample(
        [user(f"What is {number}?") for number in range(count)], max_new_tokens=8, temperature=1.0,
        generator=torch.Generator().manual_seed(0), batch_rows=2,
    )[1]  # fmt: skip


def on_rank_0(compute: Compute, model: Path) -> dict[str, Any]:
    """Of each `zero=`: logits that rank 0 asked for alone, and what every rank hears of its mistake."""
    found: dict[str, Any] = {}
    for zero in ("none", *ZERO):
        policy = PolicyModel.load(model, TINY, replace(compute, zero=zero), local_sampling="layers")

        def work(policy: PolicyModel = policy) -> list[float]:
            ids = torch.arange(12).view(2, 6)
            return [float(policy.model(input_ids=ids[:, :n]).logits.sum()) for n in (2, 6)]

        def fail() -> None:
            work()
            raise ValueError("no such task")

        with torch.no_grad():
            found[zero] = policy.on_main(work)
            with pytest.raises(ValueError, match="no such task"):
                policy.on_main(fail)
        found[f"{zero} behind"] = rows(policy, 3)
    return found


@pytest.mark.slow
def test_the_other_ranks_answer_what_rank_0_asks_alone(large: Path) -> None:
    for rank, found in start_ranks(on_rank_0, 2, large, timeout=60, seconds=200)().items():
        assert isinstance(found, dict), f"rank {rank}: {found}"
        for zero in ZERO:
            assert found[zero] == pytest.approx(found["none"], rel=1e-4, abs=1e-3), (rank, zero)
            assert found[f"{zero} behind"] == found["none behind"]


def with_one_lost(compute: Compute, model: Path, directory: Path, zero: Zero) -> str:
    """Rank 1 is gone in the middle of its answers; what rank 0 says."""
    compute = replace(compute, zero=zero)
    compute.position.update(stage="generate", step=0)
    with Heartbeat(directory, compute, pytest.fail) as heartbeat:
        policy = PolicyModel.load(model, TINY, compute, local_sampling="layers")
        rows(policy, 2)
        if compute.rank == 1:
            policy.model.register_forward_pre_hook(lambda *call: os._exit(1))
        with pytest.raises(RuntimeError):
            rows(policy, 4)
        return heartbeat.explain()


@pytest.mark.slow
@pytest.mark.parametrize("zero", ZERO)
def test_a_rank_that_is_lost_in_a_pass_is_named(zero: Zero, large: Path, tmp_path: Path) -> None:
    wait = start_ranks(with_one_lost, 2, large, tmp_path / "ranks", zero, timeout=10, seconds=90, lost={1})
    (said,) = wait().values()
    assert said.startswith("generate, step 0: rank 0 waited for rank 1 (last seen"), said
