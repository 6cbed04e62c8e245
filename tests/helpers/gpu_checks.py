"""What the checks of tests/gpu share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from rlhf.distributed.compute import Compute, Zero

OneRank = Callable[[Zero, str], Compute]
"""By `zero=` and the name of a dtype."""


class Reaches(Protocol):
    """Note a figure; fail where it misses its bound."""

    def __call__(self, what: str, value: float, *, at_most: float = ..., at_least: float = ...) -> None: ...


def error(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> float:
    """Relative, over all elements of all tensors."""
    left, right = (torch.cat([x.detach().float().cpu().flatten() for x in xs]) for xs in (found, wanted))
    return float((left - right).norm() / right.norm())
