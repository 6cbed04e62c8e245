"""How well a reward model ranks, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.evaluation.reward_model import Ranking, calibration, calibration_error, correlation, rank_quality
from rlhf.evaluation.sampled import Sampled

NAN = float("nan")


def ranking(gold_gaps: list[float]) -> Ranking:
    """Won, tied, lost, won; the chosen answer is longer, as long, shorter, shorter."""
    return Ranking(
        chosen_B=torch.tensor([2.0, 1.0, 0.0, 1.0]),
        rejected_B=torch.tensor([1.0, 1.0, 1.0, 0.0]),
        chosen_length_B=torch.tensor([5, 5, 3, 4]),
        rejected_length_B=torch.tensor([4, 5, 4, 6]),
        gold_gap_B=torch.tensor(gold_gaps),
    )


def test_by_hand() -> None:
    metrics = rank_quality(ranking([0.6, 0.5, 0.4, NAN]))
    assert metrics["accuracy"] == 0.625  # 1 + 1/2 + 0 + 1
    assert metrics["longer_wins_accuracy"] == 0.375  # 1 + 1/2 + 0 + 0
    assert metrics["margin"] == 0.25
    assert metrics["score_mean"] == 0.875
    assert metrics["score_deviation"] == pytest.approx(math.sqrt(9 / 8 - 0.875**2))  # squares sum to 9
    assert metrics["held_out_pairs"] == 4
    assert metrics["accuracy_wide_gap"] == 0.75  # the first two
    assert metrics["wide_gap_pairs"] == 2


@pytest.mark.parametrize(
    ("chosen_lengths", "baseline", "over"),
    [
        ([5, 5, 3, 4], 0.625, 0.0),  # shorter wins: longer does in 1 + 1/2 + 0 + 0
        ([3, 5, 5, 8], 0.625, 0.0),  # longer wins
        ([5, 3, 3, 8], 0.5, 0.125),  # chance: each wins twice
    ],
)
def test_the_baseline_is_the_best_of_three_simple_rules(
    chosen_lengths: list[int], baseline: float, over: float
) -> None:
    pairs = ranking([NAN] * 4)._replace(chosen_length_B=torch.tensor(chosen_lengths))
    metrics = rank_quality(pairs)
    assert (metrics["baseline_accuracy"], metrics["accuracy_over_baseline"]) == (baseline, over)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_model_is_compared_with_the_rule_pair_by_pair(sign: int) -> None:
    """Both are right in 20 of 32 pairs. Where they are right in the same pairs, less is unknown of how they
    differ than where each is right in pairs of its own."""
    lead_B = torch.tensor([1.0] * 20 + [-1.0] * 12)

    def over(length_lead_B: torch.Tensor) -> Sampled:
        zeros_B = torch.zeros(32)
        metrics = rank_quality(Ranking(lead_B, zeros_B, sign * length_lead_B, zeros_B, zeros_B * NAN))
        found = Sampled.found("accuracy_over_baseline", metrics)
        assert found is not None and (found.value, found.rows) == (0.0, 32)
        return found

    same, apart = over(lead_B), over(lead_B.flip(0))
    assert -0.1 < same.low < 0 < same.high < 0.1
    assert apart.low < -0.2 and apart.high > 0.2


def test_without_gold_scores_nothing_is_said_of_wide_gaps() -> None:
    assert "accuracy_wide_gap" not in rank_quality(ranking([NAN] * 4))
    assert "accuracy_wide_gap" not in rank_quality(ranking([0.1] * 4))


def test_a_model_that_counts_words_is_found_out() -> None:
    pairs = ranking([NAN] * 4)
    by_length = pairs._replace(
        chosen_B=pairs.chosen_length_B.float(), rejected_B=pairs.rejected_length_B.float()
    )
    metrics = rank_quality(by_length)
    assert metrics["length_correlation"] == pytest.approx(1.0)
    assert metrics["accuracy"] == metrics["longer_wins_accuracy"]
    assert metrics["accuracy_over_baseline"] < 0


def test_the_order_of_pairs_does_not_matter() -> None:
    pairs = ranking([0.6, 0.5, 0.4, NAN])
    turned = Ranking(*(column.flip(0) for column in pairs))
    assert rank_quality(turned) == pytest.approx(rank_quality(pairs))


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def test_calibration_by_hand() -> None:
    """Two pairs at confidence 0.78, one of them right; two at 0.93, both right.

    (2 |0.78 - 0.5| + 2 |0.93 - 1|) / 4 = 0.175.
    """
    lead_B = torch.tensor([logit(0.78), -logit(0.78), logit(0.93), logit(0.93)])
    assert calibration_error(lead_B, torch.zeros(4)) == pytest.approx(0.175, abs=1e-6)
    assert calibration_error(lead_B + 5, torch.full((4,), 5.0)) == pytest.approx(0.175, abs=1e-6)
    unsure, sure = calibration(lead_B, torch.zeros(4))
    assert unsure == pytest.approx((0.78, 0.5, 2), abs=1e-6)
    assert sure == pytest.approx((0.93, 1.0, 2), abs=1e-6)


@pytest.mark.parametrize(
    ("lead", "error"),
    [
        (40.0, 0.0),  # sure and right
        (-40.0, 1.0),  # sure and wrong
        (0.0, 0.0),  # undecided, and half right
    ],
)
def test_calibration_at_the_ends(lead: float, error: float) -> None:
    assert calibration_error(torch.full((3,), lead), torch.zeros(3)) == pytest.approx(error, abs=1e-6)


@pytest.mark.parametrize(
    ("y", "expected"),
    [([1, 2, 3], 1.0), ([30, 20, 10], -1.0), ([1, 3, 2], 0.5), ([2, 2, 2], 0.0)],
)
def test_correlation_by_hand(y: list[int], expected: float) -> None:
    assert correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor(y)) == pytest.approx(expected)
