"""Agreement against published examples, and what must not matter."""

from __future__ import annotations

import pytest

from rlhf.label.agreement import cohen_kappa, krippendorff_alpha, mean_kappa, ordinal

A = [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None]
B = [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3]
C = [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None]
D = [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None]
UNITS = [[each for each in unit if each is not None] for unit in zip(A, B, C, D, strict=True)]
"""Four observers and twelve units: Krippendorff 2011, section C."""


def test_krippendorffs_example() -> None:
    assert krippendorff_alpha(UNITS, range(1, 6)) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(UNITS, range(1, 6), ordinal) == pytest.approx(0.815, abs=5e-4)


def test_neither_order_nor_single_judgements_matter() -> None:
    alpha = krippendorff_alpha(UNITS, range(1, 6))
    assert krippendorff_alpha([*reversed(UNITS), [5], []], range(1, 6)) == pytest.approx(alpha)


def test_perfect_agreement_less_than_chance_and_nothing_to_say() -> None:
    assert krippendorff_alpha([[1, 1], [2, 2]], (1, 2)) == 1.0
    found = krippendorff_alpha([[1, 2], [2, 1]], (1, 2))
    assert found is not None and found < 0
    assert krippendorff_alpha([[1, 1], [1, 1]], (1, 2)) is None
    assert krippendorff_alpha([[1], [2]], (1, 2)) is None


def test_cohens_kappa_by_hand() -> None:
    """Of 50 they agree on 35 (20 yes, 15 no): 0.7; chance is 0.5 x 0.6 + 0.5 x 0.4 = 0.5."""
    judged = [("y", "y")] * 20 + [("y", "n")] * 5 + [("n", "y")] * 10 + [("n", "n")] * 15
    assert cohen_kappa(judged) == pytest.approx(0.4)
    assert cohen_kappa([]) is None and cohen_kappa([("y", "y")]) is None
    by_pair = {str(n): {"a": one, "b": other} for n, (one, other) in enumerate(judged)}
    assert mean_kappa({**by_pair, "c alone": {"c": "y"}}) == pytest.approx(0.4)
