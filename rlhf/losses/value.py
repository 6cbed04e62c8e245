"""Value losses. Dimensions: B sequences, R response tokens (prompt excluded)."""

from typing import NamedTuple

import torch
from torch import Tensor


class ValueLoss(NamedTuple):
    """The loss, and a detached sum over this micro-batch's tokens that ranks can add."""

    loss: Tensor
    """Scalar, carries the gradient. Add over micro-batches and ranks; never average."""
    clipped: Tensor
    """Count of tokens whose gradient is cut."""


def clipped_value_loss(
    value_BR: Tensor,
    old_value_BR: Tensor,
    return_BR: Tensor,
    mask_BR: Tensor,
    *,
    clip: float | None,
    total_tokens: int | float,
) -> ValueLoss:
    """Squared error of the critic, which may move at most `clip` away from the rollout's value.

    Source: OpenAI's baselines and lm-human-preferences, written down in Huang et al. 2024, arXiv:2403.17031:
    1/2 sum_m max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / total_tokens.

    Whatever stands in padding, inf and nan included, reaches neither the loss nor the gradient.

    Args:
        value_BR: units of the normalised reward, fp32, from the critic being trained; carries the gradient.
        old_value_BR: same units, from the critic as it was at the rollout.
        return_BR: same units, the regression target: unwhitened advantage plus `old_value_BR`.
        mask_BR: bool, true on sampled tokens, false on padding.
        clip: same units; None for the plain squared error.
        total_tokens: true mask entries over all ranks and micro-batches, the policy loss's count.
    """
    assert value_BR.shape == old_value_BR.shape == return_BR.shape == mask_BR.shape  # no broadcasting
    assert mask_BR.dtype == torch.bool and total_tokens > 0
    assert clip is None or clip > 0
    value_BR = torch.where(mask_BR, value_BR, 0.0)
    old_value_BR = torch.where(mask_BR, old_value_BR.detach(), 0.0)
    return_BR = torch.where(mask_BR, return_BR.detach(), 0.0)

    error_BR = (value_BR - return_BR).square()
    if clip is None:
        return ValueLoss(loss=0.5 * error_BR.sum() / total_tokens, clipped=torch.zeros_like(mask_BR).sum())
    bounded_value_BR = value_BR.clamp(old_value_BR - clip, old_value_BR + clip)
    bounded_error_BR = (bounded_value_BR - return_BR).square()
    return ValueLoss(
        loss=0.5 * torch.maximum(error_BR, bounded_error_BR).sum() / total_tokens,
        clipped=(bounded_error_BR > error_BR).sum(),
    )
