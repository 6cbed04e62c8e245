"""Two ranks read about half of a model each: the benchmark, with a small one."""

from __future__ import annotations

import pytest
from sharded_memory import main


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["fsdp2", "zero3"])
def test_no_rank_of_two_holds_a_whole_model(zero: str) -> None:
    (one,), (first, second) = main(["--model", "small", "--zero", zero])[zero]
    for phase in ("policy", "reference", "reward"):
        share = 0.65 if zero == "zero3" else 0.6  # one of DeepSpeed's buffers is whole on each rank
        assert max(first[phase], second[phase]) <= share * one[phase], phase
        assert first[phase] == pytest.approx(second[phase], rel=0.1), phase
