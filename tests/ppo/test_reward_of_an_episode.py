"""What an episode's reward is made of, in fp32 on the tiny model: score, penalties, KL."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from helpers.ppo import ROWS, Counting, MakeTrainer, experience_of, length, shake, take_step
from rlhf.rewards.reward import Prompts


def test_the_adaptive_coefficient_steers_towards_its_target(make: MakeTrainer) -> None:
    trainer = make("ppo.kl.controller=adaptive", "ppo.kl.coef=0.1", "ppo.kl.target=0.1", "ppo.kl.horizon=160")
    first = take_step(trainer, ROWS, 1)
    assert first["kl_coef"] == 0.1  # what the step was made with
    lowered = 0.1 * (1 - 0.2 * 16 / 160)  # KL 0: as far below the target as counts
    assert trainer.kl.coef == pytest.approx(lowered)
    shake(trainer)
    second = take_step(trainer, ROWS, 2)
    assert second["kl_coef"] == pytest.approx(lowered)
    assert second["kl"] > 0.12
    assert trainer.kl.coef == pytest.approx(lowered * (1 + 0.2 * 16 / 160))


def test_the_penalty_is_taken_from_every_token(make: MakeTrainer) -> None:
    trainer = make("ppo.kl.coef=0.3", reward=Counting(0.0))
    shake(trainer)
    experience = experience_of(trainer, ROWS)[0]
    expected_BR = -0.3 * (experience.logp_BR - experience.reference_logp_BR)
    assert expected_BR.abs().max() > 0.01
    torch.testing.assert_close(experience.reward_BR, expected_BR, atol=1e-6, rtol=1e-5)


def test_running_normalisation_makes_the_reward_unitless(make: MakeTrainer) -> None:
    def scaled(prompts: Prompts, completions: Sequence[str]) -> Tensor:
        return 300.0 + 1000.0 * length(prompts, completions)

    plain, large = (make("ppo.score.normalize=running", reward=reward) for reward in (length, scaled))
    scores = []
    for _ in range(2):
        left, right = experience_of(plain, ROWS)[0], experience_of(large, ROWS)[0]
        torch.testing.assert_close(left.reward_BR, right.reward_BR, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(left.advantage_BR, right.advantage_BR, atol=1e-4, rtol=1e-4)
        scores.append(right.score_B)
        seen = torch.cat(scores)  # raw; the moments are of all scores so far
        assert large.normalizer.mean == pytest.approx(float(seen.mean()), rel=1e-5)
        assert large.normalizer.deviation == pytest.approx(float(seen.std(correction=0)), rel=1e-5)
        expected_B = (right.score_B - seen.mean()) / seen.std(correction=0)
        torch.testing.assert_close(right.reward_BR.sum(1), expected_B, atol=1e-4, rtol=1e-4)
    assert float(seen.std()) > 100


def test_an_outlier_is_clipped(make: MakeTrainer) -> None:
    def one_large(prompts: Prompts, completions: Sequence[str]) -> Tensor:
        return torch.tensor([1000.0] + [0.0] * (len(completions) - 1))

    trainer = make("ppo.score.normalize=none", "ppo.score.clip=5.0", reward=one_large)
    assert experience_of(trainer, ROWS)[0].reward_BR.sum(1).tolist() == [5.0] + [0.0] * 15


def test_a_response_without_a_stop_token_is_marked_down(make: MakeTrainer) -> None:
    trainer = make("ppo.score.missing_stop_penalty=0.5", "ppo.max_new_tokens=60", reward=Counting(0.0))
    experience = experience_of(trainer, ROWS)[0]
    stopped_B = experience.rollout.stopped
    assert 0 < int(stopped_B.sum()) < 16
    assert experience.reward_BR.sum(1).tolist() == [
        0.0 if stopped else -0.5 for stopped in stopped_B.tolist()
    ]
