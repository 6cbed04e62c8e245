"""A policy that a stage trains: sampled from, learned from, and what its stage must say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from helpers.experiments import build
from helpers.jobs import small_job, tiny_base, user
from rlhf.config import ConfigError
from rlhf.models.peft.config import PeftConfig
from rlhf.pipeline.learner import Evaluations
from rlhf.pipeline.metrics import undeclared
from rlhf.pipeline.trainable import PolicyLearner
from rlhf.rl.rollout import Rollout
from rlhf.training.config import OptimConfig

OPTIM = OptimConfig(
    lr=1e-2, weight_decay=0.0, eps=1e-8, schedule="constant", warmup_fraction=0.0, max_grad_norm=1e9
)
LORA = PeftConfig.model_validate({"method": "lora"})


@pytest.fixture
def learner(tmp_path: Path, tiny_model: Path) -> PolicyLearner:
    torch.manual_seed(0)
    job = small_job("dpo", tmp_path / "job", tiny_base(tiny_model))
    return job.trainable("base", LORA, OPTIM)


def sampled(learner: PolicyLearner) -> Rollout:
    generator = torch.Generator().manual_seed(0)
    prompts = [user("Hi"), user("What is rain?"), user("1 + 1?")]
    rollout, _ = learner.sampler().sample(prompts, max_new_tokens=6, generator=generator)
    return rollout


def test_what_it_samples_becomes_likelier_and_its_start_does_not(learner: PolicyLearner) -> None:
    rollout, reference = sampled(learner), learner.reference()
    before_BR = learner.log_probabilities(rollout, 1000)
    torch.testing.assert_close(reference.log_probabilities(rollout, 1.0, 1000), before_BR)
    tokens = int(rollout.mask_BR.sum())

    def loss(logp_BR: Tensor, mask_BR: Tensor, weight_BR: Tensor) -> Tensor:
        return -torch.where(mask_BR, weight_BR * logp_BR, 0.0).sum() / tokens

    for budget in (1000, 1000, 12):  # micro-batches of one row, too
        found = learner.learn(rollout, loss, torch.ones_like(before_BR), micro_batch_tokens=budget)
        assert found["grad_norm"] > 0.0
    after_BR = learner.log_probabilities(rollout, 1000)
    assert float(after_BR.sum()) > float(before_BR.sum())
    torch.testing.assert_close(learner.sampler().log_probabilities(rollout, 1.0, 1000), after_BR)
    torch.testing.assert_close(reference.log_probabilities(rollout, 1.0, 1000), before_BR)


def test_micro_batches_do_not_change_what_is_learned(tmp_path: Path, tiny_model: Path) -> None:
    results = []
    for name, budget in (("whole", 1000), ("split", 12)):
        torch.manual_seed(0)
        job = small_job("dpo", tmp_path / name, tiny_base(tiny_model))
        learner = job.trainable("base", LORA, OPTIM)
        rollout = sampled(learner)
        weight_BR = torch.arange(rollout.mask_BR.numel()).view(rollout.mask_BR.shape).float()

        def loss(logp_BR: Tensor, mask_BR: Tensor, weight_BR: Tensor) -> Tensor:
            return -torch.where(mask_BR, weight_BR * logp_BR, 0.0).sum() / 18

        results.append(learner.learn(rollout, loss, weight_BR, micro_batch_tokens=budget))
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_a_stage_that_samples_from_it_says_so(learner: PolicyLearner) -> None:
    learner.job = replace(learner.job, experiment=build("model=tiny"))
    with pytest.raises(ConfigError, match="dpo: it samples from the model that it trains, and its class"):
        learner.sampler()


def test_a_measurement_is_a_named_tuple() -> None:
    class Found(NamedTuple):
        loss: Tensor

    Evaluations(Found, lambda: Found(torch.zeros(())), lambda new, best: True, {1})
    with pytest.raises(TypeError, match="it must be a NamedTuple of tensors"):
        Evaluations(tuple, tuple, lambda new, best: True, {1})


def test_a_metric_that_the_table_does_not_name_is_found() -> None:
    stage = build("model=tiny").stages["dpo"]
    names = ["accuracy", "accuracy_low", "margin_rows", "acuracy", "token_seconds"]
    assert undeclared(stage, names) == ["acuracy"]
