"""Advantage estimation and whitening."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.rl.advantage import generalized_advantage, is_right_padded, masked_moments, whiten
from rlhf.rl.rollout import length_mask

NAN, INF = math.nan, math.inf


def test_generalized_advantage_by_hand() -> None:
    # gamma lam = 0.72. Row 0, backwards:
    #   delta_2 = 2 + 0       + 1   = 3.0    A_2 =  3.0                 R_2 = 3.0    - 1   = 2.0
    #   delta_1 = 0 - 0.9     - 1   = -1.9   A_1 = -1.9 + 0.72 * 3.0    R_1 = 0.26   + 1   = 1.26
    #   delta_0 = 1 + 0.9 * 1 - 0.5 = 1.4    A_0 =  1.4 + 0.72 * 0.26   R_0 = 1.5872 + 0.5 = 2.0872
    # Row 1 ends after two tokens; nothing in its padding counts:
    #   delta_1 = 1   + 0     - 2   = -1.0   A_1 = -1.0                 R_1 = -1     + 2   = 1.0
    #   delta_0 = 0.5 + 0.9*2 - 1   = 1.3    A_0 =  1.3 - 0.72          R_0 = 0.58   + 1   = 1.58
    reward_BR = torch.tensor([[1.0, 0.0, 2.0], [0.5, 1.0, NAN]])
    value_BR = torch.tensor([[0.5, 1.0, -1.0], [1.0, 2.0, INF]])
    mask_BR = length_mask(torch.tensor([3, 2]))
    advantage_BR, return_BR = generalized_advantage(reward_BR, value_BR, mask_BR, gamma=0.9, lam=0.8)
    torch.testing.assert_close(advantage_BR, torch.tensor([[1.5872, 0.26, 3.0], [0.58, -1.0, 0.0]]))
    torch.testing.assert_close(return_BR, torch.tensor([[2.0872, 1.26, 2.0], [1.58, 1.0, 0.0]]))


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_lambda_1_is_monte_carlo_and_lambda_0_is_the_td_error(gamma: float) -> None:
    generator = torch.Generator().manual_seed(2)
    reward_BR, value_BR = torch.randn(2, 4, 7, generator=generator)
    lengths = [7, 1, 4, 6]
    mask_BR = length_mask(torch.tensor(lengths))
    monte_carlo_BR, _ = generalized_advantage(reward_BR, value_BR, mask_BR, gamma=gamma, lam=1.0)
    temporal_BR, _ = generalized_advantage(reward_BR, value_BR, mask_BR, gamma=gamma, lam=0.0)
    for row, length in enumerate(lengths):
        for t in range(length):
            earned = sum(gamma ** (k - t) * reward_BR[row, k] for k in range(t, length))
            following = value_BR[row, t + 1] if t + 1 < length else 0.0
            torch.testing.assert_close(monte_carlo_BR[row, t], earned - value_BR[row, t])
            torch.testing.assert_close(
                temporal_BR[row, t], reward_BR[row, t] + gamma * following - value_BR[row, t]
            )


def test_a_mask_with_holes_is_refused() -> None:
    zeros_BR, mask_BR = torch.zeros(1, 3), torch.tensor([[True, False, True]])
    with pytest.raises(AssertionError):
        generalized_advantage(zeros_BR, zeros_BR, mask_BR, gamma=1.0, lam=0.95)


def test_moments_by_hand() -> None:
    x_BR, mask_BR = torch.tensor([[1.0, 5.0], [2.0, NAN]]), torch.tensor([[True, True], [False, False]])
    moments = masked_moments(x_BR, mask_BR)
    assert moments.dtype == torch.float64
    assert moments.tolist() == [2.0, 6.0, 26.0]


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        ([1.0, 5.0, NAN], [-1.0, 1.0, 0.0]),  # mean 3, deviation 2
        ([1.0, 5.0, INF], [-1.0, 1.0, 0.0]),
        ([0.1, 0.1, NAN], [0.0, 0.0, 0.0]),  # nothing to tell apart, and no division by 0
        ([0.0, 2e-4, NAN], [-(0.5**0.5), 0.5**0.5, 0.0]),  # the variance is no more than what is added to it
        ([10001.0, 10003.0, NAN], [-1.0, 1.0, 0.0]),  # fp32 squares would lose this variance
    ],
)
def test_whitening_by_hand(x: list[float], expected: list[float]) -> None:
    x_BR, mask_BR = torch.tensor([x]), torch.tensor([[True, True, False]])
    result = whiten(x_BR, mask_BR, masked_moments(x_BR, mask_BR))
    torch.testing.assert_close(result, torch.tensor([expected]), atol=1e-5, rtol=0)


def test_whitening_does_not_depend_on_the_number_of_ranks() -> None:
    x_BR = torch.randn(5, 6, generator=torch.Generator().manual_seed(3)) * 4 + 7
    mask_BR = length_mask(torch.tensor([1, 2, 6, 3, 5]))
    together_BR = whiten(x_BR, mask_BR, masked_moments(x_BR, mask_BR))
    ranks = [(x_BR[:2, :2], mask_BR[:2, :2]), (x_BR[2:], mask_BR[2:])]  # each padded to its own length
    moments = torch.stack([masked_moments(*rank) for rank in ranks]).sum(0)
    torch.testing.assert_close(whiten(*ranks[0], moments), together_BR[:2, :2])
    torch.testing.assert_close(whiten(*ranks[1], moments), together_BR[2:])
    assert together_BR[mask_BR].mean().item() == pytest.approx(0.0, abs=1e-6)
    assert together_BR[mask_BR].var(correction=0).item() == pytest.approx(1.0, abs=1e-5)


def test_masks() -> None:
    mask_BR = length_mask(torch.tensor([2, 0, 3]))
    assert mask_BR.tolist() == [[True, True, False], [False, False, False], [True, True, True]]
    assert is_right_padded(mask_BR)
    assert not is_right_padded(torch.tensor([[True, True], [False, True]]))
