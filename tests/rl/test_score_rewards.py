"""From a score to rewards per token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf.rl.advantage import ScoreNormalizer, masked_moments, missing_stop, token_rewards
from rlhf.rl.rollout import length_mask

NAN = math.nan


def moments(score_B: Tensor) -> Tensor:
    return masked_moments(score_B, torch.ones_like(score_B, dtype=torch.bool))


def test_the_score_stands_on_the_last_real_token() -> None:
    logp_BR = torch.tensor([[0.5, -1.0, 2.0], [0.5, NAN, NAN], [0.5, -1.0, math.inf]])
    mask_BR = length_mask(torch.tensor([3, 1, 2]))
    score_B = torch.tensor([3.0, -4.0, 5.0])
    # -0.1 (logp - 0.25) = -0.025, +0.125, -0.175, plus the score at the end
    expected = [[-0.025, 0.125, 2.825], [-4.025, 0.0, 0.0], [-0.025, 5.125, 0.0]]
    reward_BR = token_rewards(logp_BR, torch.full((3, 3), 0.25), mask_BR, score_B, kl_coef=0.1)
    torch.testing.assert_close(reward_BR, torch.tensor(expected))


@pytest.mark.parametrize("mask", [[False, False], [False, True]])
def test_rows_without_tokens_or_with_holes_are_refused(mask: list[bool]) -> None:
    zeros_BR, score_B = torch.zeros(2, 2), torch.ones(2)
    with pytest.raises(AssertionError):
        token_rewards(zeros_BR, zeros_BR, torch.tensor([[True, True], mask]), score_B, kl_coef=0.1)


@pytest.mark.parametrize(
    ("replacement", "penalty", "expected"),
    [(None, 0.0, [2.0, 3.0]), (None, 0.5, [2.0, 2.5]), (-1.0, 0.0, [2.0, -1.0]), (0.0, 0.0, [2.0, 0.0])],
)
def test_missing_stop_by_hand(replacement: float | None, penalty: float, expected: list[float]) -> None:
    score_B, stopped_B = torch.tensor([2.0, 3.0]), torch.tensor([True, False])
    assert missing_stop(score_B, stopped_B, replacement=replacement, penalty=penalty).tolist() == expected


def test_a_replaced_score_cannot_also_be_penalised() -> None:
    with pytest.raises(AssertionError):
        missing_stop(torch.ones(1), torch.tensor([False]), replacement=-1.0, penalty=0.5)


def test_fixed_normalisation_by_hand_then_clipped() -> None:
    normalizer = ScoreNormalizer.fixed(mean=1.0, deviation=2.0, clip=1.5)
    normalizer.update(moments(torch.tensor([100.0, 200.0])))  # frozen
    assert normalizer.apply(torch.tensor([1.0, 3.0, 9.0, -9.0])).tolist() == [0.0, 1.0, 1.5, -1.5]
    assert ScoreNormalizer.fixed(1.0, 2.0, clip=None).apply(torch.tensor([9.0])).tolist() == [4.0]


def test_running_moments_are_those_of_all_scores_so_far() -> None:
    generator = torch.Generator().manual_seed(4)
    batches = [torch.randn(n, generator=generator) * n + 50 * n for n in (3, 1, 8)]
    normalizer = ScoreNormalizer.running(clip=None)
    for batch_B in batches:
        normalizer.update(moments(batch_B))
    everything = torch.cat(batches).double()
    assert normalizer.mean == pytest.approx(everything.mean().item(), rel=1e-9)
    assert normalizer.deviation == pytest.approx(everything.std(correction=0).item(), rel=1e-9)
    restored = ScoreNormalizer.running(clip=None)
    restored.load_state_dict(normalizer.state_dict())
    assert torch.equal(restored.apply(batches[0]), normalizer.apply(batches[0]))
    assert restored.apply(torch.tensor([normalizer.mean + normalizer.deviation])).item() == pytest.approx(1.0)


def test_running_normalisation_needs_scores_and_survives_equal_ones() -> None:
    normalizer = ScoreNormalizer.running(clip=5.0)
    score_B = torch.tensor([0.1, 0.1, 0.1])
    with pytest.raises(AssertionError):
        normalizer.apply(score_B)
    normalizer.update(moments(score_B[:0]))
    normalizer.update(moments(score_B))
    torch.testing.assert_close(normalizer.apply(score_B), torch.zeros(3), atol=1e-3, rtol=0)
