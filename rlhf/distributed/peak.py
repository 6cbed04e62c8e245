"""Measures the peak memory of the ranks during a stage."""

from __future__ import annotations

from pathlib import Path

import psutil

from rlhf.distributed.compute import Compute
from rlhf.distributed.device import return_freed_memory

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak(compute: Compute) -> bool:
    """Start a new measurement of the peak, without what earlier stages used.

    Returns:
        Whether this system can measure it. macOS cannot, nor a container that must not write to /proc.
    """
    if compute.device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(compute.device)
        return True
    return_freed_memory()
    try:
        CLEAR_REFS.write_text("5", encoding="ascii")  # resets the peak resident size: proc(5)
    except OSError:
        return False
    return True


def peak_bytes(compute: Compute, *, is_measured: bool) -> float | None:
    """Highest peak of all ranks in bytes, since `reset_peak`. None if no rank measured it. All ranks call it.

    On a GPU these are bytes that torch allocated there. Otherwise they are the resident memory of the
    process, with libraries and mapped files.

    Args:
        is_measured: result of `reset_peak`.
    """
    import torch

    own_peak = 0.0
    if is_measured and compute.device.type == "cuda":
        own_peak = float(torch.cuda.max_memory_allocated(compute.device))
    elif is_measured:
        lines = STATUS.read_text(encoding="utf-8").splitlines()
        (line,) = (each for each in lines if each.startswith("VmHWM"))
        own_peak = 1024.0 * int(line.split()[1])
    return float(compute.global_max(torch.tensor(own_peak, dtype=torch.float64))) or None


class PeakMeter:
    """Measures the peak memory of a stage, and of parts of it."""

    def __init__(self, compute: Compute) -> None:
        self.compute, self.largest = compute, 0.0
        self._is_measured = reset_peak(compute)

    def lap(self) -> float | None:
        """The peak since the last call, as `peak_bytes` gives it. All ranks call it."""
        peak = peak_bytes(self.compute, is_measured=self._is_measured)
        self.largest = max(self.largest, peak or 0.0)
        self._is_measured = reset_peak(self.compute)
        return peak

    def total(self) -> float | None:
        """The peak since the start. All ranks call it."""
        self.lap()
        return self.largest or None


def held_bytes(compute: Compute) -> float:
    """Bytes that this rank holds now: on a GPU allocated by torch, else resident memory of the process."""
    if compute.device_name.startswith("cuda"):
        import torch

        return float(torch.cuda.memory_allocated(compute.device))
    return float(psutil.Process().memory_info().rss)
