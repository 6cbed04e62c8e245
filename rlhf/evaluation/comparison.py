"""Who wins, and how sure that is. Dimensions: B prompts, each answered once by both policies."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Interval(NamedTuple):
    """A bootstrap confidence interval of a mean."""

    low: float
    high: float


def wins(score_B: Tensor, other_B: Tensor) -> Tensor:
    """fp64 [B]: 1 where the first answer scores higher, 0 where lower, 0.5 for a tie."""
    lead_B = score_B.double() - other_B.double()
    assert bool(lead_B.isfinite().all()), "a score that is not finite would count as a loss"
    return (lead_B.sign() + 1) / 2


def bootstrap_interval(value_B: Tensor, *, samples: int, seed: int, level: float = 0.95) -> Interval:
    """Percentile interval of the mean, prompts drawn anew with replacement.

    Both answers to a prompt stay together, because value_B already compares them.
    Source: Efron & Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13.

    Args:
        value_B: one number a prompt, such as `wins`.
        samples: how many data sets of B prompts are drawn.
        level: the share of their means that lies inside.
    """
    generator = torch.Generator().manual_seed(seed)
    value_B = value_B.double()
    means = torch.stack([
        value_B[torch.randint(len(value_B), (len(value_B),), generator=generator)].mean()
        for _ in range(samples)
    ])  # fmt: skip
    tail = (1 - level) / 2
    return Interval(float(means.quantile(tail)), float(means.quantile(1 - tail)))
