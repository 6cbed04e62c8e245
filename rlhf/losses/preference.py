"""Losses that learn a policy from preferences, without a reward model and without sampling.

Dimensions: B pairs or answers. A *log-ratio* is how much more likely, in nats, the policy makes an answer
than the reference does: log pi(y|x) - log ref(y|x), summed over the answer's tokens.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo_loss(ratio_gap_B: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Direct preference optimisation: the negative log-likelihood, in nats, that the chosen answer wins.

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; with label smoothing (cDPO) Mitchell 2023,
    ericmitchell.ai/cdpo.pdf, eq. 3:
    -(1 - e) log sigmoid(beta gap) - e log sigmoid(-beta gap).

    Args:
        ratio_gap_B: nats, the chosen answer's log-ratio minus the rejected one's; carries the gradient.
        beta: how strongly the policy is held near the reference; larger is nearer.
        label_smoothing: e, the share of pairs whose preference is taken to be wrong, from 0 to 0.5.

    Returns:
        [B], the loss of each pair.
    """
    right_B, wrong_B = logsigmoid(beta * ratio_gap_B), logsigmoid(-beta * ratio_gap_B)
    return -(1 - label_smoothing) * right_B - label_smoothing * wrong_B


def ipo_loss(mean_ratio_gap_B: Tensor, *, beta: float) -> Tensor:
    """Identity preference optimisation: the squared distance of the gap from 1 / (2 beta), its optimum.

    Source: Azar et al. 2023, arXiv:2310.12036, eq. 17, where beta is tau. The paper's gap is of whole
    answers. Here log-ratios are means over an answer's tokens, as in TRL, whose authors had it from the
    paper's: the optimum then does not depend on the answers' lengths.

    Args:
        mean_ratio_gap_B: nats a token, the chosen answer's mean log-ratio minus the rejected one's; carries
            the gradient.
        beta: how strongly the policy is held near the reference.

    Returns:
        [B], the loss of each pair.
    """
    return torch.square(mean_ratio_gap_B - 1 / (2 * beta))


def simpo_loss(mean_logp_gap_B: Tensor, *, beta: float, gamma: float, label_smoothing: float = 0.0) -> Tensor:
    """Simple preference optimisation: DPO's loss without a reference, by likelihoods per token, and with a
    margin that the chosen answer must be ahead by.

    Source: Meng et al. 2024, arXiv:2405.14734, eq. 6: -log sigmoid(beta gap - gamma).

    Args:
        mean_logp_gap_B: nats a token, the chosen answer's mean log-probability minus the rejected one's;
            carries the gradient.
        beta: scale of the gap, usually 2 to 10.
        gamma: the margin, in units of the scaled gap.
        label_smoothing: as of `dpo_loss`.

    Returns:
        [B], the loss of each pair.
    """
    return dpo_loss(mean_logp_gap_B - gamma / beta, beta=beta, label_smoothing=label_smoothing)


def kto_loss(
    ratio_B: Tensor,
    is_desirable_B: Tensor,
    *,
    beta: float,
    point: Tensor | float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """Kahneman-Tversky optimisation: each answer by itself, as a gain or a loss against a reference point.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8 without its constant part:
    weight (1 - sigmoid(beta (ratio - point))) of a desirable answer,
    weight (1 - sigmoid(beta (point - ratio))) of another one.

    Args:
        ratio_B: nats, each answer's log-ratio; carries the gradient.
        is_desirable_B: bool, true where the answer has a thumb up.
        beta: how averse to risk it is: larger saturates earlier.
        point: nats, from `kto_point`; a number as far as gradients are concerned.

    Returns:
        [B], the loss of each answer.
    """
    assert ratio_B.shape == is_desirable_B.shape and is_desirable_B.dtype == torch.bool
    ahead_B = torch.where(is_desirable_B, ratio_B - point, point - ratio_B)
    weight_B = torch.where(is_desirable_B, desirable_weight, undesirable_weight).to(ratio_B)
    return weight_B * (1 - torch.sigmoid(beta * ahead_B))


def kto_point(ratio_sum: Tensor, total: int | float) -> Tensor:
    """KTO's reference point: an estimate, never below 0, of the policy's KL from the reference.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1: max(0, mean log-ratio) over prompts with an
    answer to another prompt.

    Args:
        ratio_sum: nats, the sum of these log-ratios over all ranks; without gradient.
        total: how many they are.
    """
    return (ratio_sum.detach() / total).clamp(min=0.0)
