"""The forward pass that scores a rollout is the first one that is learned from, where it can be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.ppo import critic_of, experience_of, ppo_job, ppo_learner, ppo_stage, prompts
from rlhf.ppo.trainer import PolicyTrainer
from rlhf.rewards.function import function_reward

ROWS = prompts(range(8))
Make = Callable[..., PolicyTrainer]


@pytest.fixture
def make(tmp_path: Path, tiny_model: Path) -> Make:
    """Always the same weights and random numbers; a rollout is one minibatch and one forward pass."""

    def trainer(*overrides: str) -> PolicyTrainer:
        torch.manual_seed(0)
        stage = ppo_stage(
            "ppo.batch_episodes=8", "ppo.minibatch_episodes=8", "ppo.max_new_tokens=6", "ppo.kl.coef=0.1",
            "ppo.optim.warmup_fraction=0.0", "ppo.critic.optim.warmup_fraction=0.0", *overrides,
        )  # fmt: skip
        reward = function_reward("python:helpers.ppo:starts_with_e")
        return ppo_learner(stage, ppo_job(tmp_path / "ppo", tiny_model), reward)

    return trainer


def weights(trainer: PolicyTrainer) -> list[Tensor]:
    return [parameter.detach() for parameter in trainer.engine.model.parameters()]


@pytest.mark.parametrize("epochs", [1, 2])
def test_what_is_learned_is_the_same_with_one_pass_less(make: Make, epochs: int) -> None:
    once, twice = make(f"ppo.epochs={epochs}"), make(f"ppo.epochs={epochs}")
    results, passes = [], []
    for trainer in (once, twice):
        trainer.engine.set_rates(0, 4)
        experience, scored = experience_of(trainer, ROWS)
        assert scored is not None
        count: list[int] = []
        for model in (trainer.policy.model, critic_of(trainer).model):
            model.get_input_embeddings().register_forward_hook(lambda *_, n=count: n.append(1))
        results.append(trainer.learn(experience, scored if trainer is once else None, critic_only=False))
        passes.append(len(count))
    assert passes == [2 * (epochs - 1), 2 * epochs]
    assert results[0] == pytest.approx(results[1], rel=1e-4, abs=1e-6)
    for left, right in zip(weights(once), weights(twice), strict=True):
        # the first update of Adam is the gradient's sign: where that is next to nothing, rounding decides
        assert float(((left - right).abs() > 1e-5).float().mean()) < 1e-3


@pytest.mark.parametrize("override", ["ppo.micro_batch_tokens=100", "ppo.minibatch_episodes=4"])
def test_a_rollout_in_parts_keeps_no_graph(make: Make, override: str) -> None:
    experience, scored = experience_of(make(override), ROWS)
    assert scored is None
    assert not experience.logp_BR.requires_grad
    assert not experience.value_BR.requires_grad
