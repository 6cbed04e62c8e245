"""From a rollout and what the models say of it to experience. Dimensions: B episodes, R response tokens."""

from dataclasses import dataclass

from torch import Tensor

from rlhf.rl.advantage import generalized_advantage, masked_moments, whiten
from rlhf.rl.rollout import Experience, Rollout
from rlhf.rl.scores import ScoreNormalizer, missing_stop, token_rewards


@dataclass(frozen=True)
class RewardRule:
    """How a score and the KL penalty become a reward per token."""

    normalizer: ScoreNormalizer
    kl_coef: float
    """Normalised reward per nat."""
    missing_stop_score: float | None
    """Normalised score that replaces the score of a response cut by the length limit; None keeps it."""
    missing_stop_penalty: float
    """Taken from such a response's normalised score; only without a replacement."""


def make_experience(
    rollout: Rollout,
    *,
    logp_BR: Tensor,
    reference_logp_BR: Tensor,
    value_BR: Tensor,
    score_B: Tensor,
    rule: RewardRule,
    gamma: float,
    lam: float,
) -> Experience:
    """Rewards, advantages (whitened over the whole rollout) and returns.

    Args:
        rollout: all episodes, of all ranks: moments of a part would make the result depend on their number.
        logp_BR: nats, under the sampling policy, from the training kernels.
        reference_logp_BR: nats, under the frozen reference.
        value_BR: units of the normalised reward.
        score_B: raw score units; finite.
    """
    mask_BR = rollout.mask_BR
    rule.normalizer.update(masked_moments(score_B, score_B.isfinite()))
    normalized_B = missing_stop(
        rule.normalizer.apply(score_B),
        rollout.stopped,
        replacement=rule.missing_stop_score,
        penalty=rule.missing_stop_penalty,
    )
    reward_BR = token_rewards(logp_BR, reference_logp_BR, mask_BR, normalized_B, kl_coef=rule.kl_coef)
    advantage_BR, return_BR = generalized_advantage(reward_BR, value_BR, mask_BR, gamma=gamma, lam=lam)
    whitened_BR = whiten(advantage_BR, mask_BR, masked_moments(advantage_BR, mask_BR))
    return Experience(
        rollout=rollout,
        score_B=score_B,
        logp_BR=logp_BR,
        reference_logp_BR=reference_logp_BR,
        value_BR=value_BR,
        reward_BR=reward_BR,
        advantage_BR=whitened_BR,
        return_BR=return_BR,
    )
