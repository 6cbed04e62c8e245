"""From a score to an advantage per token. Dimensions: B sequences, R response tokens (prompt excluded).

In the order in which `make_experience` calls them: the score is normalised, an answer without a stop token is
penalised, the KL penalty is spread over the tokens, and what is left becomes advantages, which are whitened.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

DEVIATION_FLOOR = 1e-4
"""Score units. Keeps running normalisation finite when all scores so far are equal."""
LARGEST_ERROR = 0.2
"""Relative distance from the target beyond which the adaptive controller reacts no stronger."""
VARIANCE_FLOOR = 1e-8
"""Keeps whitening finite when all values are equal; Huang et al. 2024, arXiv:2403.17031."""


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
    def fixed(cls, mean: float, deviation: float, clip: float | None) -> ScoreNormalizer:
        """From moments measured once, such as those of the SFT policy's answers; `update` does nothing.

        Args:
            mean: score units.
            deviation: score units, positive.
            clip: deviations beyond which a normalised score is cut; None for never.
        """
        assert deviation > 0.0, "all measured scores are equal: nothing to learn from them"
        return cls(count=1.0, mean=mean, sum_squares=deviation**2, clip=clip, frozen=True)

    @classmethod
    def running(cls, clip: float | None) -> ScoreNormalizer:
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


@dataclass(frozen=True)
class OverlongPenalty:
    """What a response loses near the length limit, before it is cut there: a soft edge.

    0 up to longest - buffer tokens, then linear to -penalty at the limit.
    Source: Yu et al. 2025 (DAPO), arXiv:2503.14476, eq. 13, "Soft Overlong Punishment"; there penalty is 1.
    """

    longest: int
    """Tokens; a longer response is cut."""
    buffer: int
    """Tokens before the limit over which the penalty grows."""
    penalty: float
    """Units of the normalised score."""

    def __call__(self, length_B: Tensor) -> Tensor:
        """What is added to the normalised score, fp32, never above 0. length_B: response tokens."""
        over_B = (length_B - (self.longest - self.buffer)).float() / self.buffer
        return -self.penalty * over_B.clamp(0.0, 1.0)


@torch.no_grad()
def token_rewards(
    logp_BR: Tensor,
    reference_logp_BR: Tensor,
    mask_BR: Tensor,
    score_B: Tensor,
    *,
    kl_coef: float,
    kl_estimator: Literal["k1", "k3"] = "k1",
) -> Tensor:
    """r_t = -kl_coef (logp - reference_logp)_t, plus the score on each row's last real token; 0 on padding.

    Source: Ziegler et al. 2019, arXiv:1909.08593, eq. 2, spread over the tokens.

    Args:
        logp_BR: nats, under the policy that sampled the tokens.
        reference_logp_BR: nats, same tokens under the frozen reference.
        mask_BR: bool, right-padded, true on sampled tokens; no row may be empty.
        score_B: normalised score of the whole answer.
        kl_coef: normalised reward per nat.
        kl_estimator: k3 puts that estimate in the place of the log-ratio.

    Returns:
        reward_BR, units of the normalised score, dtype of logp_BR.
    """
    assert is_right_padded(mask_BR) and bool(mask_BR.any(dim=1).all()), "every episode has at least one token"
    estimate = {"k1": kl_k1, "k3": kl_k3}[kl_estimator]
    reward_BR = -kl_coef * estimate(logp_BR, reference_logp_BR, mask_BR)
    last_B = mask_BR.sum(dim=1) - 1
    reward_BR[torch.arange(len(last_B), device=last_B.device), last_B] += score_B.to(reward_BR.dtype)
    return reward_BR


def kl_k1(logp_BR: Tensor, reference_logp_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """Nats a token, [B, R], 0 outside the mask: logp - reference_logp. Unbiased; may be negative; noisy.

    Its mean over samples of the policy estimates KL(policy || reference).
    Source: Schulman 2020, "Approximating KL divergence", joschu.net/blog/kl-approx.html, estimator k1.
    """
    return torch.where(mask_BR, logp_BR - reference_logp_BR, 0.0)


def kl_k3(logp_BR: Tensor, reference_logp_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """Nats a token, [B, R], 0 outside the mask: s - 1 - log s, s = reference / policy. Unbiased, never < 0.

    Its mean over samples of the policy estimates KL(policy || reference), with less variance than k1.
    Source: Schulman 2020, "Approximating KL divergence", joschu.net/blog/kl-approx.html, estimator k3.
    """
    log_ratio_BR = torch.where(mask_BR, reference_logp_BR - logp_BR, 0.0)
    return log_ratio_BR.expm1() - log_ratio_BR


@dataclass
class FixedKL:
    """A coefficient that stays as configured."""

    coef: float
    """Normalised reward per nat."""

    def update(self, kl: float, episodes: int) -> None:
        """Nothing to adapt."""

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coef = state["coef"]


@dataclass
class AdaptiveKL:
    """A coefficient steered so that the KL stays near a target.

    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2:
    `e = clip(kl / target - 1, -0.2, 0.2); coef *= 1 + e * episodes / horizon`.
    """

    coef: float
    """Normalised reward per nat; the starting value."""
    target: float
    """Nats a sequence."""
    horizon: float
    """Episodes; a longer one reacts more slowly. Ziegler's gain K_beta is episodes / horizon."""

    def update(self, kl: float, episodes: int) -> None:
        """Take one step.

        Args:
            kl: nats, summed over a sequence and averaged over the rollout's episodes, all ranks.
            episodes: how many that were.
        """
        assert not math.isnan(kl), "a nan KL would be clipped into a harmless-looking error"
        error = min(max(kl / self.target - 1.0, -LARGEST_ERROR), LARGEST_ERROR)
        factor = 1.0 + error * episodes / self.horizon
        assert factor > 0.0, f"horizon {self.horizon} must exceed {LARGEST_ERROR} x {episodes} episodes"
        self.coef *= factor

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coef = state["coef"]


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


def is_right_padded(mask_BR: Tensor) -> bool:
    """Whether every row is a run of true followed by a run of false, either of which may be empty."""
    return not bool((mask_BR[:, 1:] & ~mask_BR[:, :-1]).any())
