"""Two ranks take about half of what one takes, in every phase of a stage: the benchmark, smaller."""

from __future__ import annotations

import pytest
from sharded_memory import main


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["fsdp2", "zero3"])
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_no_rank_of_two_holds_a_whole_model(stage: str, zero: str) -> None:
    words = ["--model", "small", "--zero", zero, "--stages", stage, "--generation", "layers"]
    (one,), (first, second) = main(words)[f"{stage} {zero}"]
    assert {"loading", "reading", "learning", "checkpointing", "publishing"} <= one.keys()
    for phase in one:
        assert max(first[phase], second[phase]) <= 0.6 * one[phase], phase
        assert first[phase] == pytest.approx(second[phase], rel=0.1), phase
