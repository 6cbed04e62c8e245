"""zero=hsdp: two nodes of two ranks each (here on one host) against one rank, and across a restart."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from helpers.hsdp import alone, first_start, second_start
from helpers.spawned import start_ranks
from rlhf.training.trained import load_trained


@pytest.mark.slow
def test_two_nodes_learn_what_one_rank_learns_and_go_on_after_a_restart(
    tiny_model: Path, tmp_path: Path
) -> None:
    wait = start_ranks(first_start, 4, tiny_model, tmp_path, timeout=120, seconds=600)
    expected = alone(tiny_model, tmp_path / "alone")
    del expected["files"]
    weights = load_trained(tmp_path / "alone" / "weights")
    for rank, found in wait().items():
        assert isinstance(found, dict), f"rank {rank}: {found}"
        assert found["through"].pop("files") == found["first"].pop("files") == 2  # one replica writes
        assert found["through"] == pytest.approx(expected, rel=1e-5), rank
        assert next(iter(found["refused"])).startswith("zero=hsdp: nodes have 1 and 3 ranks")
    through = load_trained(tmp_path / "through" / "weights")
    torch.testing.assert_close(through, weights, rtol=0, atol=1e-5)

    for name in ("same", "other"):
        shutil.copytree(tmp_path / "again" / "checkpoints", tmp_path / name / "checkpoints")
    for rank, found in start_ranks(second_start, 4, tiny_model, tmp_path, timeout=120, seconds=600)().items():
        assert isinstance(found, dict), f"rank {rank}: {found}"
        for name in ("same", "other"):
            assert "loss 0" not in found[name]
            assert found[name]["loss 2"] == pytest.approx(expected["loss 2"], rel=1e-5), name
    again = load_trained(tmp_path / "same" / "weights")
    assert again.keys() == through.keys()
    assert all(torch.equal(again[name], through[name]) for name in through)
    torch.testing.assert_close(load_trained(tmp_path / "other" / "weights"), weights, rtol=0, atol=1e-5)
