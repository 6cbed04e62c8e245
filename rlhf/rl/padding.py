"""Right-padded masks. Dimensions: B sequences, R response tokens (prompt excluded)."""

import torch
from torch import Tensor


def length_mask(length_B: Tensor) -> Tensor:
    """Bool [B, R]: row b is true on its first length_B[b] tokens; R is the longest length."""
    longest = int(length_B.max()) if len(length_B) else 0
    return torch.arange(longest, device=length_B.device) < length_B[:, None]


def is_right_padded(mask_BR: Tensor) -> bool:
    """Whether every row is a run of true followed by a run of false, either of which may be empty."""
    return not bool((mask_BR[:, 1:] & ~mask_BR[:, :-1]).any())
