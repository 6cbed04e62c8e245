"""How well a reward model ranks. Dimensions: B held-out pairs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.evaluation.intervals import difference, share
from rlhf.evaluation.win_rate import wins

MIN_WIDE_GAP = 0.5
"""Smallest gap, in gold-score units, of a pair that counts as easy to rank."""
CALIBRATION_BINS = 10


class Ranking(NamedTuple):
    """Scores and lengths of both sides of every pair."""

    chosen_B: Tensor
    """Learned score, logits."""
    rejected_B: Tensor
    chosen_length_B: Tensor
    """Response tokens."""
    rejected_length_B: Tensor
    gold_gap_B: Tensor
    """Gold score of chosen minus gold score of rejected; NaN where unknown."""


def over_baseline(right_B: Tensor, rule_B: Tensor) -> dict[str, float]:
    """Comparison with baselines that read no word: a rule, its opposite, and chance.

    accuracy_over_baseline is the model's accuracy minus that of the best baseline, row by row: how often the
    model is right where the baseline is not, minus the reverse. The baseline is chosen on the same rows, so
    the figure is too low rather than too high.

    Args:
        right_B: whether the model is right; 0.5 for a tie.
        rule_B: whether the rule is right, such as "the longer answer wins"; 0.5 for a tie.
    """
    rule_accuracy = float(rule_B.mean())
    baselines = {rule_accuracy: rule_B, 1 - rule_accuracy: 1 - rule_B, 0.5: torch.full_like(rule_B, 0.5)}
    baseline = max(baselines)
    return {
        "baseline_accuracy": baseline,
        **difference(right_B - baselines[baseline]).metrics("accuracy_over_baseline"),
    }


def rank_quality(ranking: Ranking) -> dict[str, float]:
    """Accuracy, margin, calibration, and comparison with chance and "the longer answer wins"."""
    chosen, rejected = ranking.chosen_B, ranking.rejected_B
    right_B = wins(chosen, rejected)
    longer_B = wins(ranking.chosen_length_B, ranking.rejected_length_B)
    scores = torch.cat([chosen, rejected])
    lengths = torch.cat([ranking.chosen_length_B, ranking.rejected_length_B]).float()
    metrics = {
        **share(right_B).metrics("accuracy"),
        "longer_wins_accuracy": float(longer_B.mean()),
        **over_baseline(right_B, longer_B),
        "margin": float((chosen - rejected).mean()),
        "calibration_error": calibration_error(chosen, rejected),
        "length_correlation": correlation(scores, lengths),
        "score_mean": float(scores.mean()),
        "score_deviation": float(scores.std(correction=0)),
        "held_out_pairs": float(len(chosen)),
    }
    wide = ranking.gold_gap_B >= MIN_WIDE_GAP  # false for NaN
    if bool(wide.any()):
        metrics["accuracy_wide_gap"] = float(right_B[wide].mean())
        metrics["wide_gap_pairs"] = float(wide.sum())
    return metrics


class CalibrationBin(NamedTuple):
    """Pairs with about the same confidence of the model."""

    confidence: float
    """Mean confidence, 0.5 to 1."""
    accuracy: float
    """Share of pairs where the model is right; a tie counts half."""
    pairs: int


def calibration(chosen_B: Tensor, rejected_B: Tensor) -> list[CalibrationBin]:
    """Accuracy of "this side wins" per confidence bin. Bins without pairs are left out.

    A pair's confidence is max(p, 1 - p) with p = sigmoid(chosen - rejected). The bins have equal widths.
    """
    probability_B = torch.sigmoid(chosen_B - rejected_B).double()
    confidence_B = torch.maximum(probability_B, 1 - probability_B)
    correct_B = ((chosen_B - rejected_B).sign().double() + 1) / 2  # a tie counts half
    bin_B = ((confidence_B - 0.5) / 0.5 * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    return [
        CalibrationBin(float(confidence_B[in_B].mean()), float(correct_B[in_B].mean()), int(in_B.sum()))
        for in_B in (bin_B == number for number in range(CALIBRATION_BINS))
        if bool(in_B.any())
    ]


def calibration_error(chosen_B: Tensor, rejected_B: Tensor) -> float:
    """Expected calibration error of "this side wins": 0 is calibrated, 1 is fully confident and always wrong.

    The mean gap between confidence and accuracy, weighted by the bins' sizes (Guo et al. 2017,
    arXiv:1706.04599, eq. 3).
    """
    bins = calibration(chosen_B, rejected_B)
    return sum(each.pairs * abs(each.confidence - each.accuracy) for each in bins) / len(chosen_B)


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation; 0 if either side is constant."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    norm = x.norm() * y.norm()
    return float((x @ y) / norm) if norm > 0 else 0.0
