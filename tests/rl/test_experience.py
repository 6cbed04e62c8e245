"""From a rollout and what the models say of it to experience, by hand. B episodes, R response tokens."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from rlhf.rl.advantage import ScoreNormalizer, whiten
from rlhf.rl.rollout import Experience, RewardRule, Rollout, critic_advantages, make_experience

NAN = float("nan")


def rollout() -> Rollout:
    return Rollout(
        prompt_ids=[torch.tensor([1, 2]), torch.tensor([3])],
        response_ids=[torch.tensor([4, 5, 6]), torch.tensor([7, 8])],
        stopped=torch.tensor([True, False]),
    )


LOGP_BR = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -1.5, NAN]])
REFERENCE_BR = torch.tensor([[-1.5, -1.0, -3.0], [-1.5, -1.0, NAN]])
VALUE_BR = torch.tensor([[0.5, 1.0, -1.0], [1.0, 2.0, NAN]])
SCORE_B = torch.tensor([10.0, 6.0])


def experience(rule: RewardRule, score_B: Tensor = SCORE_B) -> Experience:
    return make_experience(
        rollout(), logp_BR=LOGP_BR, reference_logp_BR=REFERENCE_BR, score_B=score_B, rule=rule,
        advantages=partial(critic_advantages, value_BR=VALUE_BR, gamma=0.9, lam=0.8),
    )  # fmt: skip


@pytest.mark.parametrize(("replacement", "penalty", "second"), [(None, 0.25, 0.25), (-2.0, 0.0, -2.0)])
def test_an_experience_by_hand(replacement: float | None, penalty: float, second: float) -> None:
    """Scores (10 - 4) / 4 and (6 - 4) / 4; the second answer was cut: less a penalty, or replaced."""
    found = experience(RewardRule(ScoreNormalizer.fixed(4.0, 4.0, None), 0.1, replacement, penalty))
    rewards = [[-0.05, 0.1, 1.5], [-0.1, second + 0.05, 0.0]]
    torch.testing.assert_close(found.reward_BR, torch.tensor(rewards))
    advantages = [[0.0] * 3, [0.0] * 3]
    for row, length in enumerate((3, 2)):
        following, after = 0.0, 0.0
        for t in reversed(range(length)):
            value = float(VALUE_BR[row, t])
            following = rewards[row][t] + 0.9 * after - value + 0.72 * following
            advantages[row][t], after = following, value
    returns_BR = torch.tensor(advantages) + VALUE_BR.nan_to_num() * found.mask_BR
    torch.testing.assert_close(found.return_BR, returns_BR)
    real = torch.tensor(advantages)[found.mask_BR]
    expected_BR = (torch.tensor(advantages) - real.mean()) / real.std(correction=0) * found.mask_BR
    torch.testing.assert_close(found.advantage_BR, expected_BR, rtol=1e-4, atol=1e-5)
    assert found.score_B is SCORE_B and found.logp_BR is LOGP_BR and found.value_BR is VALUE_BR
    assert found.reference_logp_BR is REFERENCE_BR and len(found) == 2


def test_the_penalty_is_of_the_rules_estimator() -> None:
    """Of the first token log s = -0.5 and of the second 1: exp(log s) - 1 - log s nats, times 0.1."""
    found = experience(RewardRule(ScoreNormalizer.fixed(4.0, 4.0, None), 0.1, None, 0.0, kl_estimator="k3"))
    expected = torch.tensor([-0.1 * (math.exp(-0.5) - 0.5), -0.1 * (math.e - 2)])
    torch.testing.assert_close(found.reward_BR[0, :2], expected)


def test_running_moments_are_updated_before_they_are_applied() -> None:
    rule = RewardRule(ScoreNormalizer.running(None), 0.0, None, 0.0)
    found = experience(rule)
    assert (rule.normalizer.count, rule.normalizer.mean, rule.normalizer.deviation) == (2.0, 8.0, 2.0)
    torch.testing.assert_close(found.reward_BR, torch.tensor([[0.0, 0.0, 1.0], [0.0, -1.0, 0.0]]))


def test_a_score_that_is_not_finite_spoils_no_moments() -> None:
    rule = RewardRule(ScoreNormalizer.running(None), 0.0, None, 0.0)
    experience(rule, torch.tensor([10.0, NAN]))
    assert (rule.normalizer.count, rule.normalizer.mean) == (1.0, 10.0)


def test_whitening_alike_values_divides_by_no_zero() -> None:
    x_BR, mask_BR = torch.full((2, 2), 3.0), torch.ones(2, 2, dtype=torch.bool)
    moments = torch.tensor([4.0, 12.0, 36.0], dtype=torch.float64)
    assert whiten(x_BR, mask_BR, moments).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_from_an_episode_without_a_score_nothing_is_learned() -> None:
    """The other is as if it had been sampled alone; its own advantages and errors are 0."""
    rule = RewardRule(ScoreNormalizer.fixed(4.0, 4.0, None), 0.1, -2.0, 0.0)
    found, others = experience(rule, torch.tensor([10.0, NAN])), rollout().select(torch.tensor([0]))
    alone = make_experience(
        others, logp_BR=LOGP_BR[:1], reference_logp_BR=REFERENCE_BR[:1], score_B=torch.tensor([10.0]),
        rule=rule,
        advantages=partial(critic_advantages, value_BR=VALUE_BR[:1], gamma=0.9, lam=0.8),
    )  # fmt: skip
    assert found.reward_BR[1].tolist() == found.advantage_BR[1].tolist() == [0.0, 0.0, 0.0]
    assert found.return_BR[1].tolist() == [1.0, 2.0, 0.0]  # the critic's own values, and padding
    assert found.scored_BR.any(-1).tolist() == [True, False]
    for name in ("reward_BR", "advantage_BR", "return_BR"):
        assert torch.equal(getattr(found, name)[:1], getattr(alone, name))
