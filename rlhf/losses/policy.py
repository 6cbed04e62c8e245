"""Policy losses. Dimensions: B sequences, R response tokens (prompt excluded)."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""Nats. exp overflows fp32 at 89 and its gradient is then 0 * inf = nan, beyond repair by clipping norms."""


class PolicyLoss(NamedTuple):
    """The loss, and detached sums over this micro-batch's tokens that ranks can add."""

    loss: Tensor
    """Scalar, carries the gradient. Add over micro-batches and ranks; never average."""
    clipped: Tensor
    """Count of tokens whose gradient is cut."""
    approximate_kl: Tensor
    """Nats, sum of rho - 1 - log rho, which estimates KL(sampling policy || trained policy)."""
    max_ratio: Tensor
    """The largest rho, 0 when no token is masked in. Reduce with a maximum."""
    ratio_deviation: Tensor
    """Sum of `|rho - 1|`: 0 before the first update, unless the sampler and the trainer disagree."""


LossMean = Literal["token", "sequence", "constant"]


def loss_weights(
    length_B: Tensor, mean: LossMean, *, total_tokens: int, num_episodes: int, longest: int
) -> Tensor | None:
    """By sequence, the factor of its tokens' losses, so that their sum / total_tokens is the wanted mean.

    token: the mean over all tokens, so each token counts the same (Yu et al. 2025, DAPO, arXiv:2503.14476,
    eq. 12). None: every factor is 1.
    sequence: the mean over sequences of the mean over their tokens, so each sequence counts the same (Shao et
    al. 2024, GRPO, arXiv:2402.03300, eq. 3).
    constant: the sum over all tokens / (num_episodes longest), so that a token's weight depends on no length
    (Liu et al. 2025, Dr. GRPO, arXiv:2503.20783, section 3.2).

    Args:
        length_B: long, response tokens.
        total_tokens: response tokens of the whole optimizer step, over all ranks and micro-batches.
        num_episodes: the same of sequences.
        longest: tokens, the limit of a response.
    """
    if mean == "token":
        return None
    per_B = length_B.float() if mean == "sequence" else torch.full_like(length_B, longest).float()
    return total_tokens / (num_episodes * per_B)


def clipped_policy_loss(
    logp_BR: Tensor,
    sampled_logp_BR: Tensor,
    advantage_BR: Tensor,
    mask_BR: Tensor,
    *,
    clip: float,
    total_tokens: int | float,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    weight_B: Tensor | None = None,
    ratio: Literal["token", "sequence"] = "token",
) -> PolicyLoss:
    """PPO's clipped objective, negated so that lower is better.

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7, with rho the probability ratio:
    sum_m max(-A rho, -A clip(rho, 1 - clip, 1 + clip)) / total_tokens. The separate upper bound is
    "Clip-Higher" of Yu et al. 2025 (DAPO), arXiv:2503.14476; the dual clip, max(eq. 7, c A) where A < 0,
    is Ye et al. 2020, arXiv:1912.09729.

    Whatever stands in padding, inf and nan included, reaches neither the loss nor the gradient. A log-ratio
    beyond LOG_RATIO_LIMIT is cut to it and earns no gradient, in every number returned here; a nan on a real
    token stays a nan, for the caller to report.

    Args:
        logp_BR: nats, fp32, under the policy being trained; carries the gradient.
        sampled_logp_BR: nats, fp32, same tokens under the policy that sampled them.
        advantage_BR: whitened, so unitless; positive is better than expected.
        mask_BR: bool, true on sampled tokens, false on padding.
        clip: how far the probability ratio may leave 1 and still earn gradient.
        total_tokens: true mask entries over all ranks and micro-batches. Local means
            would weight a short micro-batch's tokens more than a long one's.
        clip_high: the same distance upwards, where it differs from `clip`.
        dual_clip: the ratio, above 1, beyond which a token with a negative advantage stops earning gradient.
            eq. 7 leaves that side unbounded, so one stale token can dominate the step.
        weight_B: fp32, of `loss_weights`; a factor of each token's loss. None for 1.
        ratio: `sequence` gives all tokens of a sequence the ratio exp(mean_t log rho_t), the geometric mean
            of theirs; the gradient of a token's loss goes to its own log-probability. Source: Zheng et al.
            2025 (GSPO), arXiv:2507.18071, eq. 7 and 14 (GSPO-token, which is eq. 5 where a sequence's
            advantages are equal and `loss_weights` are those of `sequence`).
    """
    assert logp_BR.shape == sampled_logp_BR.shape == advantage_BR.shape == mask_BR.shape  # no broadcasting
    assert mask_BR.dtype == torch.bool and total_tokens > 0
    assert dual_clip is None or dual_clip > 1.0
    # Masked before exp: a nan behind torch.where still comes back as 0 * nan in exp's backward pass.
    raw_log_ratio_BR = torch.where(mask_BR, logp_BR - sampled_logp_BR.detach(), 0.0)
    advantage_BR = torch.where(mask_BR, advantage_BR.detach(), 0.0)
    log_ratio_BR = raw_log_ratio_BR.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio_BR = log_ratio_BR.exp() if ratio == "token" else _sequence_ratio(log_ratio_BR, mask_BR)
    bounded_ratio_BR = ratio_BR.clamp(1.0 - clip, 1.0 + (clip if clip_high is None else clip_high))

    free_BR = -advantage_BR * ratio_BR
    bounded_BR = -advantage_BR * bounded_ratio_BR
    loss_BR = torch.maximum(free_BR, bounded_BR)
    cut_BR = bounded_BR > free_BR
    if dual_clip is not None:
        too_likely_BR = (advantage_BR < 0) & (ratio_BR > dual_clip)
        loss_BR = torch.where(too_likely_BR, -advantage_BR * dual_clip, loss_BR)
        cut_BR = cut_BR | too_likely_BR
    loss_BR = loss_BR if weight_B is None else weight_B[:, None] * loss_BR
    loss = loss_BR.sum() / total_tokens
    cut_BR = cut_BR | (raw_log_ratio_BR.abs() > LOG_RATIO_LIMIT)
    return with_figures(loss, logp_BR, sampled_logp_BR, mask_BR)._replace(clipped=cut_BR.sum())


@torch.no_grad()
def with_figures(loss: Tensor, logp_BR: Tensor, sampled_logp_BR: Tensor, mask_BR: Tensor) -> PolicyLoss:
    """A loss with what the ratios say of it; none of them is clipped.

    Args:
        loss: scalar, carries the gradient.
        logp_BR, sampled_logp_BR, mask_BR: as of `clipped_policy_loss`.
    """
    log_ratio_BR = torch.where(mask_BR, logp_BR - sampled_logp_BR, 0.0)
    log_ratio_BR = log_ratio_BR.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return PolicyLoss(
        loss=loss,
        clipped=torch.zeros((), dtype=torch.long, device=logp_BR.device),
        approximate_kl=(log_ratio_BR.expm1() - log_ratio_BR).sum(),
        max_ratio=torch.where(mask_BR, log_ratio_BR.exp(), 0.0).max(),
        ratio_deviation=log_ratio_BR.expm1().abs().sum(),
    )


def _sequence_ratio(log_ratio_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """[B, R]: each row's geometric mean of the ratios, with each token's own gradient."""
    mean_B1 = log_ratio_BR.detach().sum(1, keepdim=True) / mask_BR.sum(1, keepdim=True).clamp(min=1)
    return (log_ratio_BR - log_ratio_BR.detach() + mean_B1).exp()


def kl_loss(
    logp_BR: Tensor, reference_logp_BR: Tensor, mask_BR: Tensor, *, total_tokens: int, weight_B: Tensor | None
) -> Tensor:
    """The KL penalty as a loss, estimator k3: sum_m (s - 1 - log s) / total_tokens, s = reference / policy.

    Source: Shao et al. 2024, arXiv:2402.03300, eq. 4. Estimator k1 is no loss: the gradient of logp alone is
    0 on average.

    Args:
        logp_BR: nats, fp32, under the policy being trained; carries the gradient.
        reference_logp_BR: nats, same tokens under the frozen reference.
        mask_BR: bool, true on sampled tokens, false on padding.
        total_tokens, weight_B: as of `clipped_policy_loss`.

    Returns:
        Scalar, nats, carries the gradient. A log-ratio beyond LOG_RATIO_LIMIT earns none.
    """
    assert logp_BR.shape == reference_logp_BR.shape == mask_BR.shape and total_tokens > 0
    log_ratio_BR = torch.where(mask_BR, reference_logp_BR.detach() - logp_BR, 0.0)
    log_ratio_BR = log_ratio_BR.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    loss_BR = log_ratio_BR.expm1() - log_ratio_BR
    return (loss_BR if weight_B is None else weight_B[:, None] * loss_BR).sum() / total_tokens
