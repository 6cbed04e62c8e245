"""From a scalar score to a reward per token. Dimensions: B sequences, R response tokens (prompt excluded)."""

import math

import torch
from torch import Tensor

from rlhf.rl.advantage import mean_and_variance
from rlhf.rl.kl import kl_k1
from rlhf.rl.rollout import is_right_padded

DEVIATION_FLOOR = 1e-4
"""Score units. Keeps running normalisation finite when all scores so far are equal."""


@torch.no_grad()
def token_rewards(
    logp_BR: Tensor, reference_logp_BR: Tensor, mask_BR: Tensor, score_B: Tensor, *, kl_coef: float
) -> Tensor:
    """r_t = -kl_coef (logp - reference_logp)_t, plus the score on each row's last real token; 0 on padding.

    Source: Ziegler et al. 2019, arXiv:1909.08593, eq. 2, spread over the tokens.

    Args:
        logp_BR: nats, under the policy that sampled the tokens.
        reference_logp_BR: nats, same tokens under the frozen reference.
        mask_BR: bool, right-padded, true on sampled tokens; no row may be empty.
        score_B: normalised score of the whole answer.
        kl_coef: normalised reward per nat.

    Returns:
        reward_BR, units of the normalised score, dtype of logp_BR.
    """
    assert is_right_padded(mask_BR) and bool(mask_BR.any(dim=1).all()), "every episode has at least one token"
    reward_BR = -kl_coef * kl_k1(logp_BR, reference_logp_BR, mask_BR)
    last_B = mask_BR.sum(dim=1) - 1
    reward_BR[torch.arange(len(last_B), device=last_B.device), last_B] += score_B.to(reward_BR.dtype)
    return reward_BR


def missing_stop(score_B: Tensor, stopped_B: Tensor, *, replacement: float | None, penalty: float) -> Tensor:
    """score_B, where an answer that was cut off before a stop token is re-scored or penalised.

    Source: Huang et al. 2024, arXiv:2403.17031, "EOS trick" (the replacement).

    Args:
        score_B: score units, raw or normalised, as long as `replacement` and `penalty` are in the same.
        stopped_B: bool, whether the answer ended by itself.
        replacement: score units; takes the score's place. None keeps the score.
        penalty: score units, not negative; subtracted from the score. Only without a replacement.
    """
    assert penalty >= 0.0 and (replacement is None or penalty == 0.0)
    if replacement is not None:
        return torch.where(stopped_B, score_B, replacement)
    return torch.where(stopped_B, score_B, score_B - penalty)


class ScoreNormalizer:
    """(score - mean) / deviation, clipped, so that a KL coefficient means the same for every reward model.

    Made by `fixed` or `running`. Source of the fixed form: Ziegler et al. 2019, arXiv:1909.08593, section 2;
    of the clipping: Zheng et al. 2023, arXiv:2307.04964.
    """

    def __init__(
        self, *, count: float, mean: float, sum_squares: float, clip: float | None, frozen: bool
    ) -> None:
        self.count = count
        self.mean = mean
        self.sum_squares = sum_squares  # of distances from the mean; M2 in Chan et al. 1983
        self.clip = clip
        self.frozen = frozen

    @classmethod
    def fixed(cls, mean: float, deviation: float, clip: float | None) -> "ScoreNormalizer":
        """From moments measured once, such as those of the SFT policy's answers; `update` does nothing.

        Args:
            mean: score units.
            deviation: score units, positive.
            clip: deviations beyond which a normalised score is cut; None for never.
        """
        assert deviation > 0.0, "all measured scores are equal: nothing to learn from them"
        return cls(count=1.0, mean=mean, sum_squares=deviation**2, clip=clip, frozen=True)

    @classmethod
    def running(cls, clip: float | None) -> "ScoreNormalizer":
        """From the moments of all scores so far; `update` comes before the first `apply`."""
        return cls(count=0.0, mean=0.0, sum_squares=0.0, clip=clip, frozen=False)

    @property
    def deviation(self) -> float:
        """Score units; population standard deviation."""
        assert self.count > 0.0, "update comes before the first apply"
        return max(math.sqrt(self.sum_squares / self.count), DEVIATION_FLOOR)

    def update(self, moments: Tensor) -> None:
        """Merge another batch of scores.

        Source: Chan, Golub, LeVeque 1983, "Algorithms for computing the sample variance", pairwise update.

        Args:
            moments: `masked_moments` of the batch's scores, added over all ranks: count, sum, sum of squares.
        """
        count = float(moments[0])
        if self.frozen or count == 0:
            return
        mean, variance = mean_and_variance(moments)
        distance = mean - self.mean
        merged = self.count + count
        self.sum_squares += variance * count + distance**2 * self.count * count / merged
        self.mean += distance * count / merged
        self.count = merged

    def apply(self, score_B: Tensor) -> Tensor:
        """Deviations from the mean, clipped; dtype of score_B."""
        normalized_B = (score_B - self.mean) / self.deviation
        return normalized_B if self.clip is None else normalized_B.clamp(-self.clip, self.clip)

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "sum_squares": self.sum_squares}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.count = state["count"]
        self.mean = state["mean"]
        self.sum_squares = state["sum_squares"]
