"""Win rate and bootstrap, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from rlhf.evaluation.comparison import bootstrap_interval, wins


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


@pytest.mark.parametrize(
    ("level", "low", "high"),
    [
        (0.95, 0.0, 1.0),
        (0.40, 0.5, 0.5),  # tails of 0.3 each: the outer quarters are cut away
    ],
)
def test_two_prompts_by_hand(level: float, low: float, high: float) -> None:
    """Drawing twice from {0, 1}: the mean is 0, 1/2, 1 with probability 1/4, 1/2, 1/4."""
    interval = bootstrap_interval(torch.tensor([0.0, 1.0]), samples=4000, seed=0, level=level)
    assert interval == (low, high)


def test_many_prompts_approach_the_normal_interval() -> None:
    """400 coin flips: 0.5 +- 1.96 * 0.5 / sqrt(400) = 0.451 to 0.549."""
    value_B = torch.tensor([0.0, 1.0]).repeat(200)
    low, high = bootstrap_interval(value_B, samples=4000, seed=0)
    assert low == pytest.approx(0.451, abs=0.004)
    assert high == pytest.approx(0.549, abs=0.004)


def test_equal_prompts_leave_no_doubt() -> None:
    low, high = bootstrap_interval(torch.full((20,), 0.3), samples=100, seed=0)
    assert low == pytest.approx(0.3)
    assert high == pytest.approx(0.3)


def test_the_seed_decides() -> None:
    value_B = torch.rand(30, generator=torch.Generator().manual_seed(1))
    first, again, other = (bootstrap_interval(value_B, samples=50, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first != other
