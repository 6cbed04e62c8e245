"""Advantages of groups, by hand, and what they become at their limits. B episodes, R response tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf.rl.advantage import OverlongPenalty, ScoreNormalizer, token_rewards
from rlhf.rl.group import (
    DEVIATION_FLOOR,
    batch_advantage,
    group_advantage,
    group_spread,
    leave_one_out_advantage,
    neighbours,
)
from rlhf.rl.rollout import Advantages, RewardRule, Rollout, length_mask, make_experience

NAN = float("nan")
LENGTHS = torch.tensor([2, 1, 3, 1])
MASK_BR = length_mask(LENGTHS)
GROUP_B = torch.tensor([0, 0, 1, 1])


def on_last(totals: list[float]) -> Tensor:
    """Rewards that come with each row's last token; on padding stands something that must not count."""
    reward_BR = torch.where(MASK_BR, 0.0, NAN)
    reward_BR[torch.arange(len(totals)), LENGTHS - 1] = torch.tensor(totals)
    return reward_BR


def by_row(advantage_BR: Tensor) -> list[float]:
    """Each row's advantage, which all of its tokens must have, and padding must not."""
    assert torch.equal(advantage_BR, torch.where(MASK_BR, advantage_BR[:, :1], 0.0))
    return advantage_BR[:, 0].tolist()


def test_grpo_by_hand() -> None:
    """1 and 3 have mean 2 and (n - 1) deviation sqrt(2); 0 and 8 have mean 4 and sqrt(32)."""
    reward_BR = on_last([1.0, 3.0, 0.0, 8.0])
    found = by_row(group_advantage(reward_BR, MASK_BR, GROUP_B, divide_by_deviation=True))
    first, second = 1 / (math.sqrt(2) + DEVIATION_FLOOR), 4 / (math.sqrt(32) + DEVIATION_FLOOR)
    assert found == pytest.approx([-first, first, -second, second])


def test_dr_grpo_by_hand() -> None:
    reward_BR = on_last([1.0, 3.0, 0.0, 8.0])
    found = by_row(group_advantage(reward_BR, MASK_BR, GROUP_B, divide_by_deviation=False))
    assert found == pytest.approx([-1.0, 1.0, -4.0, 4.0])


# groups of three answers and of two
THREE_AND_TWO_B, ANSWER_BR = torch.tensor([0, 0, 0, 1, 1]), torch.ones(5, 1, dtype=torch.bool)
ANSWERS_REWARD_BR = torch.tensor([[1.0], [2.0], [6.0], [5.0], [1.0]])


def test_grpo_of_three_answers_by_hand() -> None:
    """1, 2 and 6 are -2, -1 and 3 from their mean, with the variance (4 + 1 + 9) / (3 - 1) = 7; 5 and 1 have
    8 / (2 - 1). Of two answers alone, n - 1 cannot be told from 1."""
    found_BR = group_advantage(ANSWERS_REWARD_BR, ANSWER_BR, THREE_AND_TWO_B, divide_by_deviation=True)
    three, two = math.sqrt(7) + DEVIATION_FLOOR, math.sqrt(8) + DEVIATION_FLOOR
    assert found_BR[:, 0].tolist() == pytest.approx([-2 / three, -1 / three, 3 / three, 2 / two, -2 / two])


def test_nearly_equal_rewards_give_no_huge_advantages() -> None:
    """1e-4 either side of their mean, so the deviation is sqrt(2) 1e-4; the floor adds 1e-4 to it."""
    reward_BR, mask_BR = torch.tensor([[0.0], [2e-4]]), torch.ones(2, 1, dtype=torch.bool)
    found_BR = group_advantage(reward_BR, mask_BR, neighbours(2, 2), divide_by_deviation=True)
    assert found_BR[:, 0].tolist() == pytest.approx([1 - math.sqrt(2), math.sqrt(2) - 1])


def test_rloo_by_hand() -> None:
    """Three answers with 1, 2 and 6: minus 4, 3.5 and 1.5, the means of the other two."""
    found = leave_one_out_advantage(ANSWERS_REWARD_BR, ANSWER_BR, THREE_AND_TWO_B)[:, 0].tolist()
    assert found == pytest.approx([-3.0, -1.5, 4.5, 4.0, -4.0])


def test_an_episode_counts_with_all_of_its_tokens_rewards() -> None:
    """With the KL penalty in the reward, tokens before the last one have rewards too."""
    reward_BR = torch.tensor([[-0.5, 1.5, NAN], [3.0, NAN, NAN], [0.1, 0.2, -0.3], [8.0, NAN, NAN]])
    found = by_row(group_advantage(reward_BR, MASK_BR, GROUP_B, divide_by_deviation=False))
    assert found == pytest.approx([-1.0, 1.0, -4.0, 4.0], abs=1e-6)


def test_reinforce_plus_plus_by_hand() -> None:
    """Returns from each token on: (1.5, 2), (3), (0, 1, 1), (4); whitened over these seven."""
    reward_BR = torch.tensor([[-0.5, 2.0, NAN], [3.0, NAN, NAN], [-1.0, 0.0, 1.0], [4.0, NAN, NAN]])
    returns = torch.tensor([1.5, 2.0, 3.0, 0.0, 1.0, 1.0, 4.0])
    found_BR = batch_advantage(reward_BR, MASK_BR, None)
    expected = (returns - returns.mean()) / returns.std(correction=0)
    torch.testing.assert_close(found_BR[MASK_BR], expected)
    assert not found_BR[~MASK_BR].any()


def test_reinforce_plus_plus_baseline_by_hand() -> None:
    """The groups' totals are (1.5, 3) and (0, 4): 2.25 and 2 are subtracted before whitening."""
    reward_BR = torch.tensor([[-0.5, 2.0, NAN], [3.0, NAN, NAN], [-1.0, 0.0, 1.0], [4.0, NAN, NAN]])
    returns = torch.tensor([1.5 - 2.25, 2 - 2.25, 3 - 2.25, 0.0 - 2, 1.0 - 2, 1.0 - 2, 4.0 - 2])
    found_BR = batch_advantage(reward_BR, MASK_BR, GROUP_B)
    expected = (returns - returns.mean()) / returns.std(correction=0)
    torch.testing.assert_close(found_BR[MASK_BR], expected)


def test_returns_are_summed_in_fp64() -> None:
    """To 2^24 fp32 can add no 1. The returns are 2^24 + 31, .., 2^24, with the variance (32^2 - 1) / 12."""
    reward_BR = torch.ones(1, 32)
    reward_BR[0, -1] = 2.0**24
    (found,) = batch_advantage(reward_BR, torch.ones(1, 32, dtype=torch.bool), None).tolist()
    assert found == pytest.approx([(15.5 - t) / math.sqrt(1023 / 12) for t in range(32)], rel=0.01)


ONE_TOKEN_BR = torch.ones(4, 1, dtype=torch.bool)
REWARDS = [1.0, 2.0, 6.0, 3.0]


def test_reinforce_plus_plus_of_one_token_answers_whitens_their_rewards() -> None:
    """Mean 3, and deviation sqrt((4 + 1 + 9 + 0) / 4)."""
    found_BR = batch_advantage(torch.tensor(REWARDS)[:, None], ONE_TOKEN_BR, None)
    assert found_BR[:, 0].tolist() == pytest.approx([x / math.sqrt(3.5) for x in (-2.0, -1.0, 3.0, 0.0)])


def test_with_groups_it_whitens_grpos_advantages_without_deviation() -> None:
    """The groups' means are 1.5 and 4.5; the distances have mean 0 and variance 2 (0.25 + 2.25) / 4."""
    reward_BR = torch.tensor(REWARDS)[:, None]
    found_BR = batch_advantage(reward_BR, ONE_TOKEN_BR, GROUP_B)
    assert found_BR[:, 0].tolist() == pytest.approx([x / math.sqrt(1.25) for x in (-0.5, 0.5, 1.5, -1.5)])
    of_grpo_BR = group_advantage(reward_BR, ONE_TOKEN_BR, GROUP_B, divide_by_deviation=False)
    torch.testing.assert_close(found_BR, of_grpo_BR / of_grpo_BR.std(correction=0))


@pytest.mark.parametrize("size", [2, 3, 8])
def test_grpo_without_deviation_is_rloo_up_to_n_over_n_minus_1(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    lengths_B = torch.randint(1, 6, (4 * size,), generator=generator)
    mask_BR = length_mask(lengths_B)
    reward_BR = torch.randn(mask_BR.shape, generator=generator)
    group_B = neighbours(4 * size, size)
    grpo_BR = group_advantage(reward_BR, mask_BR, group_B, divide_by_deviation=False)
    rloo_BR = leave_one_out_advantage(reward_BR, mask_BR, group_B)
    torch.testing.assert_close(grpo_BR * size / (size - 1), rloo_BR)


@pytest.mark.parametrize("value", [0.1, -1e7, 0.0])
def test_equal_rewards_give_exactly_nothing(value: float) -> None:
    """0.1 three times is not 3 x 0.1 in floating point."""
    mask_BR, group_B = torch.ones(6, 2, dtype=torch.bool), neighbours(6, 3)
    reward_BR = torch.stack([torch.zeros(6), torch.full((6,), value)], 1)
    for found_BR in (
        group_advantage(reward_BR, mask_BR, group_B, divide_by_deviation=True),
        group_advantage(reward_BR, mask_BR, group_B, divide_by_deviation=False),
        leave_one_out_advantage(reward_BR, mask_BR, group_B),
        batch_advantage(reward_BR, mask_BR, group_B),
        batch_advantage(reward_BR, mask_BR, None),
    ):
        assert found_BR.tolist() == [[0.0, 0.0]] * 6


def test_one_answer_has_nothing_to_differ_from() -> None:
    mask_BR = torch.ones(2, 1, dtype=torch.bool)
    found_BR = group_advantage(
        torch.tensor([[1.0], [5.0]]), mask_BR, torch.tensor([0, 1]), divide_by_deviation=True
    )
    assert found_BR.tolist() == [[0.0], [0.0]]
    assert not leave_one_out_advantage(torch.ones(2, 1), mask_BR, torch.tensor([0, 1])).any()


def test_no_gradient_reaches_the_rewards() -> None:
    """An advantage is a number to the policy's loss, even where the KL in the reward has a gradient."""
    reward_BR = torch.tensor([[1.0], [2.0], [6.0], [5.0], [1.0]], requires_grad=True)
    for found_BR in (
        group_advantage(reward_BR, ANSWER_BR, THREE_AND_TWO_B, divide_by_deviation=True),
        leave_one_out_advantage(reward_BR, ANSWER_BR, THREE_AND_TWO_B),
        batch_advantage(reward_BR, ANSWER_BR, THREE_AND_TWO_B),
    ):
        assert found_BR.any() and not found_BR.requires_grad


def test_returns_over_padding_on_the_left_are_refused() -> None:
    with pytest.raises(AssertionError):
        batch_advantage(torch.zeros(1, 2), torch.tensor([[False, True]]), None)


def test_an_answer_without_a_score_is_in_no_group() -> None:
    """Its mask is empty; the others are compared as if it were not there. A group may have no score."""
    mask_BR = torch.tensor([[True], [True], [False], [True], [False], [False]])
    reward_BR, group_B = torch.tensor([[1.0], [2.0], [9.0], [6.0], [9.0], [9.0]]), neighbours(6, 3)
    of_grpo = group_advantage(reward_BR, mask_BR, group_B, divide_by_deviation=True)
    one = 0.5 / (math.sqrt(0.5) + DEVIATION_FLOOR)
    assert of_grpo[:, 0].tolist() == pytest.approx([-one, one, 0.0, 0.0, 0.0, 0.0])
    of_rloo = leave_one_out_advantage(reward_BR, mask_BR, group_B)
    assert of_rloo[:, 0].tolist() == pytest.approx([-1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    score_B = torch.tensor([1.0, 2.0, NAN, 6.0, NAN, NAN])
    assert group_spread(score_B, group_B).tolist() == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert group_spread(torch.tensor([NAN, NAN]), neighbours(2, 2)).tolist() == [0.0, 0.0]


def test_neither_the_order_nor_another_group_matters() -> None:
    reward_BR, order = on_last([1.0, 3.0, 0.0, 8.0]), torch.tensor([2, 0, 3, 1])
    whole_BR = group_advantage(reward_BR, MASK_BR, GROUP_B, divide_by_deviation=True)
    shuffled_BR = group_advantage(reward_BR[order], MASK_BR[order], GROUP_B[order], divide_by_deviation=True)
    assert torch.equal(shuffled_BR, whole_BR[order])
    alone_BR = group_advantage(reward_BR[:2], MASK_BR[:2], GROUP_B[:2], divide_by_deviation=True)
    assert torch.equal(alone_BR, whole_BR[:2])


def test_the_spread_of_each_group() -> None:
    assert group_spread(torch.tensor([1.0, 4.0, 2.0, 2.0]), GROUP_B).tolist() == [3.0, 3.0, 0.0, 0.0]
    of_fp32 = group_spread(torch.tensor([1.0, -(2.0**-30)]), neighbours(2, 2))
    assert of_fp32.tolist() == [1 + 2.0**-30] * 2, "to fp32 it is 1"
    assert neighbours(6, 2).tolist() == [0, 0, 1, 1, 2, 2]


def test_the_soft_edge_before_the_length_limit() -> None:
    """DAPO's equation 13 with a limit of 20 and a buffer of 5: free up to 15 tokens."""
    penalty = OverlongPenalty(longest=20, buffer=5, penalty=1.0)
    lengths_B = torch.tensor([1, 15, 16, 18, 20])
    assert penalty(lengths_B).tolist() == pytest.approx([0.0, 0.0, -0.2, -0.6, -1.0])
    assert penalty(torch.tensor([21, 40])).tolist() == [-1.0, -1.0]
    twice = OverlongPenalty(longest=20, buffer=5, penalty=2.0)
    assert twice(lengths_B).tolist() == pytest.approx([0.0, 0.0, -0.4, -1.2, -2.0])


def test_k3_in_the_reward_by_hand() -> None:
    """log s = -0.5: exp(-0.5) - 1 + 0.5 nats, times 0.1."""
    mask_BR, logp_BR = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[-1.0, -2.0]])
    reference_BR = torch.tensor([[-1.5, -2.0]])
    found_BR = token_rewards(
        logp_BR, reference_BR, mask_BR, torch.tensor([3.0]), kl_coef=0.1, kl_estimator="k3"
    )
    assert found_BR.tolist()[0] == pytest.approx([-0.1 * (math.exp(-0.5) - 0.5), 3.0])


def test_an_experience_without_a_critic() -> None:
    """Scores in deviations, less the soft edge, less the KL; nothing of a critic."""
    rollout = Rollout(
        prompt_ids=[torch.tensor([1])] * 2,
        response_ids=[torch.tensor([4, 5, 6, 7]), torch.tensor([7])],
        stopped=torch.tensor([False, True]),
    )
    rule = RewardRule(
        ScoreNormalizer.fixed(1.0, 2.0, None), 0.1, None, 0.0, overlong=OverlongPenalty(4, 2, 0.5)
    )
    zeros_BR = torch.zeros(2, 4)
    found = make_experience(
        rollout, logp_BR=zeros_BR - 1, reference_logp_BR=zeros_BR - 2, score_B=torch.tensor([5.0, 3.0]),
        rule=rule,
        advantages=lambda reward_BR, mask_BR: Advantages(
            leave_one_out_advantage(reward_BR, mask_BR, neighbours(2, 2)), values=None
        ),
    )  # fmt: skip
    torch.testing.assert_close(
        found.reward_BR, torch.tensor([[-0.1, -0.1, -0.1, 2.0 - 0.5 - 0.1], [1.0 - 0.1, 0.0, 0.0, 0.0]])
    )
    torch.testing.assert_close(found.advantage_BR[:, 0], torch.tensor([1.1 - 0.9, 0.9 - 1.1]))
    picked = found.select(torch.tensor([1]))
    assert found.values is None and picked.values is None and picked.logp_BR.shape == (1, 1)
    with pytest.raises(AssertionError):
        _ = found.value_BR
