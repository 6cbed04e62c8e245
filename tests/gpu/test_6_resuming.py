"""A checkpoint of this device is gone on from on it and on a CPU, by every engine; in fp32."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from helpers.gpu import OneRank, Reaches, error, go_on
from helpers.jobs import TINY
from helpers.ranks import write_large
from rlhf.distributed.compute import Zero
from rlhf.models.load import load_causal_lm

pytestmark = pytest.mark.gpu
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    directory = tmp_path_factory.mktemp("large")
    write_large(directory, tiny_model, is_tied=False)
    return directory


def moved(weights: dict[str, Tensor], model: Path) -> list[Tensor]:
    """How far each weight is from where it began."""
    start = dict(load_causal_lm(model, TINY, torch.float32).named_parameters())
    return [value - start[name] for name, value in sorted(weights.items())]


@pytest.mark.slow
@pytest.mark.parametrize("zero", get_args(Zero))
def test_what_was_saved_here_goes_on_here_and_on_a_cpu(
    zero: Zero, model: Path, one_rank: OneRank, tmp_path: Path, reaches: Reaches
) -> None:
    compute = one_rank(zero, "float32")
    whole = moved(go_on(model, tmp_path / "whole", compute, steps=4), model)
    go_on(model, tmp_path / "here", compute, steps=2)
    shutil.copytree(tmp_path / "here", tmp_path / "elsewhere")
    here = moved(go_on(model, tmp_path / "here", compute, steps=4), model)
    reaches("here", error(here, whole), at_most=1e-3)
    subprocess.run(
        [sys.executable, "-m", "helpers.gpu", str(model), str(tmp_path / "elsewhere"), zero, "4"],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(TESTS)}, check=True,
    )  # fmt: skip
    elsewhere = torch.load(tmp_path / "elsewhere" / "weights.pt", weights_only=True)
    reaches("on a CPU", error(moved(elsewhere, model), whole), at_most=0.02)
