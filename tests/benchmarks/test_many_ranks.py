"""Four ranks come to what one rank comes to, in every stage: the benchmark, with three ways to shard. With
hsdp they are two nodes of two, which torchrun starts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import IO, Any

import many_ranks
import pytest

from helpers.warm import Command


@pytest.mark.slow
def test_every_stage_on_four_ranks_equals_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ranks are forked; those of torchrun are started cold, as the benchmark starts all."""
    cold = many_ranks.start

    def start(words: list[str], directory: Path, environment: dict[str, str], log: IO[str]) -> Any:
        if words[0] != sys.executable:
            return cold(words, directory, environment, log)
        return Command(words[3:], cwd=directory, environment=environment, log=log)

    monkeypatch.setattr(many_ranks, "start", start)
    found = many_ranks.main(["--ranks", "4", "--zero", "fsdp2", "zero3", "hsdp"])
    assert found.keys() == {"fsdp2", "zero3", "hsdp"}
    for zero, differences in found.items():
        for what, difference in differences.items():
            assert difference <= 1e-5, f"{zero}: {what}"
