"""Advantages from several answers to one prompt, without a critic.

An episode's reward is compared with those of its group: the answers to the same prompt. All functions take
the episodes of all ranks. Dimensions: B episodes, R response tokens (prompt excluded), n answers of a group.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlhf.rl.advantage import is_right_padded, masked_moments, whiten

DEVIATION_FLOOR = 1e-4
"""Units of the reward. Added to a group's deviation, so that a group of nearly equal rewards gets no huge
advantages. TRL adds as much."""


@torch.no_grad()
def group_advantage(
    reward_BR: Tensor, mask_BR: Tensor, group_B: Tensor, *, divide_by_deviation: bool
) -> Tensor:
    """GRPO: how much better an answer is than the mean answer of its group, the same for each of its tokens.

    A = (r - mean(r_1 .. r_n)) / (std(r_1 .. r_n) + DEVIATION_FLOOR), r the sum of an answer's rewards, std
    with n - 1. Source: Shao et al. 2024, arXiv:2402.03300, section 4.1.2 (outcome supervision). Without the
    division: Liu et al. 2025 (Dr. GRPO), arXiv:2503.20783, section 3.2; dividing weights prompts of which
    nearly all answers are good, or bad, more than others.

    Args:
        reward_BR: units of the normalised reward.
        mask_BR: bool, right-padded, true on sampled tokens. A row without any is in no group: its answer has
            no score.
        group_B: long; episodes with the same number answer the same prompt.

    Returns:
        advantage_BR, dtype of reward_BR, 0 on padding. Exactly 0 for a group of equal rewards, or of one
        answer.
    """
    advantage_B, size_B = _distances(reward_BR, mask_BR, group_B)
    if divide_by_deviation:
        variance_B = _of_group(advantage_B.square(), group_B) / (size_B - 1).clamp(min=1)
        advantage_B = advantage_B / (variance_B.sqrt() + DEVIATION_FLOOR)
    return _on_tokens(advantage_B, mask_BR, reward_BR.dtype)


@torch.no_grad()
def leave_one_out_advantage(reward_BR: Tensor, mask_BR: Tensor, group_B: Tensor) -> Tensor:
    """RLOO: how much better an answer is than the mean of the others, the same for each of its tokens.

    A = r - (r_1 + .. + r_n - r) / (n - 1), which is n / (n - 1) times the distance from the group's mean. The
    others' mean does not depend on the answer, so the gradient's expectation is that without a baseline.
    Source: Ahmadian et al. 2024, arXiv:2402.14740, section 3.2; Kool et al. 2019.

    Args, Returns: as `group_advantage`.
    """
    advantage_B, size_B = _distances(reward_BR, mask_BR, group_B)
    advantage_B = advantage_B * size_B / (size_B - 1).clamp(min=1)
    return _on_tokens(advantage_B, mask_BR, reward_BR.dtype)


@torch.no_grad()
def batch_advantage(reward_BR: Tensor, mask_BR: Tensor, group_B: Tensor | None) -> Tensor:
    """REINFORCE++: the rewards from a token on, whitened over all tokens of the batch.

    A_t = (R_t - mean) / std, R_t = r_t + r_{t+1} + .. + r_T; mean and std over the tokens of all episodes.
    Source: Hu 2025, arXiv:2501.03262. With groups, the mean of the group's totals is subtracted from each R_t
    first (there: REINFORCE++-baseline).

    Args:
        reward_BR, mask_BR: as of `group_advantage`.
        group_B: None for no baseline.

    Returns:
        advantage_BR, dtype of reward_BR, 0 on padding.
    """
    assert is_right_padded(mask_BR)
    reward_BR = torch.where(mask_BR, reward_BR, 0.0)
    return_BR = reward_BR.double().flip(1).cumsum(1).flip(1)
    if group_B is not None:
        distance_B, _ = _distances(reward_BR, mask_BR, group_B)
        return_BR = return_BR + (distance_B - return_BR[:, 0])[:, None]
    whitened_BR = whiten(return_BR, mask_BR, masked_moments(return_BR, mask_BR))
    return whitened_BR.to(reward_BR.dtype)


def group_spread(score_B: Tensor, group_B: Tensor) -> Tensor:
    """By episode, the largest minus the smallest score of its group, fp64. NaN is no score; 0 without any."""
    score_B, none_B = score_B.double(), score_B.isnan()
    highest_B = _extreme(score_B.masked_fill(none_B, -torch.inf), group_B, "amax")
    lowest_B = _extreme(score_B.masked_fill(none_B, torch.inf), group_B, "amin")
    return (highest_B - lowest_B).clamp(min=0.0)


def neighbours(num_episodes: int, group_size: int) -> Tensor:
    """group_B for groups of neighbouring episodes."""
    return torch.arange(num_episodes) // group_size


def _distances(reward_BR: Tensor, mask_BR: Tensor, group_B: Tensor) -> tuple[Tensor, Tensor]:
    """By episode, its total reward minus its group's mean, and the group's size; fp64, in which the mean of
    equal fp32 numbers is exact. Rows without a token do not count, and get 0."""
    counts_B = mask_BR.any(1)
    total_B = torch.where(mask_BR, reward_BR, 0.0).sum(1, dtype=torch.float64)
    size_B = _of_group(counts_B.double(), group_B)
    distance_B = total_B - _of_group(total_B, group_B) / size_B.clamp(min=1)
    return torch.where(counts_B, distance_B, 0.0), size_B


def _of_group(x_B: Tensor, group_B: Tensor) -> Tensor:
    """By episode, the sum over its group."""
    sums = x_B.new_zeros(int(group_B.max()) + 1)
    return sums.index_add_(0, group_B, x_B)[group_B]


def _extreme(x_B: Tensor, group_B: Tensor, which: Literal["amin", "amax"]) -> Tensor:
    """By episode, the smallest or largest value of its group."""
    found = x_B.new_zeros(int(group_B.max()) + 1)
    return found.scatter_reduce_(0, group_B, x_B, which, include_self=False)[group_B]


def _on_tokens(x_B: Tensor, mask_BR: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(mask_BR, x_B[:, None], 0.0).to(dtype)
