"""Device, precision and hardware."""

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
WARMING_SECONDS, MULTIPLYING_SECONDS = 0.05, 0.1
"""Of a measurement of the speed."""


def has_gpu() -> bool:
    """What `torch.cuda.is_available()` says. If Linux has no GPU driver, the answer is no without importing
    torch, which takes a second."""
    if sys.platform == "linux" and not any(any(Path("/dev").glob(name)) for name in DRIVERS):
        return False
    import torch

    return torch.cuda.is_available()


def hardware() -> str:
    """This machine: processor, threads, GPU."""
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
"""Of malloc.h."""


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next tensors.

    By default glibc returns large blocks to the kernel. The kernel then fills them with zeros, page by page,
    when they are needed again. This took a quarter of a training step on CPUs (malloc(3), mallopt(3)).
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def return_freed_memory() -> None:
    """Give the kernel back what `keep_freed_memory` kept: between stages, so that one does not hold
    what another needed (malloc_trim(3)).
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


GROUPS = Path("/sys/fs/cgroup")


def host_memory() -> float:
    """Bytes that processes here can still take: what the kernel can free, within the limits of this process's
    control groups (a container's, a SLURM job's)."""
    import psutil

    listed = Path("/proc/self/cgroup").read_text(encoding="utf-8") if GROUPS.exists() else ""
    path = listed.rpartition("::")[2].strip()
    groups = [GROUPS / path.strip("/"), *(GROUPS / path.strip("/")).parents]
    rooms = (room_in(group) for group in groups if group.is_relative_to(GROUPS))
    return min(float(psutil.virtual_memory().available), *rooms)


def room_in(group: Path) -> float:
    """Bytes left in a control group (version 2); infinite without a limit."""
    limit = group / "memory.max"
    if not limit.exists() or (most := limit.read_text(encoding="utf-8").strip()) == "max":
        return float("inf")
    caches = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
    held = int((group / "memory.current").read_bytes()) - int(caches["inactive_file"])  # given up when asked
    return float(int(most) - held)


def choose_precision(device: str) -> tuple[str, str]:
    """bf16 if it is faster than fp32 here.

    CPUs with AVX512-BF16 or AMX multiply bf16 several times faster than fp32; other CPUs emulate it. The
    CPU's flags decide, if the system shows them: a busy moment must not change the precision, because it is
    part of every artifact's key. Otherwise a short measurement decides.
    """
    if device != "cpu":
        import torch

        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "supported") if fast else ("fp32", "this GPU has no bf16, and fp16 is not offered")
    flags = Path("/proc/cpuinfo")
    if flags.exists():
        words = set(flags.read_text(encoding="utf-8").split())
        found = sorted(words & {"avx512_bf16", "amx_bf16", "bf16"})
        return ("bf16", f"the CPU has {found[0]}") if found else ("fp32", "the CPU has no bf16 instructions")
    import torch

    bf16, fp32 = (matmul_speed(dtype, torch.device(device)) for dtype in (torch.bfloat16, torch.float32))
    return ("bf16" if bf16 > 1.2 * fp32 else "fp32"), f"matmul: bf16 {bf16:.0f}, fp32 {fp32:.0f} GFLOP/s"


def matmul_speed(dtype: torch.dtype, device: torch.device) -> float:
    """The median of square matrix products during a tenth of a second, in GFLOP/s. The first ones, in which
    threads start and clocks rise, are left out."""
    import torch

    size = 768 if device.type == "cpu" else 8192
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def take() -> float:
        start = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    def take_for(seconds: float) -> list[float]:
        end, found = time.perf_counter() + seconds, [take()]
        while time.perf_counter() < end:
            found.append(take())
        return found

    take()  # it loads the library, which on a GPU takes longer than all that follows
    take_for(WARMING_SECONDS)
    return 2 * size**3 / median(take_for(MULTIPLYING_SECONDS)) / 1e9
