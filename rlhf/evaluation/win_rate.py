"""Wins between two sets of answers. Dimensions: B prompts or pairs, each answered once by both sides."""

from __future__ import annotations

from torch import Tensor


def both_scored(score_B: Tensor, other_B: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of both sides, in the rows where both have one."""
    both_B = ~(score_B.isnan() | other_B.isnan())
    return score_B[both_B], other_B[both_B]


def wins(score_B: Tensor, other_B: Tensor) -> Tensor:
    """fp64: 1 where the first answer scores higher, 0 where lower, 0.5 for a tie."""
    lead_B = score_B.double() - other_B.double()
    assert bool(lead_B.isfinite().all()), "a score that is not finite would count as a loss"
    return (lead_B.sign() + 1) / 2
