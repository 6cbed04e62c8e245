"""Weights that are made, not read, go to files too: no model takes a rank's own memory."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import TYPE_CHECKING
from uuid import uuid4

from rlhf.disk import naming
from rlhf.distributed.compute import Compute

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Keep = Callable[["Tensor"], "Tensor"]
"""Takes a weight that was made, and returns the one to put in its place."""
INDEX = "model.safetensors.index.json"
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""safetensors' names -> torch's."""


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


@contextmanager
def in_precision(
    directory: Path, dtype: torch.dtype, compute: Compute | None, scratch: Path | None
) -> Iterator[Path]:
    """While open, a directory of this model whose weights are in dtype, so that a CPU maps them.

    If the files are in another dtype, transformers would convert the whole model in the memory of every
    rank. So they are converted into another directory, into files of at most 5 GB. The mappings outlast it.
    One process alone converts in memory, unless it names a place.

    Args:
        compute: of ranks that all load this model at the same time. The first one of each node converts, into
            a temporary directory (TMPDIR).
        scratch: where one process converts.
    """
    together = compute is not None and compute.world_size > 1
    if not (together or scratch) or not any(_is_other(file, dtype) for file in _weights(directory)):
        yield directory
    elif scratch is not None:
        target = scratch / uuid4().hex
        _convert(directory, target, dtype)
        yield target
    else:
        assert compute is not None
        name = f"rlhf-{compute.broadcast(uuid4().hex)}-node{compute.rank // compute.node_ranks}"
        target, converts = Path(gettempdir()) / name, compute.rank % compute.node_ranks == 0
        try:
            if converts:
                with compute.busy():
                    _convert(directory, target, dtype)
            compute.barrier()
            yield target
            compute.barrier()
        finally:
            if converts:
                shutil.rmtree(target, ignore_errors=True)  # on NFS, what is mapped cannot be removed yet


def _weights(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def _is_other(file: Path, dtype: torch.dtype) -> bool:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as weights:
        names = weights.keys()
        found = {weights.get_slice(name).get_dtype() for name in names}
    return any(f"torch.{name}" != str(dtype) for kind, name in FLOATS.items() if kind in found)


def _convert(directory: Path, target: Path, dtype: torch.dtype) -> None:
    """Write a model once more, with its floating-point weights in dtype."""
    from safetensors.torch import load_file, save_file

    from rlhf.training import trained  # of torch

    target.mkdir(mode=0o700)
    for file in directory.iterdir():
        if file.suffix != ".safetensors" and file.name != INDEX:
            (target / file.name).symlink_to(file.resolve())
    places: dict[str, str] = {}
    waiting: dict[str, Tensor] = {}

    def write() -> None:
        name = f"model-{len(set(places.values())):05}.safetensors"
        with naming(target / name):
            save_file(waiting, target / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(waiting, name))
        waiting.clear()

    for file in _weights(directory):
        for name, each in load_file(file).items():
            waiting[name] = each.to(dtype) if each.is_floating_point() else each
            if sum(weight.nbytes for weight in waiting.values()) >= trained.FILE_BYTES:
                write()
    write()
    (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")
