"""Trained weights on disk: plain safetensors files with full weights under their names.

Several ranks write their files into one directory. A reader maps them all: a weight takes no memory of the
process until it is changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf.disk import naming

FILE_BYTES = 5 * 10**9
"""Most bytes of weights that wait to be written. No file is larger, unless a single weight is."""


class TrainedFiles:
    """One rank's files in a directory, each written as soon as it is full."""

    def __init__(self, directory: Path, rank: int) -> None:
        self._directory, self._rank, self._count, self._waiting = directory, rank, 0, dict[str, Tensor]()

    def make_room(self, num_bytes: int) -> None:
        """Write the waiting weights, if one file cannot hold `num_bytes` more."""
        if sum(each.nbytes for each in self._waiting.values()) + num_bytes > FILE_BYTES:
            self.close()

    def add(self, name: str, weight: Tensor) -> None:
        """Add one weight. It must not change before `close`."""
        self.make_room(weight.nbytes)
        self._waiting[name] = weight.cpu()

    def close(self) -> None:
        """Write the waiting weights."""
        if not self._waiting:
            return
        file = self._directory / f"trained-{self._rank:05d}-{self._count:05d}.safetensors"
        with naming(file):
            save_file({name: each.contiguous() for name, each in self._waiting.items()}, file)
        self._count += 1
        self._waiting = {}


def owners(sizes: Sequence[int], ranks: int) -> list[int]:
    """The rank that writes each weight. The largest come first, each for the rank with the fewest bytes."""
    loads, owner_ranks = [0] * ranks, [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        owner_ranks[index] = min(range(ranks), key=loads.__getitem__)
        loads[owner_ranks[index]] += sizes[index]
    return owner_ranks


def load_trained(directory: Path) -> dict[str, Tensor]:
    """Name -> weight for all weights in a directory, mapped from the files."""
    weights: dict[str, Tensor] = {}
    for file in sorted(directory.glob("trained-*.safetensors")):
        weights |= load_file(file)
    return weights


@torch.no_grad()
def put_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Replace the trained weights of a model. A weight is copied only if the model has another dtype or
    device."""
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    assert weights.keys() == trained.keys(), sorted(weights.keys() ^ trained.keys())
    for name, weight in weights.items():
        assert weight.shape == trained[name].shape, name
        trained[name].data = weight.to(trained[name])
