"""Agreement against published examples and the definitions, and what must not matter."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, permutations, product
from statistics import fmean

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


def alpha_by_definition(units: Sequence[Sequence[int]], differ: Callable[[int, int], float]) -> float:
    """1 less the mean difference within a unit over that of any two values of all units."""
    values = [each for unit in units for each in unit]
    within = sum(fmean(differ(*two) for two in permutations(unit, 2)) * len(unit) for unit in units)
    return 1 - within / len(values) / fmean(differ(*two) for two in permutations(values, 2))


def kappa_by_definition(judged: Sequence[tuple[int, int]]) -> float | None:
    """Chance: how often a row's first value is the second value of any row."""
    chance = fmean(one == other for one, other in product(*zip(*judged, strict=True)))
    return None if chance == 1 else (fmean(one == other for one, other in judged) - chance) / (1 - chance)


def mean_kappa_by_definition(table: Mapping[str, Mapping[str, int]]) -> float:
    found = []
    for one, other in combinations("abcde", 2):
        both = [(said[one], said[other]) for said in table.values() if {one, other} <= said.keys()]
        kappa = kappa_by_definition(both) if both else None
        found += [] if kappa is None else [kappa] * len(both)
    return fmean(found)


@pytest.mark.parametrize("seed", range(20))
def test_random_tables_with_missing_votes_and_ties(seed: int) -> None:
    """The ordinal difference is that of the values' mean ranks, squared."""
    draw = random.Random(seed)
    shares = [draw.random() + 0.1 for _ in range(3)]
    table = {
        str(n): {who: draw.choices((1, 2, 3), shares)[0] for who in "abcde" if draw.random() < 0.5}
        for n in range(draw.randint(8, 40))
    }
    several = [[*said.values()] for said in table.values() if len(said) > 1]
    values = sorted(each for unit in several for each in unit)
    rank = {each: fmean(at for at, value in enumerate(values) if value == each) for each in values}
    nominal_alpha = alpha_by_definition(several, lambda one, other: one != other)
    ordinal_alpha = alpha_by_definition(several, lambda one, other: (rank[one] - rank[other]) ** 2)
    units = [[*said.values()] for said in table.values()]
    assert krippendorff_alpha(units, (1, 2, 3)) == pytest.approx(nominal_alpha)
    assert krippendorff_alpha(units, (1, 2, 3), ordinal) == pytest.approx(ordinal_alpha)
    assert mean_kappa(table) == pytest.approx(mean_kappa_by_definition(table))
