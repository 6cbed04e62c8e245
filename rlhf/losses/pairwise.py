"""Losses on preference pairs. Dimensions: B pairs."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry_loss(
    chosen_B: Tensor,
    rejected_B: Tensor,
    *,
    total_pairs: int | float,
    center: float = 0.0,
) -> Tensor:
    """Negative log-likelihood, in nats, that the chosen answer beats the rejected one.

    Source: Ouyang et al. 2022, arXiv:2203.02155, eq. 1 (one pair a prompt); the centering is Eisenstein et
    al. 2023, arXiv:2312.09244, eq. 2:
    sum_B (-log sigmoid(chosen - rejected) + center (chosen + rejected)^2) / total_pairs.

    Args:
        chosen_B: logits, the scores of the preferred answers; carries the gradient.
        rejected_B: logits, the scores of the other answers; carries the gradient.
        total_pairs: pairs over all ranks and micro-batches.
        center: weight that pulls scores towards 0, since the preference itself leaves their offset free.
    """
    # A head's [B, 1] against [B] would silently compare every chosen answer with every rejected one.
    assert chosen_B.shape == rejected_B.shape
    loss_B = -logsigmoid(chosen_B - rejected_B) + center * torch.square(chosen_B + rejected_B)
    return loss_B.sum() / total_pairs
