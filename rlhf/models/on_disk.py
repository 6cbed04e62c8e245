"""Write newly computed weights to files and map these, so that they take no memory of a rank's own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from rlhf.disk import naming

if TYPE_CHECKING:
    from torch import Tensor

MapWeight = Callable[["Tensor"], "Tensor"]
"""Takes a new weight and returns the one to use instead, such as a copy that is mapped from a file."""
INDEX = "model.safetensors.index.json"


@dataclass
class Scratch:
    """Temporary files next to an artifact that is being written."""

    directory: Path
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def map_to_file(self, weight: Tensor) -> Tensor:
        """Write a weight to a new file and return it mapped from there."""
        from safetensors.torch import load_file, save_file

        file = self.directory / f"{next(self._numbers)}.safetensors"
        with naming(file):
            save_file({"weight": weight.contiguous()}, file)
        return load_file(file)["weight"]


@contextmanager
def open_scratch(artifact: Path) -> Iterator[Scratch]:
    """While open, a temporary directory next to the artifact for new weights, so that a model of new weights
    takes no memory of its own."""
    with TemporaryDirectory(
        prefix=f"{artifact.name}.", dir=artifact.parent, ignore_cleanup_errors=True
    ) as directory:  # on NFS, mapped files keep the directory until the store clears it
        yield Scratch(Path(directory))
