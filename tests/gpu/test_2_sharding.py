"""Every `zero=` on one rank, over NCCL on a GPU and gloo on a CPU, against whole models in fp32 on the CPU.

Each matrix has more elements than those that DeepSpeed never shards. Passes of all stages: sft, reward, ppo.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers import ranks
from helpers.gpu import OneRank, Reaches
from helpers.jobs import on_cpu
from helpers.models import write_reward
from rlhf.distributed.compute import Zero

pytestmark = pytest.mark.gpu
ENGINES: dict[Zero, str] = {
    "none": "replicated", "zero1": "sharded", "zero2": "sharded", "zero3": "sharded",
    "zero3_offload": "replicated", "fsdp2": "sharded",
}  # fmt: skip
"""And where the reference and the reward model are."""
BOUNDS = {"float32": (1e-4, 1e-3), "bfloat16": (0.05, 0.1)}
"""Relative: of figures before the first step, and of all."""
SMALLEST = {"float32": 0.01, "bfloat16": 1.0}
"""Figures below it are compared with it: some are sums that cancel."""


@pytest.fixture(scope="module", autouse=True)
def lengths(on_gpu: bool) -> Iterator[None]:
    """Shorter rows on a CPU; four ranks have the long ones there (tests/distributed)."""
    with pytest.MonkeyPatch.context() as patch:
        if not on_gpu:
            patch.setattr(ranks, "LENGTHS", (60, 20, 10, 5))
            patch.setattr(ranks, "ALONE", 20)
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    directory = tmp_path_factory.mktemp("models")
    ranks.write_large(directory / "large", tiny_model, is_tied=False)
    write_reward(directory / "reward", directory / "large")
    return directory


@pytest.fixture(scope="module")
def expected(models: Path, lengths: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    scratch = tmp_path_factory.mktemp("expected")
    return ranks.all_stages(on_cpu(), models / "large", models / "reward", "replicated", scratch)


def worst(found: dict[str, float], wanted: dict[str, float], smallest: float) -> tuple[float, str]:
    return max((abs(found[name] - wanted[name]) / max(abs(wanted[name]), smallest), name) for name in wanted)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("zero", ENGINES)
def test_each_engine_learns_what_a_cpu_does(
    zero: Zero, dtype: str, expected: dict[str, float], models: Path, tmp_path: Path, one_rank: OneRank,
    reaches: Reaches,
) -> None:  # fmt: skip
    compute = one_rank(zero, dtype)
    found = ranks.all_stages(compute, models / "large", models / "reward", ENGINES[zero], tmp_path / "stages")
    assert found.keys() == expected.keys()
    first = {name: value for name, value in expected.items() if name.endswith((" 0", " all"))}
    if compute.dtype == torch.bfloat16:  # other answers were sampled; norms behind a step follow its rounding
        left_out = ("held-out", "norm 1", "norm 2")
        expected = {
            name: value for name, value in expected.items() if not any(part in name for part in left_out)
        }
    for when, figures, bound in zip(
        ("before the first step", "all steps"), (first, expected), BOUNDS[dtype], strict=True
    ):
        away, name = worst(found, figures, SMALLEST[dtype])
        reaches(f"{when} ({name})", away, at_most=bound)
