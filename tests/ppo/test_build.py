"""PPO's models as `load_models` puts them together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers.ppo import ppo_job, ppo_stage
from helpers.store import manifest
from rlhf.config import ConfigError
from rlhf.pipeline.store import Artifact
from rlhf.ppo.models import load_models, score_normalizer
from rlhf.rl.advantage import ScoreNormalizer
from rlhf.training.engine import FULL_MODEL


@pytest.mark.parametrize("placement", ["replicated", "offloaded"])
def test_the_reference_waits_on_the_host_where_that_is_asked_for(
    placement: str, tmp_path: Path, tiny_model: Path
) -> None:
    """The stage refuses it without a GPU; the mechanism is the same."""
    stage = ppo_stage(f"ppo.frozen_placement={placement}")
    models = load_models(stage, ppo_job(tmp_path / "ppo", tiny_model))
    assert (models.reference.access is not FULL_MODEL) == (placement == "offloaded")


def test_scores_are_normalised_by_what_generate_measured(tmp_path: Path, tiny_model: Path) -> None:
    stage, job = (
        ppo_stage("ppo.score.normalize=sft", "ppo.score.clip=null"),
        ppo_job(tmp_path / "ppo", tiny_model),
    )

    def measured(mean: float, deviation: float) -> ScoreNormalizer:
        metrics = {"score_mean": mean, "score_deviation": deviation}
        generated = Artifact(tmp_path, manifest("generate", metrics=metrics))
        return score_normalizer(stage, replace(job, inputs={**job.inputs, "generate": generated}))

    assert measured(1.0, 2.0).apply(torch.tensor([5.0, -1.0])).tolist() == [2.0, -1.0]
    with pytest.raises(ConfigError) as raised:
        measured(1.0, 0.0)
    assert str(raised.value) == (
        "ppo.score.normalize=sft: all responses that `generate` sampled have the same score, so there is "
        "nothing to learn. Use more of them (generate.num_prompts), another reward, or "
        "ppo.score.normalize=none."
    )
