"""Mean differences over questions and seeds: by hand, against other intervals, and by repeated sampling."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf.evaluation import intervals
from rlhf.evaluation.crossed import estimate, student_quantile

TABLE = torch.tensor([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]])
"""2 seeds, 3 questions. Mean squares: seeds 3 (1 + 1) / 1 = 6, questions 2 (1 + 0 + 1) / 2 = 2, rest 0."""


def test_two_seeds_by_hand() -> None:
    """Var = (6 + 2 - 0) / 6: three quarters with 1 degree of freedom (12.706), the rest with 2 (4.303)."""
    found = estimate(TABLE, None)
    half = (0.75 * 12.706 + 0.25 * 4.303) * math.sqrt(8 / 6)
    assert float(found.value) == float(found.centre) == 3.0
    assert float(found.bound(0.025, -1)) == pytest.approx(3 - half, abs=1e-3)
    assert float(found.bound(0.025, 1)) == pytest.approx(3 + half, abs=1e-3)
    assert float(found.seed_variance + found.question_variance / 3) == pytest.approx(8 / 6)
    assert float(found.seed_variance) == pytest.approx(1.0)


def test_what_is_of_both_counts_once() -> None:
    """Mean squares: seeds 3 (2.25 + 2.25) = 13.5, questions 2 (2.25 + 0.25 + 4) / 2 = 6.5, and the rest
    (29.5 - 13.5 - 13) / 2 = 1.5."""
    found = estimate(torch.tensor([[1.0, 2.0, 3.0], [3.0, 4.0, 8.0]]), None)
    assert float(found.error.square()) == pytest.approx((13.5 + 6.5 - 1.5) / 6)
    assert float(found.seed_share) == pytest.approx(13.5 / 18.5)
    assert float(found.seed_variance) == pytest.approx((13.5 - 1.5) / 6)
    assert float(found.question_variance) == pytest.approx(6.5 / 2)


def test_what_is_neither_of_seeds_nor_of_questions_counts_not_at_all() -> None:
    """0, 2 and 2, 0: seeds and questions agree on average, and only the rest is left, with mean square 4.
    Neither gives a variance then: 0, not -1."""
    found = estimate(torch.tensor([[0.0, 2.0], [2.0, 0.0]]), None)
    assert float(found.error) == 0.0 and float(found.seed_variance) == 0.0


def test_one_seed_is_the_usual_interval() -> None:
    value_B = torch.randn(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, usual = estimate(value_B[None], None), intervals.mean(value_B)
    assert float(found.value) == pytest.approx(usual.value)
    assert float(found.bound(0.025, -1)) == pytest.approx(usual.low, rel=1e-3)
    assert float(found.bound(0.025, 1)) == pytest.approx(usual.high, rel=1e-3)


def test_a_bounded_score_has_a_question_more_for_each_side() -> None:
    """1, 0, -1, 0 and 1, -1: variance 4 / 5, error sqrt(0.8 / 6); 2.571 is Student's with 5."""
    found = estimate(torch.tensor([[1.0, 0.0, -1.0, 0.0]]), 1.0)
    assert float(found.bound(0.025, 1)) == pytest.approx(2.571 * math.sqrt(0.8 / 6), rel=3e-3)
    one_sided = estimate(torch.ones(1, 4), 1.0)
    assert float(one_sided.value) == 1.0
    assert float(one_sided.centre) == pytest.approx(4 / 6)
    agreeing = estimate(torch.zeros(1, 10), 1.0)
    assert float(agreeing.bound(0.025, 1)) > 0.2
    assert float(estimate(torch.zeros(1, 10), 2.0).error) == pytest.approx(2 * float(agreeing.error))


def test_neither_order_nor_unscored_questions_nor_other_problems_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    d_SB = torch.randn(3, 20, generator=generator, dtype=torch.float64)
    plain = estimate(d_SB, 1.0)
    shuffled = d_SB[torch.randperm(3, generator=generator)][:, torch.randperm(20, generator=generator)]
    unscored = torch.full((3, 2), math.nan, dtype=torch.float64)
    unscored[0] = 9.0
    for other in (estimate(shuffled, 1.0), estimate(torch.cat([unscored, d_SB], -1), 1.0)):
        for name, value in plain._asdict().items():
            assert float(getattr(other, name)) == pytest.approx(float(value)), name
    together = estimate(torch.stack([d_SB, torch.zeros_like(d_SB)]), 1.0)
    assert float(together.error[0]) == pytest.approx(float(plain.error))


@pytest.mark.parametrize("d_SB", [torch.zeros(1, 0), torch.full((2, 3), math.nan), torch.tensor([[0.5]])])
def test_without_a_spread_nothing_is_known(d_SB: Tensor) -> None:
    found = estimate(d_SB, None)
    assert float(found.bound(0.025, -1)) == -math.inf and float(found.bound(0.025, 1)) == math.inf
    assert float(found.p_above(0.0)) == 0.5 and float(found.error) == math.inf


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_the_p_value_is_the_tail_whose_bound_is_the_threshold(seeds: int) -> None:
    generator = torch.Generator().manual_seed(0)
    found = estimate(0.3 + torch.randn(50, seeds, 12, generator=generator, dtype=torch.float64), None)
    p = found.p_above(0.2)
    assert bool(((p > 0) & (p < 1)).all()) and bool((p < 0.5).any()) and bool((p > 0.5).any())
    below = p < 0.5
    assert found.bound(p, -1)[below].tolist() == pytest.approx([0.2] * int(below.sum()))


@pytest.mark.parametrize(
    ("freedom", "tail", "t"),
    [(1, 0.025, 12.706), (2, 0.025, 4.303), (2, 0.005, 9.925), (5, 0.025, 2.571), (30, 0.005, 2.750)],
)
def test_student_as_printed_tables_have_it(freedom: int, tail: float, t: float) -> None:
    z = -torch.special.ndtri(torch.tensor(tail, dtype=torch.float64))
    assert float(student_quantile(z, torch.tensor(float(freedom)))) == pytest.approx(t, rel=3e-3)


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("seed_deviation", [0.0, 0.3, 3.0])
def test_an_interval_holds_the_truth_in_95_of_100_samples(seeds: int, seed_deviation: float) -> None:
    """At least: Cochran's is careful where the two parts of the variance are alike."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    d = 0.7 + seed_deviation * normal(2000, seeds, 1) + normal(2000, 1, 40) + normal(2000, seeds, 40)
    found = estimate(d, None)
    held = (found.bound(0.025, -1) <= 0.7) & (found.bound(0.025, 1) >= 0.7)
    assert 0.94 <= float(held.double().mean()) <= 0.99
