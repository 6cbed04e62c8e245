"""zero=hsdp: two nodes of two ranks each (here on one host), across a restart."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from helpers.hsdp import first_start, second_start
from helpers.spawned import start_ranks
from rlhf.training.trained import load_trained


@pytest.mark.slow
def test_two_nodes_go_on_after_a_restart_as_two_or_as_one(tiny_model: Path, tmp_path: Path) -> None:
    """tests/benchmarks/test_one_rank_or_many.py says that they learn what one rank learns."""
    found = start_ranks(first_start, 4, tiny_model, tmp_path, timeout=120, seconds=600)()
    for rank, each in found.items():
        assert isinstance(each, dict), f"rank {rank}: {each}"
        assert each["through"].pop("files") == each["first"].pop("files") == 2  # one replica writes
        assert next(iter(each["refused"])).startswith("zero=hsdp: nodes have 1 and 3 ranks")
    expected = found[0]["through"]
    through = load_trained(tmp_path / "through" / "weights")

    for name in ("same", "other"):
        shutil.copytree(tmp_path / "again" / "checkpoints", tmp_path / name / "checkpoints")
    for rank, each in start_ranks(second_start, 4, tiny_model, tmp_path, timeout=120, seconds=600)().items():
        assert isinstance(each, dict), f"rank {rank}: {each}"
        for name in ("same", "other"):
            assert "loss 0" not in each[name]
            assert each[name]["loss 2"] == pytest.approx(expected["loss 2"], rel=1e-5), name
    again = load_trained(tmp_path / "same" / "weights")
    assert again.keys() == through.keys()
    assert all(torch.equal(again[name], through[name]) for name in through)
    torch.testing.assert_close(load_trained(tmp_path / "other" / "weights"), through, rtol=0, atol=1e-5)
