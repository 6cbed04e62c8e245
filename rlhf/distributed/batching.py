"""Token-budget micro-batches."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import TypeVar

Item = TypeVar("Item")


def token_budget_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group indices so that each group has at most max_tokens tokens, and rows of similar length.

    A single row longer than the budget gets a group of its own.
    """
    groups: list[list[int]] = []
    used = 0
    for index in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if groups and used + lengths[index] <= max_tokens:
            groups[-1].append(index)
            used += lengths[index]
        else:
            groups.append([index])
            used = lengths[index]
    return groups


def num_batches(rows: int, batch_rows: int, epochs: float) -> int:
    """Number of batches that a training needs; `epochs` may be a fraction."""
    return math.ceil(Fraction(str(epochs)) * math.ceil(rows / batch_rows))  # in floats 1.1 x 50 > 55


def shuffled_batches(rows: Sequence[Item], batch_rows: int, epochs: float, seed: int) -> list[Sequence[Item]]:
    """The batches of a whole training, in order: each epoch shuffles the rows anew."""
    shuffled = (random.Random(seed + epoch).sample(rows, len(rows)) for epoch in range(math.ceil(epochs)))
    batches = [batch for epoch in shuffled for batch in chunks(epoch, batch_rows)]
    return batches[: num_batches(len(rows), batch_rows, epochs)]


def chunks(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Consecutive slices of at most size items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def equal_tokens(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the prefix that both have."""
    different = (place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(different, min(len(first), len(second)))
