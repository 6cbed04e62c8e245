"""KL estimators and controllers. Dimensions: B sequences, R response tokens (prompt excluded)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_ERROR = 0.2
"""Relative distance from the target beyond which the adaptive controller reacts no stronger."""


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
