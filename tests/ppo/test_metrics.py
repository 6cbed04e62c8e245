"""PPO's figures by hand, and what a step whose gradient is not finite leaves of them."""

from __future__ import annotations

import math
from dataclasses import replace
from io import StringIO

import pytest
import torch
from rich.console import Console
from torch import Tensor

from helpers.ppo import ROWS, SMALL, MakeTrainer, experience_of, ppo_stage, shake, take_step
from rlhf.pipeline.metrics import check_metric
from rlhf.ppo.metrics import Evaluation, rollout_metrics
from rlhf.rl.rollout import Experience, Rollout, Values, minibatches


def experience_from(reward_BR: Tensor, return_BR: Tensor) -> Experience:
    """Two sampled responses without padding; what does not matter is 0."""
    rows, width = reward_BR.shape
    rollout = Rollout(
        prompt_ids=[torch.tensor([5])] * rows,
        response_ids=[torch.arange(width)] * rows,
        stopped=torch.ones(rows, dtype=torch.bool),
    )
    zeros_BR = torch.zeros_like(reward_BR)
    return Experience(
        rollout=rollout, score_B=torch.zeros(rows), logp_BR=zeros_BR, reference_logp_BR=zeros_BR,
        reward_BR=reward_BR, advantage_BR=zeros_BR, values=Values(zeros_BR, return_BR),
    )  # fmt: skip


def test_sums_over_tokens_lose_nothing() -> None:
    reward_BR = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0)) * 1e4
    exact = math.fsum(reward_BR.flatten().tolist())
    found = rollout_metrics(experience_from(reward_BR, torch.randn(2, 1000)))["reward"] * 2
    assert found == pytest.approx(exact, rel=1e-12)  # fp32 would be off by 1e-7


def test_equal_returns_leave_nothing_to_explain() -> None:
    metrics = rollout_metrics(experience_from(torch.zeros(2, 3), torch.full((2, 3), 0.5)))
    assert (metrics["explained_variance"], metrics["explained_variance_error"]) == (0.0, 0.0)


def test_an_evaluation_in_figures() -> None:
    """Even places choose the weights, odd ones judge them."""
    score_B = torch.tensor([1.0, 5.0, 2.0, math.nan])
    stopped_B = torch.tensor([True, True, True, False])
    found = Evaluation(
        score_B, torch.tensor([1.0, 1.0, 2.0, 4.0]), torch.tensor([3.0, 5.0, 3.0, 5.0]), stopped_B
    )
    assert found.metrics() == {
        "score": 5.0, "choice_score": 1.5, "kl": 2.0, "length": 4.0, "stop_rate": 0.75, "unscored": 1,
    }  # fmt: skip


def test_every_summary_metric_is_one_that_the_stage_names(make: MakeTrainer) -> None:
    trainer, stage = make("ppo.steps=1"), ppo_stage()
    found = {**trainer.train(ROWS, ROWS[:2]), **trainer.publish()}
    for name in found:
        check_metric(stage, name, "test")
    trained = sum(each.numel() for each in trainer.policy.model.parameters())
    assert found["trained_parameters"] == trained


def test_a_minibatch_without_a_finite_gradient_is_skipped_and_the_next_one_learned(
    make: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, out = make(), StringIO()
    trainer.job.progress.console = Console(file=out, width=200)
    first, *_ = minibatches(16, 8, torch.Generator().manual_seed(trainer.job.seed))
    experience, scored = experience_of(trainer, ROWS)
    advantage_BR = experience.advantage_BR.clone()
    advantage_BR[first[0], 0] = math.nan
    broken = replace(experience, advantage_BR=advantage_BR)
    assert scored is None
    monkeypatch.setattr(trainer.objective, "experience", lambda *given: broken)
    trainer.engine.set_rates(0, 4)
    before = [each.detach().clone() for each in trainer.policy.model.parameters()]
    metrics = take_step(trainer, ROWS, 3)
    assert metrics["skipped_minibatches"] == 1.0 and math.isfinite(metrics["grad_norm"])
    after = trainer.policy.model.parameters()
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert "ppo: step 3 skipped: the gradient of a minibatch was not finite." in out.getvalue()


def test_clip_high_is_the_bound_upwards(make: MakeTrainer) -> None:
    def clipped(*overrides: str) -> float:
        trainer = make("ppo.clip=0.0001", "ppo.epochs=1", *overrides)
        experience, _ = experience_of(trainer, ROWS)
        shake(trainer)
        trainer.engine.set_rates(0, 4)
        return trainer.learn(experience, None, critic_only=False)["clip_fraction"]

    both, downwards = clipped(), clipped("ppo.clip_high=1000.0")
    assert 0 < downwards < 0.8 * both


def test_the_settings_of_these_tests_have_two_minibatches() -> None:
    stage = ppo_stage(*SMALL)
    assert (stage.batch_episodes, stage.minibatch_episodes, stage.clip_high) == (16, 8, None)
