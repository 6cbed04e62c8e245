"""The largest memory that a rank held while a stage ran."""

from __future__ import annotations

from pathlib import Path

from rlhf.distributed.compute import Compute

STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
TOLERANCE = 32 * 2**20  # bytes; a system may add up late what its cores count apart


def forget_peak(compute: Compute) -> bool:
    """Begin to measure.

    Returns:
        Whether this system can: not macOS, nor a container that must not write to /proc, nor a system that
        takes the order and keeps the old peak.
    """
    if compute.device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(compute.device)
        return True
    try:
        FORGET.write_text("5", encoding="ascii")  # the largest resident size: proc(5)
    except OSError:
        return False
    return _of_the_process("VmHWM") - _of_the_process("VmRSS") < TOLERANCE


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
        found = _of_the_process("VmHWM")
    return float(compute.global_max(torch.tensor(found, dtype=torch.float64))) or None


def _of_the_process(field: str) -> float:
    """In bytes."""
    lines = STATUS.read_text(encoding="utf-8").splitlines()
    (line,) = (each for each in lines if each.startswith(field))
    return 1024.0 * int(line.split()[1])
