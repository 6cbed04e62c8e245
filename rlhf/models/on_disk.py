"""Weights that are made, not read, go to files too: no model takes a rank's own memory."""

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

Keep = Callable[["Tensor"], "Tensor"]
"""Takes a weight that was made, and returns the one to put in its place."""
INDEX = "model.safetensors.index.json"


@dataclass
class Scratch:
    """Files beside an artifact, while it is made."""

    directory: Path
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def keep(self, weight: Tensor) -> Tensor:
        """The weight, mapped from a file that it is written to."""
        from safetensors.torch import load_file, save_file

        file = self.directory / f"{next(self._numbers)}.safetensors"
        with naming(file):
            save_file({"weight": weight.contiguous()}, file)
        return load_file(file)["weight"]


@contextmanager
def kept_on_disk(artifact: Path) -> Iterator[Scratch]:
    """While open, there is a place beside the artifact for weights that are made. So a model of new weights
    takes no memory of its own."""
    with TemporaryDirectory(
        prefix=f"{artifact.name}.", dir=artifact.parent, ignore_cleanup_errors=True
    ) as directory:  # on NFS a directory whose files are still mapped stays until the store clears it
        yield Scratch(Path(directory))
