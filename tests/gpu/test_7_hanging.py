"""A rank that hangs is named, over NCCL on GPUs and over gloo on CPUs."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from helpers.chains import RealChain, ranks_of

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
RANKS = 2


def test_a_time_out_names_the_missing_rank(tmp_path: Path, on_gpu: bool) -> None:
    if on_gpu and torch.cuda.device_count() < RANKS:
        pytest.skip("needs CUDA and two GPUs: NCCL refuses two ranks of a group on one")
    device = "auto" if on_gpu else "cpu"
    overrides = (
        f"device={device}", f"launch.processes={RANKS}", "stage=sft", "sft.epochs=300",
        "checkpoint.every_steps=1", "distributed.timeout=20",
    )  # fmt: skip
    process = RealChain(tmp_path).start_until("sft", 1, "hangs", *overrides)
    ranks = ranks_of(process.pid)
    assert sorted(ranks) == [0, 1], process.communicate(timeout=120)
    os.kill(ranks[1], signal.SIGSTOP)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "rank 0 waited for rank 1 (last seen " in err, err
