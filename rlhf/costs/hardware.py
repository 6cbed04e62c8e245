"""The hardware, of this machine or planned. Speed is measured once and saved."""

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
"""Bytes of NCCL's buffers on a GPU, if there are several ranks: assumed."""
CUDA_PROCESS = 2.0 * GIB
"""Bytes that a CUDA process holds in the host's memory: assumed."""
LIBRARIES = 0.25 * GIB
"""Bytes that torch, oneDNN and other libraries take on a CPU, without tensors."""
CALIBRATION_SECONDS = 10.0
STREAM_BYTES = 2**28
LOAD_BYTES = 0.3e9
"""Bytes per second that are read from or written to a disk that was not measured."""


@dataclass(frozen=True)
class Speed:
    """The speed of one rank."""

    gflops: float
    """Speed of matrix products in the run's precision, GFLOP/s."""
    gbytes: float
    """Memory bandwidth, read and written, GB/s."""


@dataclass(frozen=True)
class Machine:
    """One rank's part of the hardware, and how many ranks there are."""

    kind: Literal["cpu", "cuda"]
    name: str
    memory: float
    """Bytes that a rank may use: its GPU's memory, or its share of the host's."""
    host_memory: float
    """Bytes of host memory that a rank with a GPU may use; 0 on CPUs."""
    used: float
    """Bytes that a process holds before it loads a model."""
    ranks: int
    speed: Speed
    ranks_here: int = 1
    """Ranks that share this host's memory."""
    host_used: float = 0.0
    """Bytes of host memory that a process with a GPU holds before it loads a model."""
    disk: float = LOAD_BYTES
    """Bytes per second that a host reads from or writes to disk."""
    link: float = math.inf
    """Bytes per second that a rank receives from ranks of its host; infinite: not counted."""
    network: float = math.inf
    """Bytes per second that a rank receives from other hosts; infinite: not counted."""

    @property
    def nodes(self) -> int:
        """Number of hosts."""
        return max(1, self.ranks // self.ranks_here)


def local_machine(compute: Compute, speed: Speed) -> Machine:
    """The machine that this rank runs on, with its free memory."""
    import torch

    ranks, ranks_here = compute.world_size, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    host = host_memory() / ranks_here
    if compute.device.type == "cuda":
        torch.cuda.empty_cache()  # the calibration's matrices
        free, _ = torch.cuda.mem_get_info(compute.device)  # without this process's CUDA context
        used = NCCL_BUFFERS if ranks > 1 else 0.0  # taken when ranks first communicate
        return Machine("cuda", hardware(), float(free), host, used, ranks, speed, ranks_here)
    used = float(psutil.Process().memory_info().rss)
    return Machine("cpu", hardware(), host + used, 0.0, used + LIBRARIES, ranks, speed, ranks_here)


def quick_speed(compute: Compute) -> Speed:
    """A rough measurement of some hundred milliseconds, made once per process."""
    return _first_guess(compute.dtype, compute.device)


@cache
def _first_guess(dtype: torch.dtype, device: torch.device) -> Speed:
    return Speed(matmul_speed(dtype, device), stream_speed(device))


def stream_speed(device: torch.device) -> float:
    """Memory bandwidth, read and written, GB/s: the fastest of a few additions to a large tensor."""
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
    """The saved speed of this machine and precision; else measure for ten seconds and save it."""
    saved = saved_speed(compute, directory)
    if saved is not None:
        return saved
    speeds, end = [], time.monotonic() + CALIBRATION_SECONDS
    while time.monotonic() < end:
        speeds.append(Speed(matmul_speed(compute.dtype, compute.device), stream_speed(compute.device)))
    speed = Speed(max(each.gflops for each in speeds), max(each.gbytes for each in speeds))
    path = _speed_file(compute, directory)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps({"machine": hardware(), **asdict(speed)}))
    return speed


def saved_speed(compute: Compute, directory: Path) -> Speed | None:
    """The speed that an earlier calibration of this machine saved; None if there is none."""
    path = _speed_file(compute, directory)
    if not path.exists():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    return Speed(values["gflops"], values["gbytes"])


def _speed_file(compute: Compute, directory: Path) -> Path:
    name = digest_of([hardware(), str(compute.dtype), compute.device.type])[:16]
    return directory / "speeds" / f"{name}.json"
