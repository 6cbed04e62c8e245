"""The smallest inputs that are taken, those that are refused, and figures where a sign or an n would hide."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.losses.language import next_token_loss
from rlhf.losses.pairwise import bradley_terry_loss
from rlhf.losses.policy import PolicyLoss, clipped_policy_loss
from rlhf.losses.value import ValueLoss, clipped_value_loss
from rlhf.rl.advantage import AdaptiveKL, ScoreNormalizer, masked_moments, mean_and_variance
from rlhf.rl.rollout import Rollout, length_mask, minibatches
from rlhf.rl.statistics import distinct_n, explained_variance

ONE, MASK = torch.tensor([[2.0]]), torch.tensor([[True]])


def policy_loss(mask: torch.Tensor = MASK, tokens: float = 1, **options: Any) -> PolicyLoss:
    return clipped_policy_loss(ONE, ONE, ONE, mask, clip=0.2, total_tokens=tokens, **options)


def value_loss(mask: torch.Tensor = MASK, tokens: float = 1, clip: float | None = None) -> ValueLoss:
    return clipped_value_loss(ONE, ONE, ONE - 2.0, mask, clip=clip, total_tokens=tokens)


@pytest.mark.parametrize("loss", [policy_loss, value_loss])
@pytest.mark.parametrize(("mask", "tokens"), [(MASK, 0), (MASK.float(), 1), (MASK.float(), 0)])
def test_losses_refuse_no_tokens_and_masks_that_are_no_masks(
    loss: Callable[[Tensor, int], PolicyLoss | ValueLoss], mask: Tensor, tokens: int
) -> None:
    with pytest.raises(AssertionError):
        loss(mask, tokens)
    with pytest.raises(AssertionError):
        next_token_loss(ONE, mask, total_tokens=tokens)


def test_one_token_is_enough_and_two_share_the_loss() -> None:
    assert float(next_token_loss(ONE, MASK, total_tokens=1)) == -2.0
    assert float(policy_loss().loss) == -2.0 and float(policy_loss(tokens=2).loss) == -1.0
    assert float(value_loss().loss) == 2.0 and float(value_loss(tokens=2).loss) == 1.0
    assert float(value_loss(tokens=4, clip=0.5).loss) == 0.5


def test_clips_must_leave_room() -> None:
    for clip in (0.0, -1.0):
        with pytest.raises(AssertionError):
            value_loss(clip=clip)
    with pytest.raises(AssertionError):
        policy_loss(dual_clip=1.0)


def test_the_dual_clip_cuts_no_token_that_went_well() -> None:
    """An advantage between 0 and 1, and a ratio of e: beyond the dual clip."""
    logp_BR = torch.tensor([[1.0]])
    found = clipped_policy_loss(
        logp_BR, torch.zeros(1, 1), torch.tensor([[0.5]]), MASK, clip=9.0, total_tokens=1, dual_clip=2.0
    )
    assert float(found.loss) == pytest.approx(-0.5 * torch.e) and int(found.clipped) == 0


@pytest.mark.parametrize(("advantage", "gradient"), [(0.0, 0.0), (-1.0, math.exp(0.5))])
def test_the_dual_clip_begins_above_its_ratio_and_below_no_advantage(
    advantage: float, gradient: float
) -> None:
    """A token without an advantage is not cut, nor is one whose ratio is the dual clip itself."""
    logp_BR = torch.tensor([[0.5]], requires_grad=True)
    ratio = float(torch.tensor(0.5).exp())
    found = clipped_policy_loss(
        logp_BR, torch.zeros(1, 1), torch.tensor([[advantage]]), MASK, clip=0.2, total_tokens=1,
        dual_clip=ratio if advantage else 1.1,
    )  # fmt: skip
    assert int(found.clipped) == 0
    (found_gradient,) = torch.autograd.grad(found.loss, logp_BR)
    assert found_gradient.item() == pytest.approx(gradient)


def test_a_variance_at_the_limit_of_rounding_is_none() -> None:
    """Of one value whose square's mean is 1e13: one part in 1e13 is what the subtraction may leave."""
    at_the_limit = torch.tensor([1.0, 3162277.660168221, 1e13], dtype=torch.float64)
    assert mean_and_variance(at_the_limit)[1] == 0.0
    above = torch.tensor([1.0, 3162277.66, 1e13], dtype=torch.float64)
    assert mean_and_variance(above)[1] > 1.0


def test_pairs_are_not_centered_unless_asked() -> None:
    scores = torch.tensor([3.0])
    assert float(bradley_terry_loss(scores, scores, total_pairs=1)) == pytest.approx(0.6931, abs=1e-4)
    centered = bradley_terry_loss(scores, scores, total_pairs=1, center=0.5)
    assert float(centered) == pytest.approx(18.6931, abs=1e-4)


def test_minibatches_of_one_and_none_of_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    assert [each.tolist() for each in minibatches(1, 1, generator)] == [[0]]
    assert len(minibatches(3, 1, generator)) == 3
    for episodes, size in ((0, 1), (1, 0), (0, 0)):
        with pytest.raises(AssertionError):
            minibatches(episodes, size, generator)


def test_an_episode_without_a_token_is_refused_in_words() -> None:
    with pytest.raises(AssertionError, match=r"^every response has at least one token"):
        Rollout([torch.tensor([1])], [torch.tensor([], dtype=torch.long)], torch.tensor([True]))


def test_explained_variance_is_a_share_not_a_product() -> None:
    """Var(R) is 4 and Var(R - V) is 1."""
    return_BR, value_BR = torch.tensor([[-2.0, 2.0]]), torch.tensor([[-1.0, 1.0]])
    assert explained_variance(value_BR, return_BR, torch.ones(1, 2, dtype=torch.bool)) == pytest.approx(0.75)


def test_distinct_n_counts_runs_of_n() -> None:
    assert distinct_n([[1, 2, 1, 2, 1]], 2) == 0.5
    assert distinct_n([[1, 2, 3, 4]], 3) == 1.0
    with pytest.raises(AssertionError):
        distinct_n([[1]], 0)


def test_a_fixed_normalizer_takes_any_positive_deviation_as_it_is() -> None:
    assert ScoreNormalizer.fixed(1.0, 0.5, None).deviation == 0.5
    assert ScoreNormalizer.fixed(1.0, 3.0, None).deviation == 3.0
    with pytest.raises(AssertionError, match=r"^all measured scores are equal: nothing to learn from them$"):
        ScoreNormalizer.fixed(1.0, 0.0, None)


def test_a_running_normalizer_starts_from_nothing_and_clips() -> None:
    running = ScoreNormalizer.running(1.5)
    assert (running.count, running.mean, running.sum_squares) == (0.0, 0.0, 0.0)
    assert running.frozen is False
    score_B = torch.tensor([0.0, 0.0, 0.0, 8.0])
    running.update(masked_moments(score_B, torch.ones(4, dtype=torch.bool)))
    assert running.mean == 2.0
    assert running.apply(score_B).max() == 1.5


def test_a_mask_of_no_rows_has_no_columns() -> None:
    assert length_mask(torch.tensor([], dtype=torch.long)).shape == (0, 0)
    assert length_mask(torch.tensor([1, 2], device="meta")[:0]).device.type == "meta"


def test_moments_of_nothing_are_refused() -> None:
    with pytest.raises(AssertionError):
        mean_and_variance(torch.zeros(3, dtype=torch.float64))


def test_a_kl_that_is_no_number_is_refused_in_words() -> None:
    """A nan compares as neither too far nor too near, and would be clipped into a harmless-looking error."""
    with pytest.raises(AssertionError, match=r"^a nan KL would be clipped into a harmless-looking error$"):
        AdaptiveKL(0.1, 1.0, 10).update(float("nan"), 1)
