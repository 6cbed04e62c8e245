"""Where these checks run: on the first GPU; without one on the CPU, smaller, so that they are known to work.

Each has a number to reach. `reaches` notes it beside what was found; the run ends with a table of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers.gpu import OneRank, Reaches
from rlhf.distributed.compute import Compute, Zero, leave_group, make_compute
from rlhf.distributed.device import hardware, has_gpu

FIGURES = "figures"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The one that all checks use."""
    return torch.device("cuda", 0) if has_gpu() else torch.device("cpu")


@pytest.fixture(scope="session")
def on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


@pytest.fixture
def reaches(record_property: Callable[[str, object], None]) -> Reaches:
    def check(what: str, value: float, *, at_most: float = math.inf, at_least: float = -math.inf) -> None:
        bounds = [f"at least {at_least:g}"] * (at_least > -math.inf) + [f"at most {at_most:g}"] * (
            at_most < math.inf
        )
        record_property(FIGURES, f"{what}: {value:.3g} ({', '.join(bounds) or 'recorded'})")
        assert at_least <= value <= at_most, f"{what}: {value} is not {' and '.join(bounds)}"

    return check


@pytest.fixture(scope="module")
def one_rank(device: torch.device) -> Iterator[OneRank]:
    """One rank with a group of its own, over NCCL on a GPU and gloo on a CPU: by `zero=` and precision."""
    joined, _ = make_compute("auto" if device.type == "cuda" else "cpu", "fp32", "zero1")

    def compute(zero: Zero, dtype: str) -> Compute:
        return replace(joined, device_name=str(device), zero=zero, dtype_name=dtype)

    yield compute
    leave_group(joined)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What each check reached, and on what."""
    reports = [report for name in ("passed", "failed") for report in terminalreporter.getreports(name)]
    found = [
        (report.nodeid.rpartition("/")[2], value)
        for report in reports
        for name, value in report.user_properties
        if name == FIGURES
    ]
    if found and terminalreporter.config.option.markexpr == "gpu":
        terminalreporter.section(f"reached on {hardware()}")
        for check, figure in found:
            terminalreporter.write_line(f"{check}  {figure}")
