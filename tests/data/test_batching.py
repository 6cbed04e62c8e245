"""Token-budget micro-batches, padding and slices."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from rlhf.data.batching import chunks, pad_right, token_budget_batches


def test_groups_by_hand() -> None:
    # 9 alone (2 x 9 > 12); 6 and 5 fill 2 x 6; 3, 2, 2, 1 fill 4 x 3
    assert token_budget_batches([2, 9, 3, 5, 1, 6, 2], 12) == [[1], [5, 3], [2, 0, 6, 4]]


def test_padding_counts() -> None:
    assert token_budget_batches([6, 1, 1], 8) == [[0], [1, 2]]  # 8 real tokens, but 3 x 6 padded ones
    assert token_budget_batches([6, 1], 12) == [[0, 1]]  # exactly full


@pytest.mark.parametrize("max_tokens", [1, 7, 64, 1000, 10**6])
@pytest.mark.parametrize("seed", range(3))
def test_groups_are_a_partition_within_the_budget_longest_first(max_tokens: int, seed: int) -> None:
    draw = random.Random(seed)
    lengths = [draw.randint(1, 90) for _ in range(200)]
    groups = token_budget_batches(lengths, max_tokens)
    assert sorted(index for group in groups for index in group) == list(range(200))
    for group in groups:
        longest = max(lengths[index] for index in group)
        assert longest * len(group) <= max_tokens or len(group) == 1
    in_order = [lengths[index] for group in groups for index in group]
    assert in_order == sorted(lengths, reverse=True)


def test_no_group_could_have_taken_the_next_row() -> None:
    lengths = [5, 5, 5, 4, 4, 1]
    groups = token_budget_batches(lengths, 10)
    for group, following in pairwise(groups):
        assert lengths[group[0]] * (len(group) + 1) > 10, following


def test_a_row_over_the_budget_goes_alone() -> None:
    assert token_budget_batches([3, 50, 3], 6) == [[1], [0, 2]]


def test_equal_lengths_keep_their_order_and_nothing_gives_nothing() -> None:
    assert token_budget_batches([4, 4, 4, 4], 8) == [[0, 1], [2, 3]]
    assert token_budget_batches([], 8) == []


def test_padding_stands_on_the_right() -> None:
    rows = [torch.tensor([1, 2, 3]), torch.tensor([4])]
    assert pad_right(rows, 9).tolist() == [[1, 2, 3], [4, 9, 9]]
    assert pad_right([torch.tensor([0.5])], 0.0).tolist() == [[0.5]]


@pytest.mark.parametrize(
    ("size", "expected"), [(2, [[0, 1], [2, 3], [4]]), (5, [[0, 1, 2, 3, 4]]), (9, [[0, 1, 2, 3, 4]])]
)
def test_chunks(size: int, expected: list[list[int]]) -> None:
    assert [list(chunk) for chunk in chunks(range(5), size)] == expected
    assert list(chunks([], size)) == []
