"""The largest memory that a rank held while a stage ran."""

from __future__ import annotations

from pathlib import Path

from rlhf.distributed.compute import Compute

STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def forget_peak(compute: Compute) -> None:
    """Begin to measure."""
    if compute.device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(compute.device)
    elif FORGET.exists():
        FORGET.write_text("5", encoding="ascii")  # the largest resident size: proc(5)


def peak_bytes(compute: Compute) -> float | None:
    """Since `forget_peak`, of the rank that held most: on a GPU what torch allocated there; else the resident
    memory of the process, with libraries and mapped files. None where no system tells it, as on macOS."""
    import torch

    if compute.device.type == "cuda":
        found = float(torch.cuda.max_memory_allocated(compute.device))
    elif STATUS.exists():
        lines = STATUS.read_text(encoding="utf-8").splitlines()
        (line,) = (each for each in lines if each.startswith("VmHWM"))
        found = 1024.0 * int(line.split()[1])
    else:
        return None
    return float(compute.global_max(torch.tensor(found, dtype=torch.float64)))
