"""Language-modelling losses. Dimensions: B sequences, T tokens."""

import torch
from torch import Tensor


def next_token_loss(logp_BT: Tensor, mask_BT: Tensor, *, total_tokens: int | float) -> Tensor:
    """Negative log-likelihood, in nats per token, of text that the policy should not forget.

    Source: Ouyang et al. 2022, arXiv:2203.02155, eq. 2, last term (PPO-ptx), without its weight gamma.

    Whatever stands in padding, inf and nan included, reaches neither the loss nor the gradient.

    Args:
        logp_BT: nats, of each token given those before it; carries the gradient.
        mask_BT: bool, true on the tokens to learn, false on padding and on each sequence's first
            token, which nothing predicts.
        total_tokens: true mask entries over all ranks and micro-batches.
    """
    assert logp_BT.shape == mask_BT.shape  # no broadcasting
    assert mask_BT.dtype == torch.bool and total_tokens > 0
    return -torch.where(mask_BT, logp_BT, 0.0).sum() / total_tokens
