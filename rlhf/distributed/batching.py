"""Batches of rows, and micro-batches with a token budget."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import TypeVar, overload

Item = TypeVar("Item")


def token_budget_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group indices so that each group has at most max_tokens tokens, and rows of similar length.

    A single row longer than the budget gets a group of its own.
    """
    return budget_batches(sorted(range(len(lengths)), key=lambda row: -lengths[row]), lengths, max_tokens)


def budget_batches(order: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group the indices in this order, at most max_tokens tokens per group. A longer row gets its own."""
    groups: list[list[int]] = []
    used = 0
    for index in order:
        if groups and used + lengths[index] <= max_tokens:
            groups[-1].append(index)
            used += lengths[index]
        else:
            groups.append([index])
            used = lengths[index]
    return groups


def num_batches(rows: int, batch_rows: int, epochs: float) -> int:
    """Number of batches in a training. `epochs` may be a fraction."""
    return math.ceil(Fraction(str(epochs)) * math.ceil(rows / batch_rows))  # in floats 1.1 x 50 > 55


class Batches(Sequence[Sequence[Item]]):
    """Batches of rows. Holds only indices in memory; a batch's rows are read on access."""

    def __init__(self, rows: Sequence[Item], order: array[int], ends: array[int]) -> None:
        """Args:
        order: row indices of all batches, one batch after the other.
        ends: end of each batch in `order`.
        """
        self._rows, self._order, self._ends = rows, order, ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> list[Item]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[Item]]: ...

    def __getitem__(self, index: int | slice) -> list[Item] | list[list[Item]]:
        if isinstance(index, slice):
            return [self[each] for each in range(len(self))[index]]
        place = range(len(self))[index]
        begin = self._ends[place - 1] if place else 0
        return [self._rows[each] for each in self._order[begin : self._ends[place]]]


def shuffled_batches(rows: Sequence[Item], batch_rows: int, epochs: float, seed: int) -> Batches[Item]:
    """All batches of a training, in order. Each epoch shuffles the rows again."""
    order, ends, places = array("i"), array("q"), range(len(rows))
    for epoch in range(math.ceil(epochs) if rows else 0):
        order.extend(random.Random(seed + epoch).sample(places, len(places)))
        ends.extend(range(len(order) - len(places) + batch_rows, len(order), batch_rows))
        ends.append(len(order))
    return Batches(rows, order, ends[: num_batches(len(rows), batch_rows, epochs)])


def chunks(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Consecutive slices of at most size items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def equal_tokens(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common prefix."""
    different = (place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(different, min(len(first), len(second)))
