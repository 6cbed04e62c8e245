"""Trained weights on disk: which rank writes what, how large files get, and what comes back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from helpers.jobs import on_cpu
from helpers.trained import trained_weights, write_trained
from rlhf.training import trained
from rlhf.training.config import OptimConfig
from rlhf.training.make_engine import make_engine
from rlhf.training.trained import load_trained, owners, put_weights

OPTIM = OptimConfig(
    lr=0.1, weight_decay=0.0, eps=1e-8, schedule="linear", warmup_fraction=0.0, max_grad_norm=1.0
)


class Two(nn.Module):
    """Two layers; only the second one trains."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 4), nn.Linear(4, 2)
        self.first.requires_grad_(False)


def test_the_largest_weights_are_dealt_first() -> None:
    assert owners([1, 9, 4, 6, 3], 2) == [1, 0, 1, 1, 0]  # 12 bytes and 11
    assert owners([5, 5, 5], 1) == [0, 0, 0]


def test_files_are_no_larger_than_they_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained, "FILE_BYTES", 128)
    weights = {f"{size}.{n}": torch.full((size,), float(n)) for n, size in enumerate((8, 16, 8, 100, 30, 2))}
    directory = write_trained(tmp_path / "trained", weights)
    sizes = [sum(each.nbytes for each in load_file(file).values()) for file in sorted(directory.iterdir())]
    assert sizes == [128, 400, 128]  # one weight is larger
    found = load_trained(directory)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], each) for name, each in weights.items())


def test_what_trains_is_written_and_put_into_another_model(tmp_path: Path) -> None:
    model, other = Two(), Two()
    engine = make_engine(model, [(model.parameters(), OPTIM)], on_cpu())
    engine.save_trained(model, tmp_path / "trained")
    found = load_trained(tmp_path / "trained")
    assert found.keys() == {"second.bias", "second.weight"}
    kept, frozen = model.second.weight.detach().clone(), other.first.weight.detach().clone()
    with torch.no_grad():
        model.second.weight.add_(1.0)
    put_weights(other, found)
    assert torch.equal(other.second.weight, kept) and torch.equal(other.first.weight, frozen)
    assert other.second.weight.data_ptr() == found["second.weight"].data_ptr()  # mapped, not copied


def test_a_weight_that_is_missing_is_noticed(tmp_path: Path) -> None:
    directory = write_trained(tmp_path / "trained", {"second.weight": torch.zeros(2, 4)})
    with pytest.raises(AssertionError, match=r"second\.bias"):
        put_weights(Two(), load_trained(directory))


def test_tied_weights_are_written_once() -> None:
    model = Two()
    model.third = model.second
    engine = make_engine(model, [(model.parameters(), OPTIM)], on_cpu())
    assert trained_weights(engine, model).keys() == {"second.bias", "second.weight"}
