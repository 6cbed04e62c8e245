"""Trained weights on disk, for tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor, nn

from rlhf.training.engine import Engine
from rlhf.training.trained import TrainedFiles, load_trained


def write_trained(directory: Path, weights: Mapping[str, Tensor]) -> Path:
    """The directory, as an engine would have written it."""
    directory.mkdir(parents=True)
    files = TrainedFiles(directory, 0)
    for name, weight in weights.items():
        files.add(name, weight.detach())
    files.close()
    return directory


def trained_weights(engine: Engine, module: nn.Module) -> dict[str, Tensor]:
    """A copy of what one engine's rank would write of a part of its model."""
    with TemporaryDirectory() as scratch:
        directory = Path(scratch) / "trained"
        engine.save_trained(module, directory)
        return {name: each.clone() for name, each in load_trained(directory).items()}
