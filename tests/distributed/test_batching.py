"""Token-budget micro-batches and slices."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from rlhf.distributed.batching import chunks, token_budget_batches


def test_groups_by_hand() -> None:
    # 9 alone (9 + 6 > 12); 6 and 5 are 11; 3, 2, 2 and 1 are 8
    assert token_budget_batches([2, 9, 3, 5, 1, 6, 2], 12) == [[1], [5, 3], [2, 0, 6, 4]]
    assert token_budget_batches([6, 1, 1], 8) == [[0, 1, 2]]  # exactly full


@pytest.mark.parametrize("max_tokens", [1, 7, 64, 1000, 10**6])
@pytest.mark.parametrize("seed", range(3))
def test_groups_are_a_partition_within_the_budget_longest_first(max_tokens: int, seed: int) -> None:
    draw = random.Random(seed)
    lengths = [draw.randint(1, 90) for _ in range(200)]
    groups = token_budget_batches(lengths, max_tokens)
    assert sorted(index for group in groups for index in group) == list(range(200))
    for group in groups:
        assert sum(lengths[index] for index in group) <= max_tokens or len(group) == 1
    in_order = [lengths[index] for group in groups for index in group]
    assert in_order == sorted(lengths, reverse=True)


def test_no_group_could_have_taken_the_next_row() -> None:
    lengths = [5, 5, 5, 4, 4, 1]
    groups = token_budget_batches(lengths, 10)
    for group, following in pairwise(groups):
        assert sum(lengths[index] for index in group) + lengths[following[0]] > 10


def test_a_row_over_the_budget_goes_alone() -> None:
    assert token_budget_batches([3, 50, 3], 6) == [[1], [0, 2]]


def test_equal_lengths_keep_their_order_and_nothing_gives_nothing() -> None:
    assert token_budget_batches([4, 4, 4, 4], 8) == [[0, 1], [2, 3]]
    assert token_budget_batches([], 8) == []


@pytest.mark.parametrize(
    ("size", "expected"), [(2, [[0, 1], [2, 3], [4]]), (5, [[0, 1, 2, 3, 4]]), (9, [[0, 1, 2, 3, 4]])]
)
def test_chunks(size: int, expected: list[list[int]]) -> None:
    assert [list(chunk) for chunk in chunks(range(5), size)] == expected
    assert list(chunks([], size)) == []
