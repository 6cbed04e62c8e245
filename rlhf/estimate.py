"""Roughly how long a stage will take, from the tokens it pushes through models and the machine's speed."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from rlhf.distributed import Compute, matmul_speed

READ, DECODED = 1.0, 3.0
"""Cost of a token relative to a forward pass; decoding is bound by memory."""
EFFICIENCY = 0.4
"""Share of the matmul peak that a whole stage reaches. All of this is fitted to the demo on two CPU cores."""


class Work(NamedTuple):
    """Tokens, by what is done with them."""

    read: float = 0.0
    trained: float = 0.0
    """In forward passes' worth: tokens times `Method.cost`."""
    decoded: float = 0.0

    def seconds(self, parameters: int, speed: float) -> float:
        """For a model of so many parameters at so many GFLOP/s (2 operations a parameter and token)."""
        passes = READ * self.read + self.trained + DECODED * self.decoded
        return 2 * parameters * passes / (EFFICIENCY * speed * 1e9)


def speed_of(compute: Compute) -> float:
    """The machine's matmul speed in the dtype it computes in, GFLOP/s."""
    return matmul_speed(compute.dtype, compute.device)


def parameters_in(directory: Path) -> int:
    """Parameters of a model directory, from the headers of its weight files."""
    from safetensors import safe_open

    total = 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            total += sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in file.keys())  # noqa: SIM118
    return total
