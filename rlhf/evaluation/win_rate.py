"""Who wins. Dimensions: B prompts or pairs, each answered once by both sides."""

from __future__ import annotations

from torch import Tensor


def wins(score_B: Tensor, other_B: Tensor) -> Tensor:
    """fp64 [B]: 1 where the first answer scores higher, 0 where lower, 0.5 for a tie."""
    lead_B = score_B.double() - other_B.double()
    assert bool(lead_B.isfinite().all()), "a score that is not finite would count as a loss"
    return (lead_B.sign() + 1) / 2
