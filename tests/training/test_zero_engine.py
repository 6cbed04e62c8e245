"""What DeepSpeed's stage 3 gathers in advance, and what it holds of a model that is no longer needed."""

from __future__ import annotations

import gc
import os
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.jobs import TINY
from helpers.ranks import OPTIM, write_large
from helpers.spawned import start_ranks
from rlhf.distributed.compute import Compute, leave_group, make_compute
from rlhf.models.load import load_causal_lm
from rlhf.models.logprobs import ResponseModel, pack_sequences
from rlhf.training.make_engine import make_engine
from rlhf.training.trained import load_trained


def train_and_drop(compute: Compute, model: Path, directory: Path) -> dict[str, Any]:
    """Learn, read once more, publish at once, and let go of everything."""
    here = replace(compute, zero="zero3")
    policy = load_causal_lm(model, TINY, here.dtype, here.loads_on, here)
    engine = make_engine(ResponseModel(policy), [(policy.parameters(), OPTIM)], here)
    batch = pack_sequences([torch.arange(3)], [torch.arange(3, 9)], here.device)
    for step in range(3):
        engine.set_rates(step, 10)
        engine.backward(-engine.model(batch, 1.0).logp_N.mean() / 2, last=True)
        engine.step()
    with torch.no_grad():
        engine.model(batch, 1.0)
    parameters: list[Any] = list(policy.parameters())  # DeepSpeed gives them attributes
    waiting = [each.ds_status.name for each in parameters if not each.ds_persist]
    engine.save_trained(policy, directory)
    kept = [weakref.ref(each) for each in policy.parameters()]
    del policy, engine, parameters
    gc.collect()
    return {"waiting": waiting, "kept": sum(each() is not None for each in kept)}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[int, Any]:
    directory = tmp_path_factory.mktemp("zero")
    write_large(directory / "model", tiny_model, is_tied=False)
    trained = directory / "trained"
    ranks = start_ranks(train_and_drop, 2, directory / "model", trained, timeout=60, seconds=120)()
    for rank, each in ranks.items():
        assert isinstance(each, dict), f"rank {rank}: {each}"
    return ranks | {-1: load_trained(trained)}


@pytest.mark.slow
def test_weights_on_their_way_are_no_obstacle_to_publishing(found: dict[int, Any]) -> None:
    assert "INFLIGHT" in found[0]["waiting"], "nothing was gathered in advance: the test shows nothing"
    assert all(bool(weight.isfinite().all()) for weight in found[-1].values())


@pytest.mark.slow
def test_an_engine_that_nobody_needs_is_let_go(found: dict[int, Any]) -> None:
    assert (found[0]["kept"], found[1]["kept"]) == (0, 0)


def test_a_process_that_left_its_group_joins_another(tiny_model: Path) -> None:
    for _ in range(2):
        compute, _ = make_compute("cpu", "fp32", "zero1")
        policy = load_causal_lm(tiny_model, TINY, compute.dtype)
        make_engine(ResponseModel(policy), [(policy.parameters(), OPTIM)], compute)
        leave_group(compute)
        assert "LOCAL_RANK" not in os.environ, "what starts next would look for other ranks"
