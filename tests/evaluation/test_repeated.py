"""Several answers per question, against numbers worked out by hand."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from rlhf.evaluation.repeated import majority, pass_at_k, repeated_metrics
from rlhf.rewards.verify import same_answer

RIGHT_BN = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0]])


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_pass_at_k_is_the_mean_over_all_draws_of_k_answers(k: int) -> None:
    for row_N, found in zip(RIGHT_BN.tolist(), pass_at_k(RIGHT_BN, k).tolist(), strict=True):
        draws = [max(draw) for draw in combinations(row_N, k)]
        assert found == pytest.approx(sum(draws) / len(draws))


def test_the_metrics_of_four_answers() -> None:
    texts = [["7", "1", "1", "2"], ["3", "3", "4", "5"], ["8", "9", "0", "9"]]
    metrics = repeated_metrics(RIGHT_BN, texts, lambda one, other: one == other)
    assert metrics["pass_at_1"] == metrics["avg_at_4"] == pytest.approx(4 / 12)
    assert metrics["pass_at_2"] == pytest.approx((0.5 + 0 + 1) / 3)
    assert metrics["pass_at_4"] == pytest.approx(2 / 3)
    assert metrics["maj_at_4"] == pytest.approx(1 / 3)  # 1 is wrong, 3 is wrong, 9 is right
    assert metrics["maj_at_4_rows"] == 3
    assert not [name for name in repeated_metrics(RIGHT_BN, texts, None) if name.startswith("maj")]


def test_a_question_without_a_score_is_left_out() -> None:
    right_BN = torch.cat([RIGHT_BN, torch.full((1, 4), math.nan)])
    texts = [["7", "1", "1", "2"], ["3", "3", "4", "5"], ["8", "9", "0", "9"], ["1", "1", "1", "1"]]
    with_it = repeated_metrics(right_BN, texts, lambda one, other: one == other)
    assert with_it == repeated_metrics(RIGHT_BN, texts[:3], lambda one, other: one == other)


def test_the_largest_group_wins_and_of_equal_ones_the_first() -> None:
    number = same_answer("verify:number", {})
    assert number is not None
    assert majority(["It is 3.", "so 4", "I say 4", "3?", "4.0"], number) == 1
    assert majority(["It is 3.", "so 4", "I say 4", "3?"], number) == 0
    assert majority(["none", "nothing"], number) == 0  # without a number nothing agrees
    exact = same_answer("verify:exact", {"ignore_case": True})
    assert exact is not None and exact(" Yes ", "yes") and not exact("Yes.", "yes")
    assert same_answer("verify:length", {}) is None
