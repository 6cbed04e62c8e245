"""Ranks whose rows are of other lengths call every sharded module equally often: none waits for ever, and all
of it is what one rank computes. DeepSpeed gathers the output layer at most twice in a micro-batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.jobs import on_cpu
from helpers.models import write_reward
from helpers.ranks import Case, all_stages, go_through, write_large
from helpers.spawned import start_ranks
from rlhf.distributed.compute import Zero

RANKS = 4
SHARDED: list[Zero] = ["zero3", "fsdp2"]
CASES = [
    *(Case(zero, "auto", "whole", "large") for zero in SHARDED),
    *(Case(zero, "auto", "layers", "tiny") for zero in SHARDED),
    *(Case(zero, "sharded", "layers", "tied") for zero in SHARDED),
    Case("zero2", "sharded", "whole", "large"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """tiny: no matrix is above DeepSpeed's threshold; large and tied: all are. Each with a reward model."""
    directory = tmp_path_factory.mktemp("models")
    (directory / "tiny").symlink_to(tiny_model)
    write_large(directory / "large", tiny_model, is_tied=False)
    write_large(directory / "tied", tiny_model, is_tied=True)
    for name in ("tiny", "large", "tied"):
        write_reward(directory / f"{name}-reward", directory / name)
    return directory


@pytest.mark.slow
def test_uneven_rows_give_what_one_rank_computes(models: Path, tmp_path: Path) -> None:
    wait = start_ranks(go_through, RANKS, CASES, models, tmp_path, timeout=90, seconds=600)
    expected = {
        name: all_stages(on_cpu(), models / name, models / f"{name}-reward", "replicated", tmp_path / name)
        for name in ("tiny", "large", "tied")
    }
    found = wait()
    for rank, cases in found.items():
        assert isinstance(cases, dict), f"rank {rank}: {cases}"
        sums, decayed = cases.pop("sums"), cases.pop("decayed")
        for zero, weights in decayed.items():  # matrices alone, whatever a rank holds of them
            assert weights == pytest.approx(decayed["none"], rel=1e-5), zero
        total = torch.tensor(1 + (RANKS - 1) / 512)
        in_fp32 = dict.fromkeys(sums, 8 * float(total))
        in_fp32 |= dict.fromkeys(
            ("zero1", "fsdp2", "hsdp"), 8 * float(total.bfloat16())
        )  # rounded behind the sum
        assert sums == pytest.approx(in_fp32, rel=1e-6)
        assert list(cases) == CASES
        for case, figures in cases.items():
            wanted = expected[case.model]
            assert figures == pytest.approx(wanted, rel=1e-3, abs=1e-4), (rank, case)
            first = [name for name in wanted if name.endswith((" 0", " all"))]  # before any step
            assert {name: figures[name] for name in first} == pytest.approx(
                {name: wanted[name] for name in first}, rel=1e-5, abs=1e-5
            ), (rank, case)
