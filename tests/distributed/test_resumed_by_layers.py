"""GRPO on two ranks that sample layer by layer: stopped and resumed, it is the same bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.models import write_reward
from helpers.resumed import through_and_resumed, write_data
from helpers.spawned import start_ranks


@pytest.mark.slow
def test_it_ends_as_if_undisturbed(tiny_model: Path, tmp_path: Path) -> None:
    """The reward is the lower of two, normalised ones: a function's, which gives some answers no score, and a
    model's."""
    (tmp_path / "tiny").symlink_to(tiny_model)
    write_reward(tmp_path / "judged", tiny_model)
    write_data(tmp_path / "data")
    wait = start_ranks(through_and_resumed, 2, tmp_path, timeout=90, seconds=200)
    for rank, found in wait().items():
        assert isinstance(found, tuple), f"rank {rank}: {found}"
        through, resumed = found
        assert resumed == through and abs(through["kl"]) > 1e-3, rank
    through, resumed = (
        load_file(tmp_path / name / "artifact" / "model.safetensors") for name in ("through", "resumed")
    )
    assert all(torch.equal(resumed[name], weight) for name, weight in through.items())
