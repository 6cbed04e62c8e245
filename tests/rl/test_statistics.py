"""Masked metrics."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.rl.advantage import masked_moments, mean_and_variance
from rlhf.rl.statistics import (
    distinct_n,
    explained_variance,
    explained_variance_from_moments,
)

MASK_BR = torch.tensor([[True, True, False]])


# Padding holds nan in the values and a huge number in the returns.
@pytest.mark.parametrize(
    ("values", "returns", "expected"),
    [
        ([1.0, 3.0], [1.0, 3.0], 1.0),
        ([1.0, 2.0], [1.0, 3.0], 0.75),  # errors 0 and 1: variance 0.25 of 1
        ([6.0, 8.0], [1.0, 3.0], 1.0),  # a constant offset is no lack of foresight
        ([0.0, 0.0], [1.0, 3.0], 0.0),
        ([3.0, 1.0], [1.0, 3.0], -3.0),  # errors -2 and 2: variance 4
        ([0.0, 1.0], [0.1, 0.1], 0.0),  # equal returns: by definition
    ],
)
def test_explained_variance_by_hand(values: list[float], returns: list[float], expected: float) -> None:
    value_BR, return_BR = torch.tensor([[*values, math.nan]]), torch.tensor([[*returns, 1e20]])
    assert explained_variance(value_BR, return_BR, MASK_BR) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("length", [3, 7])
def test_equal_returns_leave_no_rounding_behind(length: int) -> None:
    # float64 0.7: mean of squares minus squared mean is +1.7e-16 for three of them, -2.2e-16 for seven.
    return_BR = torch.full((1, length), 0.7, dtype=torch.float64)
    value_BR, mask_BR = torch.arange(float(length))[None], torch.ones(1, length, dtype=torch.bool)
    mean, variance = mean_and_variance(masked_moments(return_BR, mask_BR))
    assert mean == pytest.approx(0.7) and variance == 0.0
    assert explained_variance(value_BR, return_BR, mask_BR) == 0.0


def test_explained_variance_does_not_depend_on_the_number_of_ranks() -> None:
    value_BR, return_BR = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(7))
    mask_BR = torch.tensor([3, 1, 2, 3, 3, 1])[:, None] > torch.arange(3)
    ranks = (slice(0, 1), slice(1, 6))
    error, total = torch.stack([
        torch.stack([masked_moments(x_BR[rank], mask_BR[rank]) for x_BR in (return_BR - value_BR, return_BR)])
        for rank in ranks
    ]).sum(0)  # fmt: skip
    expected = explained_variance(value_BR, return_BR, mask_BR)
    assert explained_variance_from_moments(error, total) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (1, 3 / 6),
        (2, 3 / 4),  # 12 21 12 | 23, and no 22 across the border
        (4, 1.0),
        (5, 0.0),  # no sequence is that long
    ],
)
def test_distinct_n_by_hand(n: int, expected: float) -> None:
    assert distinct_n([[1, 2, 1, 2], [2, 3]], n) == expected
