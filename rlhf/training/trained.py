"""Trained weights on disk: plain safetensors files, each weight whole and under its name.

Several ranks write files side by side into one directory. A reader maps them all: the weights take no memory
of its own before they are written to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf.disk import naming

FILE_BYTES = 5 * 10**9
"""So many bytes of weights are held until they are written. So no file is larger, unless a single weight
is."""


class TrainedFiles:
    """One rank's files in a directory, each written as soon as it is full."""

    def __init__(self, directory: Path, rank: int) -> None:
        self._directory, self._rank, self._count, self._waiting = directory, rank, 0, dict[str, Tensor]()

    def make_room(self, num_bytes: int) -> None:
        """Write what waits, if so many bytes more would be too many for one file."""
        if sum(each.nbytes for each in self._waiting.values()) + num_bytes > FILE_BYTES:
            self.close()

    def add(self, name: str, weight: Tensor) -> None:
        """Take one weight. It must not change before `close`."""
        self.make_room(weight.nbytes)
        self._waiting[name] = weight.cpu()

    def close(self) -> None:
        """Write what waits."""
        if not self._waiting:
            return
        file = self._directory / f"trained-{self._rank:05d}-{self._count:05d}.safetensors"
        with naming(file):
            save_file({name: each.contiguous() for name, each in self._waiting.items()}, file)
        self._count += 1
        self._waiting = {}


def owners(sizes: Sequence[int], ranks: int) -> list[int]:
    """The rank that writes each weight: the largest first, each to the rank that has the fewest bytes."""
    loads, found = [0] * ranks, [0] * len(sizes)
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        found[place] = min(range(ranks), key=loads.__getitem__)
        loads[found[place]] += sizes[place]
    return found


def load_trained(directory: Path) -> dict[str, Tensor]:
    """All weights in a directory by their names, mapped from the files."""
    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("trained-*.safetensors")):
        found |= load_file(file)
    return found


@torch.no_grad()
def put_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put weights in the places of those that train in a model. None is copied, unless it has another dtype
    or device here."""
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    assert weights.keys() == trained.keys(), sorted(weights.keys() ^ trained.keys())
    for name, weight in weights.items():
        assert weight.shape == trained[name].shape, name
        trained[name].data = weight.to(trained[name])
