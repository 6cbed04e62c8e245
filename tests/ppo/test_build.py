"""PPO's models as `build_trainer` puts them together."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path

import pytest

from helpers.ppo import ppo_job, ppo_stage
from rlhf.ppo.build import build_trainer


@pytest.mark.parametrize("placement", ["replicated", "offloaded"])
def test_the_reference_waits_on_the_host_where_that_is_asked_for(
    placement: str, tmp_path: Path, tiny_model: Path
) -> None:
    """The stage refuses it without a GPU; the mechanism is the same."""
    stage = ppo_stage(f"ppo.frozen_placement={placement}")
    trainer = build_trainer(stage, ppo_job(tmp_path / "ppo", tiny_model), math.inf)
    assert (trainer.reference._whole is not nullcontext) == (placement == "offloaded")
