"""How well a reward model ranks. Dimensions: B held-out pairs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

WIDE_GAP = 0.5
"""Gold-score units: pairs that differ by at least this much are told apart easily."""
CALIBRATION_BINS = 10


class Ranking(NamedTuple):
    """Both sides of every pair."""

    chosen_B: Tensor
    """Learned score, logits."""
    rejected_B: Tensor
    chosen_length_B: Tensor
    """Response tokens."""
    rejected_length_B: Tensor
    gold_gap_B: Tensor
    """Gold score of chosen minus rejected; NaN where unknown."""


def rank_quality(ranking: Ranking) -> dict[str, float]:
    """Accuracy, margin, calibration and the two ways a reward model fools one: chance and length.

    accuracy_over_baseline is what is left above the better of chance and "the longer answer wins".
    """
    chosen, rejected = ranking.chosen_B, ranking.rejected_B
    accuracy = _wins(chosen - rejected)
    longer_wins = _wins((ranking.chosen_length_B - ranking.rejected_length_B).float())
    scores = torch.cat([chosen, rejected])
    lengths = torch.cat([ranking.chosen_length_B, ranking.rejected_length_B]).float()
    metrics = {
        "accuracy": accuracy,
        "longer_wins_accuracy": longer_wins,
        "accuracy_over_baseline": accuracy - max(longer_wins, 0.5),
        "margin": float((chosen - rejected).mean()),
        "calibration_error": calibration_error(chosen, rejected),
        "length_correlation": correlation(scores, lengths),
        "score_mean": float(scores.mean()),
        "score_deviation": float(scores.std(correction=0)),
        "held_out_pairs": float(len(chosen)),
    }
    wide = ranking.gold_gap_B >= WIDE_GAP  # NaN is never
    if bool(wide.any()):
        metrics["accuracy_wide_gap"] = _wins((chosen - rejected)[wide])
        metrics["wide_gap_pairs"] = float(wide.sum())
    return metrics


def calibration_error(chosen_B: Tensor, rejected_B: Tensor) -> float:
    """Expected calibration error of "this side wins": 0 is calibrated, 1 is sure and always wrong.

    Each pair's confidence is max(p, 1 - p) with p = sigmoid(chosen - rejected); pairs are binned by it, and
    the gaps between mean confidence and accuracy are averaged with the bins' sizes (Guo et al. 2017,
    arXiv:1706.04599, eq. 3).
    """
    probability_B = torch.sigmoid(chosen_B - rejected_B).double()
    confidence_B = torch.maximum(probability_B, 1 - probability_B)
    correct_B = ((chosen_B - rejected_B).sign().double() + 1) / 2  # a tie is half right
    bin_B = ((confidence_B - 0.5) / 0.5 * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    gap = torch.zeros(CALIBRATION_BINS, dtype=torch.float64).index_add_(0, bin_B, confidence_B - correct_B)
    return float(gap.abs().sum() / len(chosen_B))


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's, 0 when either side is constant."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    norm = x.norm() * y.norm()
    return float((x @ y) / norm) if norm > 0 else 0.0


def _wins(lead_B: Tensor) -> float:
    """Share of positive leads; a tie counts half."""
    return float(((lead_B > 0).double() + 0.5 * (lead_B == 0).double()).mean())
