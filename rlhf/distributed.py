"""Device, dtype and the accelerator; sums over all ranks."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from rlhf.config import ConfigError

Precision = Literal["auto", "bf16", "fp32"]


@dataclass(frozen=True)
class Compute:
    """What the stages compute with."""

    accelerator: Accelerator
    dtype: torch.dtype
    """Of weights and activations; optimizers keep fp32 masters."""

    @property
    def device(self) -> torch.device:
        """Where this rank's tensors live."""
        device: torch.device = self.accelerator.device
        return device

    def global_sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over ranks."""
        total: Tensor = self.accelerator.reduce(values.to(self.device), reduction="sum")
        return total.to(values.device)


def make_compute(device: Literal["auto", "cpu"], precision: Precision) -> tuple[Compute, str]:
    """Set up the accelerator; the second value says which precision was taken and why."""
    accelerator = Accelerator(cpu=device == "cpu" or not torch.cuda.is_available())
    if accelerator.num_processes > 1:
        raise ConfigError(
            f"{accelerator.num_processes} processes: this version trains on one device only. "
            "Start it as one process: python -m rlhf ..."
        )
    name, reason = (
        (precision, "as configured") if precision != "auto" else choose_precision(accelerator.device)
    )
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
    return Compute(accelerator, dtype), f"{name} on {accelerator.device.type} ({reason})"


def choose_precision(device: torch.device) -> tuple[str, str]:
    """bf16 where it is the faster one.

    CPUs with AVX512-BF16 or AMX multiply bf16 several times faster than fp32; others emulate it. The flags
    decide where the system tells them, so that a busy moment cannot change the precision, which is part of
    every artifact's key; elsewhere a short measurement does.
    """
    if device.type != "cpu":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "supported") if fast else ("fp32", "no bf16 on this GPU")
    flags = Path("/proc/cpuinfo")
    if flags.exists():
        words = set(flags.read_text().split())
        found = sorted(words & {"avx512_bf16", "amx_bf16", "bf16"})
        return ("bf16", f"the CPU has {found[0]}") if found else ("fp32", "the CPU has no bf16 instructions")
    bf16, fp32 = (matmul_speed(dtype, device) for dtype in (torch.bfloat16, torch.float32))
    return ("bf16" if bf16 > 1.2 * fp32 else "fp32"), f"matmul: bf16 {bf16:.0f}, fp32 {fp32:.0f} GFLOP/s"


def matmul_speed(dtype: torch.dtype, device: torch.device) -> float:
    """Best of a few square matrix products, in GFLOP/s; takes some ten milliseconds."""
    size = 768 if device.type == "cpu" else 8192
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):  # the first one warms up
        start = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9
