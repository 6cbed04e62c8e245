"""Ranks that run one engine together, and groups that share the prompts, against one rank; in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedModel

from helpers.spawned import start_ranks
from helpers.vllm import NEW, ROLLOUTS, Engines, held, needs_vllm, roll_out, together


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
