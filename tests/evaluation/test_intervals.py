"""Intervals against published values, numbers worked out by hand, and repeated sampling."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf.evaluation.intervals import correlation, difference, mean, ratio, share, student
from rlhf.evaluation.sampled import Sampled


@pytest.mark.parametrize(
    ("freedom", "factor"), [(1, 12.706), (2, 4.303), (3, 3.182), (10, 2.228), (30, 2.042), (1000, 1.962)]
)
def test_student_as_printed_tables_have_it(freedom: int, factor: float) -> None:
    assert student(freedom) == pytest.approx(factor, rel=0.01 if freedom == 2 else 0.002)


def test_wilson_by_hand() -> None:
    """8 of 10: (0.8 + 0.19207) / 1.38415 = 0.7167 +- sqrt(0.16 * 0.38415 + 0.03689) / 1.38415 = 0.2266."""
    value, low, high, rows = share(torch.tensor([1.0] * 8 + [0.0] * 2))
    assert [value, low, high] == pytest.approx([0.8, 0.4902, 0.9433], abs=1e-4)
    assert rows == 10


def test_bonett_and_price_by_hand() -> None:
    """One row each way of 4, and one more each way: 0 +- 1.96 sqrt(4 / 6 / 6)."""
    value, low, high, rows = difference(torch.tensor([1.0, 0.0, -1.0, 0.0]))
    assert (value, rows) == (0.0, 4)
    assert -low == high == pytest.approx(1.96 * math.sqrt(4 / 36), abs=1e-4)


def test_a_mean_by_hand() -> None:
    """1, 2, 3: deviation 1, so 2 +- 4.303 / sqrt(3)."""
    value, low, high, rows = mean(torch.tensor([1.0, 2.0, 3.0]))
    assert (value, rows) == (2.0, 3)
    assert [low, high] == pytest.approx([2 - 2.484, 2 + 2.484], abs=0.03)


def test_a_ratio_counts_tokens_not_rows() -> None:
    """9 nats over 12 tokens. Rows with the same nats per token leave no doubt, whatever their lengths."""
    assert ratio(torch.tensor([1.0, 8.0]), torch.tensor([4.0, 8.0])).value == 0.75
    certain = ratio(torch.tensor([2.0, 1.0, 4.0]), torch.tensor([4.0, 2.0, 8.0]))
    assert certain == (0.5, 0.5, 0.5, 3)


@pytest.mark.parametrize(
    "agreeing", [share(torch.ones(5)), difference(torch.ones(5)), difference(torch.zeros(5))]
)
def test_few_rows_that_agree_are_not_certain(agreeing: Sampled) -> None:
    assert agreeing.high - agreeing.low > 0.3
    assert agreeing.low <= agreeing.value <= agreeing.high


def test_of_one_row_nothing_is_known_of_how_rows_differ() -> None:
    assert mean(torch.tensor([2.0])) == (2.0, -math.inf, math.inf, 1)
    for nothing in (share, difference, mean):
        value, low, high, rows = nothing(torch.zeros(0))
        assert math.isnan(value) and (low, high, rows) == (-math.inf, math.inf, 0)


def shares(rows: int, generator: torch.Generator) -> Sampled:
    return share((torch.rand(rows, generator=generator) < 0.7).double())


def differences(rows: int, generator: torch.Generator) -> Sampled:
    right, other = (torch.rand(rows, generator=generator) < p for p in (0.9, 0.2))
    return difference(right.double() - other.double())


def means(rows: int, generator: torch.Generator) -> Sampled:
    return mean(0.7 + torch.randn(rows, generator=generator))


def ratios(rows: int, generator: torch.Generator) -> Sampled:
    tokens_B = torch.randint(2, 20, (rows,), generator=generator).double()
    return ratio(tokens_B * (0.7 + 0.3 * torch.randn(rows, generator=generator)), tokens_B)


def correlations(rows: int, generator: torch.Generator) -> Sampled:
    """Three values a row that are not independent; many rows, as few seem a little more certain than they
    are."""
    rows *= 4
    shared_BN, x_BN, y_BN = torch.randn(3, rows, 3, generator=generator) + torch.randn(
        3, rows, 1, generator=generator
    )
    return correlation(
        math.sqrt(0.7) * shared_BN + math.sqrt(0.3) * x_BN, shared_BN * math.sqrt(0.7) + math.sqrt(0.3) * y_BN
    )


def test_a_correlation_by_hand() -> None:
    x_BN, y_BN = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 3.0], [2.0, 4.0]])
    assert correlation(x_BN, y_BN).value == pytest.approx(0.8)
    assert correlation(x_BN, -2 * x_BN + 5) == (-1.0, -1.0, -1.0, 2)
    apart = torch.tensor([[9.0, math.nan], [math.nan, math.nan]])
    known = correlation(torch.cat([x_BN, apart]), torch.cat([y_BN, torch.full((2, 2), math.nan)]))
    assert known.value == pytest.approx(0.8) and known.rows == 2
    for constant in (torch.ones(2, 2), torch.full((2, 2), 0.1), torch.full((2, 2), math.nan)):
        assert correlation(x_BN, constant).rows == 0


@pytest.mark.parametrize("measured", [shares, differences, means, ratios, correlations])
@pytest.mark.parametrize("rows", [12, 48])
def test_an_interval_holds_the_truth_in_95_of_100_samples(
    measured: Callable[[int, torch.Generator], Sampled], rows: int
) -> None:
    """The truth is 0.7 each time."""
    generator = torch.Generator().manual_seed(0)
    samples = [measured(rows, generator) for _ in range(1000)]
    assert 0.925 <= sum(low <= 0.7 <= high for _, low, high, _ in samples) / 1000 <= 0.98


def test_paired_rows_cancel_how_hard_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    hard_B = 10 * torch.randn(40, generator=generator)
    before_B, after_B = (hard_B + torch.randn(40, generator=generator) for _ in range(2))
    paired, alone = mean(after_B - before_B), mean(after_B)
    assert paired.high - paired.low < (alone.high - alone.low) / 3


@pytest.mark.parametrize(
    ("name", "low"),
    [
        ("win_rate", "win_rate_low"),
        ("kl/ppo", "kl_low/ppo"),
        ("rouge_l/sft/tuned", "rouge_l_low/sft/tuned"),
    ],
)
def test_plain_figures_hold_it_all(name: str, low: str) -> None:
    sampled = Sampled(0.5, 0.25, 0.75, 9)
    metrics = sampled.metrics(name)
    assert set(metrics) == {name, low, low.replace("low", "high"), low.replace("low", "rows")}
    assert all(isinstance(value, float) for value in metrics.values())
    assert Sampled.found(name, metrics) == sampled
    assert Sampled.found(name, {name: 0.5}) is None


def test_the_values_may_be_bf16() -> None:
    """A sum of ten thousand of them in bf16 would lose the mean."""
    value_B: Tensor = torch.full((10_000,), 0.3, dtype=torch.bfloat16)
    assert mean(value_B).value == pytest.approx(0.3, abs=1e-3)
