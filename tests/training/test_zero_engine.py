"""What DeepSpeed's stage 3 gathers in advance, and what it holds of a model that is no longer needed."""

from __future__ import annotations

import gc
import os
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.jobs import TINY
from helpers.ranks import OPTIM, write_large
from helpers.spawned import start_ranks
from rlhf.distributed.compute import Compute, Zero, leave_group, make_compute
from rlhf.models.load import load_causal_lm
from rlhf.models.logprobs import ResponseModel, pack_sequences
from rlhf.training.deepspeed import host_offload, zero_config
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


def leave_and_drop(compute: Compute, model: Path) -> list[str]:
    """As a run that a signal stops: its error holds the engine while the ranks leave each other. What could
    not be raised."""
    from deepspeed.comm import comm

    here, said = replace(compute, zero="zero3"), list[str]()
    policy = load_causal_lm(model, TINY, here.dtype, here.loads_on, here)
    engine = make_engine(ResponseModel(policy), [(policy.parameters(), OPTIM)], here)
    sys.unraisablehook = lambda unraisable: said.append(repr(unraisable.exc_value))
    backend, comm.cdb = comm.cdb, None  # what `leave_group` leaves of it; the ranks of this test go on
    del policy, engine
    gc.collect()
    comm.cdb = backend
    return said


@pytest.mark.slow
def test_an_engine_that_outlives_its_ranks_is_let_go_in_silence(tiny_model: Path) -> None:
    ranks = start_ranks(leave_and_drop, 2, tiny_model, timeout=60, seconds=120)()
    assert ranks == {0: [], 1: []}


def learn_or_go_on(compute: Compute, model: Path, directory: Path, zero: Zero, saved_by: int | None) -> int:
    """Learn and save, or load what so many ranks saved; then learn on. Bytes that loading read."""
    here = replace(compute, zero=zero)
    policy = load_causal_lm(model, TINY, here.dtype, here.loads_on, here)
    resume = {"zero": zero, "step": 1, "world_size": saved_by} if saved_by else None
    engine = make_engine(ResponseModel(policy), [(policy.parameters(), OPTIM)], here, resume=resume)
    batch = pack_sequences([torch.arange(3)], [torch.arange(3, 9)], here.device)

    def learn(step: int) -> None:
        engine.set_rates(step, 10)
        engine.backward(-engine.model(batch, 1.0).logp_N.mean() / here.world_size, last=True)
        engine.step()

    if not saved_by:
        learn(1)
        engine.save(directory / zero)
    before = bytes_read()
    if saved_by:
        engine.load(directory / zero)
    read = bytes_read() - before
    engine.save_trained(policy, directory / f"at {saved_by}")
    learn(2)  # by the moments
    engine.save_trained(policy, directory / f"after {saved_by}")
    return read


def bytes_read() -> int:
    """By this process, of files that it did not map."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_another_number_of_ranks_reads_slices(zero: Zero, tiny_model: Path, tmp_path: Path) -> None:
    write_large(tmp_path / "model", tiny_model, is_tied=False)
    arguments = (tmp_path / "model", tmp_path, zero)
    for ranks, saved_by in ((1, None), (3, 1)):
        found = start_ranks(learn_or_go_on, ranks, *arguments, saved_by, timeout=60, seconds=120)()
    saved, loaded = (load_trained(tmp_path / f"at {each}") for each in (None, 1))
    assert all(torch.equal(loaded[name], weight) for name, weight in saved.items())
    alone, together = (load_trained(tmp_path / f"after {each}") for each in (None, 1))
    step = max(float((alone[name] - weight).abs().max()) for name, weight in saved.items())
    apart = max(float((together[name] - weight).abs().max()) for name, weight in alone.items())
    assert apart < 1e-5 < 1e-2 < step
    state = 12 * sum(weight.numel() for weight in saved.values())
    for rank in (1, 2):
        assert found[rank] < state / 10, "it read what it did not map"


def test_what_waits_on_the_host_for_a_gpu_is_pinned() -> None:
    for device in ("cuda", "cpu"):
        compute = Compute(device, "bfloat16", "zero3_offload", world_size=2)
        zero = zero_config(compute, 100, 100)["zero_optimization"]
        pinned = {"device": "cpu", "pin_memory": device == "cuda"}
        assert zero["offload_optimizer"] == zero["offload_param"] == host_offload(compute) == pinned


def test_a_process_that_left_its_group_joins_another(tiny_model: Path) -> None:
    for _ in range(2):
        compute, _ = make_compute("cpu", "fp32", "zero1")
        policy = load_causal_lm(tiny_model, TINY, compute.dtype)
        make_engine(ResponseModel(policy), [(policy.parameters(), OPTIM)], compute)
        leave_group(compute)
        assert "LOCAL_RANK" not in os.environ, "what starts next would look for other ranks"
