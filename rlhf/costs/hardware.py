"""The hardware, found here or planned. Its speed is measured once and kept."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil

from rlhf.digests import digest_of
from rlhf.disk import replace_text
from rlhf.distributed.compute import Compute
from rlhf.distributed.device import hardware, host_memory, matmul_speed

if TYPE_CHECKING:
    import torch

GIB = 2**30
CUDA_CONTEXT = 0.6 * GIB
"""Bytes that a CUDA process holds before its first tensor."""
NCCL_BUFFERS = 1.0 * GIB
"""Bytes that NCCL holds on a GPU for what ranks send each other, where there are several: assumed."""
CUDA_PROCESS = 2.0 * GIB
"""Bytes that it holds in the host's memory: assumed."""
LIBRARIES = 0.25 * GIB
"""Bytes that torch, oneDNN and others take on a CPU, apart from tensors."""
CALIBRATION_SECONDS = 10.0
STREAM_BYTES = 2**28
LOAD_BYTES = 0.3e9
"""A second, of what is read from and written to a disk that was not measured."""


@dataclass(frozen=True)
class Speed:
    """The speed of one rank."""

    gflops: float
    """GFLOP/s of matrix products in the run's precision."""
    gbytes: float
    """GB/s of memory that is read and written."""


@dataclass(frozen=True)
class Machine:
    """One rank's part of the hardware, and how many ranks there are."""

    kind: Literal["cpu", "cuda"]
    name: str
    memory: float
    """Bytes that a rank may use: of its GPU, or its share of the host's."""
    host_memory: float
    """Bytes of host memory that a rank may use beside its GPU; 0 on CPUs."""
    used: float
    """Bytes that a process holds before it loads a model."""
    ranks: int
    speed: Speed
    ranks_here: int = 1
    """Ranks that share this host's memory."""
    host_used: float = 0.0
    """Bytes of the host's memory that a process on a GPU holds before it loads a model."""
    disk: float = LOAD_BYTES
    """Bytes a second that a host reads or writes."""
    link: float = math.inf
    """Bytes a second that a rank gets from others on its host; infinite where it is not counted."""
    network: float = math.inf
    """Bytes a second that a rank gets from other hosts; infinite where it is not counted."""

    @property
    def nodes(self) -> int:
        """Hosts with so many ranks."""
        return max(1, self.ranks // self.ranks_here)


def found_machine(compute: Compute, speed: Speed) -> Machine:
    """This rank's machine."""
    import torch

    ranks, ranks_here = compute.world_size, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    host = host_memory() / ranks_here
    if compute.device.type == "cuda":
        torch.cuda.empty_cache()  # of what the calibration multiplied
        free, _ = torch.cuda.mem_get_info(compute.device)  # beside this process's context
        used = NCCL_BUFFERS if ranks > 1 else 0.0  # which it takes when ranks first talk
        return Machine("cuda", hardware(), float(free), host, used, ranks, speed, ranks_here)
    used = float(psutil.Process().memory_info().rss)
    return Machine("cpu", hardware(), host + used, 0.0, used + LIBRARIES, ranks, speed, ranks_here)


def quick_speed(compute: Compute) -> Speed:
    """A first guess, in some hundred milliseconds, once in a process."""
    return _first_guess(compute.dtype, compute.device)


@cache
def _first_guess(dtype: torch.dtype, device: torch.device) -> Speed:
    return Speed(matmul_speed(dtype, device), stream_speed(device))


def stream_speed(device: torch.device) -> float:
    """The best of a few additions to a large tensor, in GB/s read and written."""
    import torch

    x = torch.zeros(STREAM_BYTES // 4, device=device)
    best = float("inf")
    for _ in range(4):  # the first one warms up
        start = time.perf_counter()
        x.add_(1.0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * STREAM_BYTES / best / 1e9


def calibrated_speed(compute: Compute, directory: Path) -> Speed:
    """Measure for ten seconds, and keep the result for this machine and precision."""
    kept = kept_speed(compute, directory)
    if kept is not None:
        return kept
    found, end = [], time.monotonic() + CALIBRATION_SECONDS
    while time.monotonic() < end:
        found.append(Speed(matmul_speed(compute.dtype, compute.device), stream_speed(compute.device)))
    speed = Speed(max(each.gflops for each in found), max(each.gbytes for each in found))
    path = _speed_file(compute, directory)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps({"machine": hardware(), **asdict(speed)}))
    return speed


def kept_speed(compute: Compute, directory: Path) -> Speed | None:
    """What an earlier calibration of this machine found."""
    path = _speed_file(compute, directory)
    if not path.exists():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    return Speed(values["gflops"], values["gbytes"])


def _speed_file(compute: Compute, directory: Path) -> Path:
    name = digest_of([hardware(), str(compute.dtype), compute.device.type])[:16]
    return directory / "speeds" / f"{name}.json"
