"""Ranks that run one engine together, and groups that share the prompts, against one rank; in fp32."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from helpers.models import sharper
from helpers.spawned import start_ranks
from helpers.vllm import (
    NEW,
    ROLLOUTS,
    SMALL,
    Engines,
    held,
    needs_vllm,
    roll_out,
    sample,
    some_prompts,
    together,
    uniform,
)
from rlhf.distributed.compute import Compute
from rlhf.distributed.heartbeat import Heartbeat
from rlhf.generation.vllm import Vllm


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "tensor_parallel"), [(2, 1), (4, 2)])
def test_ranks_get_what_one_rank_gets_and_hold_their_part(
    ranks: int, tensor_parallel: int, engines: Engines, directory: Path, model: PreTrainedModel
) -> None:
    """Twenty prompts that an engine takes by threes at most, three, one and none."""
    wait = start_ranks(together, ranks, directory, tensor_parallel, timeout=90, seconds=300)
    alone = engines.get()
    expected, whole = roll_out(alone, model), held(alone)
    found = wait()
    assert len(found) == ranks
    assert len(whole) > 4
    answers = expected[20, 1.0].ids
    assert len({tuple(ids) for ids in answers}) > 10  # not the same for everyone
    assert {len(ids) for ids in answers} > {NEW}  # some are done early
    for rank, result in found.items():
        assert isinstance(result, tuple), f"rank {rank}: {result}"
        rollouts, sizes = result
        for each in ROLLOUTS:
            wanted = expected[each]
            assert rollouts[each]._replace(logps=[]) == wanted._replace(logps=[])
            assert rollouts[each].logps == pytest.approx(wanted.logps, abs=1e-4)
            assert wanted.told == len(wanted.ids) == each[0]
        assert {name: size * tensor_parallel for name, size in sizes.items()} == whole


def stopped_within(compute: Compute, model: Path, directory: Path) -> list[str]:
    """Rank 1 stops when the first response is whole. What rank 0's heartbeat says; then rank 1 goes on."""
    said: list[str] = []

    def hung(why: str) -> None:
        said.append(why)
        if compute.is_main:
            os.kill(int((directory / "rank 1").read_text()), signal.SIGCONT)

    def stop(rows: int) -> None:
        if compute.rank == 1 and not (directory / "rank 1").exists():
            (directory / "rank 1").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)

    compute.position.update(stage="generate", step=0)
    engine = Vllm(SMALL.model_copy(update={"tensor_parallel": 2}), compute)
    with Heartbeat(directory, compute, hung):
        sample(
            engine, sharper(model), some_prompts(20), temperature=1.0, stop_ids=range(3, 23), on_rows=stop,
            uniform_BR=uniform(20, NEW),
        )  # fmt: skip
    return said


@needs_vllm
@pytest.mark.slow
def test_a_rank_that_waits_in_the_engine_says_for_whom(directory: Path, tmp_path: Path) -> None:
    """vLLM's ranks on CPUs wait in shared memory, which has no time limit."""
    found = start_ranks(stopped_within, 2, directory, tmp_path, timeout=15, seconds=120)()[0]
    assert isinstance(found, list), found
    (why,) = found
    assert why.startswith("generate, step 0: rank 0 waited for rank 1 (last seen "), why
