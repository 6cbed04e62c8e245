"""Advantages. Dimensions: B sequences, R response tokens (prompt excluded)."""

import torch
from torch import Tensor

from rlhf.rl.rollout import is_right_padded

VARIANCE_FLOOR = 1e-8
"""Keeps whitening finite when all values are equal; Huang et al. 2024, arXiv:2403.17031."""


@torch.no_grad()
def generalized_advantage(
    reward_BR: Tensor, value_BR: Tensor, mask_BR: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation, and the critic's regression target.

    Source: Schulman et al. 2016, arXiv:1506.02438, eq. 16, as the backward recursion
    delta_t = r_t + gamma V_{t+1} - V_t; A_t = delta_t + gamma lam A_{t+1}; V and A are 0 after the last real
    token, because the episode ends there.

    Args:
        reward_BR: units of the normalised reward; what was earned by emitting token t.
        value_BR: same units, the critic's V(prompt + y_<t), before token t.
        mask_BR: bool, right-padded, true on sampled tokens.
        gamma: discount per token; 1 in language tasks, where the length should not matter.
        lam: 0 trusts the critic alone, 1 the sampled rewards alone.

    Returns:
        advantage_BR and return_BR = advantage + value, both not whitened, and 0 outside the mask.
    """
    assert is_right_padded(mask_BR)
    reward_BR = torch.where(mask_BR, reward_BR, 0.0)
    value_BR = torch.where(mask_BR, value_BR, 0.0)

    advantage_BR = torch.zeros_like(value_BR)
    next_value_B = value_BR.new_zeros(len(value_BR))
    next_advantage_B = next_value_B
    # Padding has value and reward 0, hence advantage 0: the terminal state that each row's last token sees.
    for t in reversed(range(value_BR.shape[1])):
        delta_B = reward_BR[:, t] + gamma * next_value_B - value_BR[:, t]
        next_advantage_B = delta_B + gamma * lam * next_advantage_B
        next_value_B = value_BR[:, t]
        advantage_BR[:, t] = next_advantage_B
    return advantage_BR, advantage_BR + value_BR


def masked_moments(x_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """float64 [3]: count, sum and sum of squares over the mask. Ranks add theirs to get the global ones.

    float64, because the variance is the small difference of two large numbers. Takes any shape, [B] included.
    """
    assert x_BR.shape == mask_BR.shape
    x_BR = torch.where(mask_BR, x_BR.detach().double(), 0.0)
    return torch.stack((mask_BR.sum().double(), x_BR.sum(), x_BR.square().sum()))


def mean_and_variance(moments: Tensor) -> tuple[float, float]:
    """Mean and population variance from `masked_moments`, which must have counted something."""
    count, total, total_square = moments.tolist()
    assert count > 0
    mean, mean_square = total / count, total_square / count
    variance = mean_square - mean**2
    # What the subtraction's rounding leaves of equal values is no variance.
    return mean, variance if variance > 1e-13 * mean_square else 0.0


def whiten(x_BR: Tensor, mask_BR: Tensor, moments: Tensor) -> Tensor:
    """x with mean 0 and (population) variance 1 over all that `moments` counted; 0 outside the mask.

    Source: Huang et al. 2024, arXiv:2403.17031, "Reward and advantage whitening".

    Args:
        x_BR: any unit.
        mask_BR: bool, true on sampled tokens.
        moments: `masked_moments`, added over all ranks. Local ones would make the result depend on the
            number of GPUs.
    """
    mean, variance = mean_and_variance(moments)
    whitened_BR = (x_BR.double() - mean) / (variance + VARIANCE_FLOOR) ** 0.5
    return torch.where(mask_BR, whitened_BR, 0.0).to(x_BR.dtype)
