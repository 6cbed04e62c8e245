"""What loading, sampling, a step and publishing hold at most, against what the planner says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.gpu import Reaches
from helpers.memory import write_model

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
BOUNDS = {"cuda": (0.85, 1.15), "cpu": (0.75, 1.4)}
"""Measured over predicted; a CPU's figure is the whole process's, libraries and the allocator's rests too."""


def test_the_planner_knows_what_each_phase_holds(
    tiny_model: Path, tmp_path: Path, device: torch.device, reaches: Reaches
) -> None:
    write_model(tmp_path / "model", tiny_model, device.type)
    (tmp_path / "scratch").mkdir()
    arguments = [str(tmp_path / "model"), str(tmp_path / "scratch"), str(device)]
    result = subprocess.run(
        [sys.executable, "-m", "helpers.memory", *arguments], stdout=subprocess.PIPE, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    least, most = BOUNDS[device.type]
    for phase, (predicted, measured) in json.loads(result.stdout.splitlines()[-1]).items():
        what = f"{phase}: measured over predicted ({predicted / 2**30:.2f} GiB)"
        reaches(what, measured / predicted, at_least=least, at_most=most)
