"""Four ranks come to what one rank comes to, in every stage: the benchmark, with three ways to shard. With
hsdp they are two nodes of two."""

from __future__ import annotations

import pytest
from many_ranks import main


@pytest.mark.slow
def test_every_stage_on_four_ranks_equals_one_rank() -> None:
    found = main(["--ranks", "4", "--zero", "fsdp2", "zero3", "hsdp"])
    assert found.keys() == {"fsdp2", "zero3", "hsdp"}
    for zero, differences in found.items():
        for what, difference in differences.items():
            assert difference <= 1e-5, f"{zero}: {what}"
