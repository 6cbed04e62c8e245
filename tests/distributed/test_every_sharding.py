"""GRPO and DPO with every zero= on two ranks: figures and published weights are those of one rank."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file

from helpers.jobs import on_cpu
from helpers.models import write_reward
from helpers.sharded_stages import ALGORITHMS, RESUMED, go_through, run_stage, write_data
from helpers.spawned import start_ranks
from rlhf.distributed.compute import Zero

CASES = [(zero, algorithm) for zero in get_args(Zero) for algorithm in ALGORITHMS]


@pytest.mark.slow
def test_two_ranks_make_what_one_makes(tiny_model: Path, tmp_path: Path) -> None:
    """GRPO's reward is the lower of two, normalised ones: a function's, which gives some answers no score,
    and a model's. Stopped and resumed, sampled from layer by layer, it is the same bit for bit."""
    (tmp_path / "tiny").symlink_to(tiny_model)
    write_reward(tmp_path / "judged", tiny_model)
    write_data(tmp_path / "data")
    wait = start_ranks(go_through, 2, CASES, tmp_path, timeout=90, seconds=600)
    expected = {
        algorithm: run_stage(on_cpu(), algorithm, tmp_path / f"one-{algorithm}", tmp_path / "tiny")
        for algorithm in ALGORITHMS
    }
    assert abs(expected["grpo"]["kl"]) > 1e-3
    assert expected["dpo"]["margin"] > 0.01 and expected["dpo"]["best_step"] > 0
    for rank, cases in wait().items():
        assert isinstance(cases, dict), f"rank {rank}: {cases}"
        assert cases.pop(RESUMED) == cases["fsdp2", "grpo"], rank
        assert list(cases) == CASES
        for case, figures in cases.items():
            assert figures == pytest.approx(expected[case[1]], rel=1e-3, abs=1e-4), (rank, case)
    for zero, algorithm in CASES:
        weights, found = (
            load_file(tmp_path / name / "artifact" / "model.safetensors")
            for name in (f"one-{algorithm}", f"{zero}-{algorithm}")
        )
        for name, weight in weights.items():
            assert torch.allclose(found[name], weight, rtol=0, atol=1e-5), (zero, algorithm, name)
    through, resumed = (
        load_file(tmp_path / name / "artifact" / "model.safetensors") for name in ("fsdp2-grpo", "resumed")
    )
    assert all(torch.equal(resumed[name], weight) for name, weight in through.items())
