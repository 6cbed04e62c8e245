"""Win rate, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from rlhf.evaluation.win_rate import wins


def test_a_tie_is_half_a_win() -> None:
    assert wins(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 2.0, 5.0])).tolist() == [1.0, 0.5, 0.0]


def test_both_sides_share_one_win() -> None:
    ours, theirs = torch.randn(2, 50).round(decimals=1)
    assert torch.equal(wins(ours, theirs) + wins(theirs, ours), torch.ones(50, dtype=torch.float64))


def test_how_far_ahead_does_not_matter() -> None:
    ours, theirs = torch.tensor([0.1, 5.0]), torch.tensor([0.0, 6.0])
    assert torch.equal(wins(ours, theirs), wins(ours * 1000, theirs * 1000))


def test_a_score_that_is_not_finite_is_no_loss() -> None:
    with pytest.raises(AssertionError):
        wins(torch.tensor([float("nan")]), torch.tensor([0.0]))
