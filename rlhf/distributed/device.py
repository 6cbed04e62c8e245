"""Detects the device, its precision, memory and speed."""

from __future__ import annotations

import ctypes
import platform
import sys
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator

if TYPE_CHECKING:
    import torch


DRIVERS = ("nvidia*", "nvhost*", "nvmap", "kfd", "dxg")
"""Names under /dev of GPU drivers: NVIDIA's, Jetson's, AMD's, and those of Windows under WSL."""
WARM_UP_SECONDS, MEASURED_SECONDS = 0.05, 0.1
"""Seconds of warm-up and of measurement for `matmul_speed`."""


def has_gpu() -> bool:
    """Whether torch can use a GPU. Without a GPU driver under Linux, does not import torch, which is slow."""
    if sys.platform == "linux" and not any(any(Path("/dev").glob(name)) for name in DRIVERS):
        return False
    import torch

    return torch.cuda.is_available()


def hardware() -> str:
    """This machine in words: processor, threads, GPU."""
    import torch

    gpu = f", {torch.cuda.get_device_name()}" if has_gpu() else ""
    return f"{_processor()}, {torch.get_num_threads()} threads{gpu}"


def _processor() -> str:
    """The processor's name on Linux; its architecture on other systems."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


NO_FP16 = (
    "fp16 is not offered: its range is so small that gradients vanish unless the loss is scaled, which is "
    "not done here. Use auto, bf16 (a GPU from Ampere on, or a CPU that multiplies it) or fp32"
)


def _offered(value: Any) -> Any:
    if value in ("fp16", "float16", "half"):
        raise ValueError(NO_FP16)
    return value


Precision = Annotated[Literal["auto", "bf16", "fp32"], BeforeValidator(_offered)]


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Constants of malloc.h."""


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next tensors.

    By default glibc returns large blocks to the kernel. The kernel then fills them with zeros, page by page,
    when they are needed again. That makes training steps on CPUs much slower (malloc(3), mallopt(3)).
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def return_freed_memory() -> None:
    """Return freed memory to the kernel (malloc_trim(3)): a stage need not hold what an earlier one used."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


CGROUP_ROOT = Path("/sys/fs/cgroup")


def host_memory() -> float:
    """Bytes of host memory that processes can still take: the kernel's available memory, within the limits of
    this process's control groups (of a container or a SLURM job)."""
    import psutil

    cgroups = Path("/proc/self/cgroup").read_text(encoding="utf-8") if CGROUP_ROOT.exists() else ""
    path = cgroups.rpartition("::")[2].strip()
    groups = [CGROUP_ROOT / path.strip("/"), *(CGROUP_ROOT / path.strip("/")).parents]
    group_limits = (cgroup_memory_left(group) for group in groups if group.is_relative_to(CGROUP_ROOT))
    return min(float(psutil.virtual_memory().available), *group_limits)


def cgroup_memory_left(group: Path) -> float:
    """Bytes left in a control group (cgroup v2); infinite without a limit."""
    limit = group / "memory.max"
    if not limit.exists() or (max_bytes := limit.read_text(encoding="utf-8").strip()) == "max":
        return float("inf")
    caches = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
    used = int((group / "memory.current").read_bytes()) - int(caches["inactive_file"])  # can be freed
    return float(int(max_bytes) - used)


def choose_precision(device: str) -> tuple[str, str]:
    """The precision and the reason: bf16 if it is faster than fp32 on this device.

    CPUs with AVX512-BF16 or AMX multiply bf16 several times faster than fp32; other CPUs emulate it. The
    CPU's flags decide, if the system shows them; otherwise a short measurement does. Flags are better: the
    load of the machine must not change the precision, which is part of every artifact's key.

    Args:
        device: `cpu` or `cuda`.
    """
    if device != "cpu":
        import torch

        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "supported") if fast else ("fp32", "this GPU has no bf16, and fp16 is not offered")
    flags = Path("/proc/cpuinfo")
    if flags.exists():
        cpu_flags = set(flags.read_text(encoding="utf-8").split())
        found = sorted(cpu_flags & {"avx512_bf16", "amx_bf16", "bf16"})
        return ("bf16", f"the CPU has {found[0]}") if found else ("fp32", "the CPU has no bf16 instructions")
    import torch

    bf16, fp32 = (matmul_speed(dtype, torch.device(device)) for dtype in (torch.bfloat16, torch.float32))
    return ("bf16" if bf16 > 1.2 * fp32 else "fp32"), f"matmul: bf16 {bf16:.0f}, fp32 {fp32:.0f} GFLOP/s"


def matmul_speed(dtype: torch.dtype, device: torch.device) -> float:
    """Median speed of square matrix products, in GFLOP/s. Excludes the warm-up, in which threads start and
    clocks rise."""
    import torch

    size = 768 if device.type == "cpu" else 8192
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def time_once() -> float:
        start = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    def times_for(seconds: float) -> list[float]:
        end, times = time.perf_counter() + seconds, [time_once()]
        while time.perf_counter() < end:
            times.append(time_once())
        return times

    time_once()  # loads the library, which on a GPU is slow
    times_for(WARM_UP_SECONDS)
    return 2 * size**3 / median(times_for(MEASURED_SECONDS)) / 1e9
