"""The largest memory that a rank held while a stage ran."""

from __future__ import annotations

from pathlib import Path

import psutil

from rlhf.distributed.compute import Compute
from rlhf.distributed.device import return_freed_memory

STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def forget_peak(compute: Compute) -> bool:
    """Begin to measure. What earlier stages left behind is not counted.

    Returns:
        Whether this system can: not macOS, nor a container that must not write to /proc.
    """
    if compute.device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(compute.device)
        return True
    return_freed_memory()
    try:
        FORGET.write_text("5", encoding="ascii")  # the largest resident size: proc(5)
    except OSError:
        return False
    return True


def peak_bytes(compute: Compute, *, is_measured: bool) -> float | None:
    """Since `forget_peak`, of the rank that held most: on a GPU what torch allocated there; else the resident
    memory of the process, with libraries and mapped files. None if no rank measured it. All ranks call it.

    Args:
        is_measured: what `forget_peak` returned.
    """
    import torch

    found = 0.0
    if is_measured and compute.device.type == "cuda":
        found = float(torch.cuda.max_memory_allocated(compute.device))
    elif is_measured:
        lines = STATUS.read_text(encoding="utf-8").splitlines()
        (line,) = (each for each in lines if each.startswith("VmHWM"))
        found = 1024.0 * int(line.split()[1])
    return float(compute.global_max(torch.tensor(found, dtype=torch.float64))) or None


def held_bytes(compute: Compute) -> float:
    """What this rank holds now: on a GPU what torch allocated there; else the process's resident memory."""
    if compute.device_name.startswith("cuda"):
        import torch

        return float(torch.cuda.memory_allocated(compute.device))
    return float(psutil.Process().memory_info().rss)
