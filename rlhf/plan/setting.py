"""Where a stage would run, with which model and on how much data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.data.prepared import Lengths
from rlhf.data.schema import Role, Split
from rlhf.distributed import Compute, Zero
from rlhf.plan.machine import Machine, found_machine, kept_speed, quick_speed
from rlhf.plan.shape import Shape

if TYPE_CHECKING:
    from rlhf.experiment import Settings

Sizes = Callable[[Role, Split], Lengths]
GIB = 2**30
LARGEST_BATCH = 2.5
"""Standard deviations by which the largest of some hundred batches passes the mean one."""


@dataclass(frozen=True)
class Setting:
    """All that demands are computed from, beside a stage's own knobs."""

    shape: Shape
    dtype_bytes: int
    zero: Zero
    machine: Machine
    sizes: Sizes
    vllm_cache: float | None = None
    """Bytes of vLLM's cache where that samples."""

    @property
    def on_cpu(self) -> bool:
        """Tensors are in the host's memory."""
        return self.machine.kind == "cpu"

    @property
    def ranks(self) -> int:
        """Over all nodes."""
        return self.machine.ranks

    @property
    def shards_weights(self) -> bool:
        """No rank has the whole model."""
        return self.zero in ("zero3", "zero3_offload", "fsdp2")

    def pass_tokens(self, rows: float, lengths: Lengths, most: int) -> float:
        """Tokens of a rank's largest forward pass, where so many rows are a batch over all ranks."""
        mine = rows / self.ranks
        batch = mine * lengths.mean + LARGEST_BATCH * math.sqrt(mine) * lengths.deviation
        return max(float(lengths.longest), min(float(most), batch))

    def passes(self, rows: float, lengths: Lengths, most: int) -> int:
        """Forward passes that a rank takes for a batch."""
        tokens = rows / self.ranks * lengths.mean
        return max(1, math.ceil(tokens / max(1.0, self.pass_tokens(rows, lengths, most))))


def found_setting(settings: Settings, shape: Shape, compute: Compute, sizes: Sizes) -> Setting:
    """This run's, with the base model's shape."""
    speed = kept_speed(compute, Path(settings.store_dir)) or quick_speed(compute)
    return Setting(
        shape=shape,
        dtype_bytes=compute.dtype.itemsize,
        zero=settings.zero,
        machine=found_machine(compute, speed),
        sizes=sizes,
        vllm_cache=vllm_cache(settings),
    )


def vllm_cache(settings: Settings) -> float | None:
    """Bytes, where vLLM samples."""
    return settings.vllm.kv_cache_gib * GIB if settings.generation == "vllm" else None
