"""The peak memory of a stage: of that stage alone, and no figure where the system tells none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.jobs import on_cpu
from rlhf.distributed import peak
from rlhf.distributed.device import keep_freed_memory

LARGE = 400 * 2**20


def test_it_is_of_what_came_after_the_beginning() -> None:
    keep_freed_memory()  # as every stage does
    compute = on_cpu()
    assert peak.reset_peak(compute)
    before = peak.peak_bytes(compute, is_measured=True)
    held = torch.ones(LARGE, dtype=torch.uint8)
    after = peak.peak_bytes(compute, is_measured=True)
    assert before is not None and after is not None and after - before > LARGE / 2
    del held
    peak.reset_peak(compute)
    again = peak.peak_bytes(compute, is_measured=True)
    assert again is not None and after - again > LARGE / 2


def test_where_it_cannot_begin_there_is_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "CLEAR_REFS", tmp_path)  # a directory: nobody can write to it
    assert not peak.reset_peak(on_cpu())
    assert peak.peak_bytes(on_cpu(), is_measured=False) is None
