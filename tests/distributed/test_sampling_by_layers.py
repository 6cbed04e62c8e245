"""Models that do not train, sharded: ranks with uneven rows, one row or none say what one rank says, whether
the local engine gathers the weights whole or layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.jobs import on_cpu
from helpers.models import write_reward
from helpers.ranks import write_large
from helpers.sampled import Case, go_through
from helpers.spawned import start_ranks

CASES = [
    Case("zero3", "whole", "large"), Case("zero3", "layers", "large"), Case("zero3", "layers", "tied"),
    Case("fsdp2", "whole", "large"), Case("fsdp2", "layers", "large"), Case("fsdp2", "layers", "tied"),
]  # fmt: skip


def close(found: Any, wanted: Any) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        is_text = name.startswith(("texts", "answer"))
        assert found[name] == (value if is_text else pytest.approx(value, rel=1e-4, abs=1e-4)), name


@pytest.mark.slow
def test_four_ranks_say_what_one_rank_says(tmp_path: Path, tiny_model: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    for name in ("large", "tied"):
        write_large(models / name, tiny_model, is_tied=name == "tied")
        write_reward(models / f"{name}-reward", models / name)
    wait = start_ranks(go_through, 4, CASES, models, tmp_path / "ranks", timeout=60, seconds=400)
    alone = [Case("none", "whole", name) for name in ("large", "tied")]
    expected = {case.model: said for case, said in go_through(on_cpu(), alone, models, tmp_path).items()}
    for rank, cases in wait().items():
        assert isinstance(cases, dict), f"rank {rank}: {cases}"
        assert list(cases) == CASES
        for case, said in cases.items():
            close(said, expected[case.model])
