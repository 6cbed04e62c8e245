"""What there is to compute with."""

from __future__ import annotations

import math
from pathlib import Path

import psutil
import pytest

from helpers.jobs import on_cpu
from rlhf.costs.hardware import LIBRARIES, NCCL_BUFFERS, Speed, local_machine
from rlhf.distributed.compute import Compute
from rlhf.distributed.device import cgroup_memory_left, host_memory


def test_a_control_group_counts_what_the_kernel_would_not_give_up(tmp_path: Path) -> None:
    assert math.isinf(cgroup_memory_left(tmp_path))
    (tmp_path / "memory.max").write_text("max\n")
    assert math.isinf(cgroup_memory_left(tmp_path))
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 250\n")
    assert cgroup_memory_left(tmp_path) == 1000 - (700 - 250)


def test_a_rank_on_a_cpu_may_have_what_is_left_and_what_it_has() -> None:
    machine = local_machine(on_cpu(), Speed(1.0, 1.0))
    own = psutil.Process().memory_info().rss
    assert 0.5 * own < machine.used - LIBRARIES < 2 * own
    assert machine.used < machine.memory <= psutil.virtual_memory().total
    assert machine.memory - own <= 1.5 * host_memory() and machine.host_memory == 0.0


def test_of_a_gpu_a_rank_may_have_what_is_free_once_the_calibration_has_given_back_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch keeps what it has freed, and the driver counts this process's context as taken."""
    free = 6e9

    def give_back() -> None:
        nonlocal free
        free += 1e9

    monkeypatch.setattr("torch.cuda.empty_cache", give_back)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (free, 8e9))
    machine = local_machine(Compute("cuda", "bfloat16"), Speed(1.0, 1.0))
    assert (machine.memory, machine.used) == (7e9, 0.0)
    among_others = local_machine(Compute("cuda", "bfloat16", world_size=2), Speed(1.0, 1.0))
    assert among_others.used == NCCL_BUFFERS  # which nothing holds before ranks talk
