"""Agreement of annotators beyond chance. NLTK computes both coefficients (`nltk.metrics.agreement`).

This module adds what NLTK lacks: the ordinal difference; the mean kappa if annotators judged different items;
and None where a coefficient is undefined (NLTK returns 1, or raises an error). The package `krippendorff` has
the ordinal difference, but its licence is the GPL.

Sources: Krippendorff 2011, "Computing Krippendorff's alpha-reliability" (repository.upenn.edu/asc_papers/43);
Cohen 1960, "A coefficient of agreement for nominal scales", Educational and Psychological Measurement 20(1).
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from nltk.metrics.agreement import AnnotationTask

Value = TypeVar("Value", bound=str | int)
Difference = Callable[[Value, Value, Mapping[Value, float], Sequence[Value]], float]


def nominal(one: Value, other: Value, totals: Mapping[Value, float], order: Sequence[Value]) -> float:
    """1 for two different values, else 0."""
    return float(one != other)


def ordinal(one: Value, other: Value, totals: Mapping[Value, float], order: Sequence[Value]) -> float:
    """Squared number of given values from one to the other in order, both ends counted half; 0 if equal."""
    low, high = sorted((order.index(one), order.index(other)))
    between = sum(totals.get(each, 0.0) for each in order[low : high + 1])
    return float(between - (totals.get(one, 0.0) + totals.get(other, 0.0)) / 2) ** 2 if low != high else 0.0


def krippendorff_alpha(
    units: Iterable[Sequence[Value]], order: Sequence[Value], difference: Difference[Value] = nominal
) -> float | None:
    """Krippendorff's alpha: 1 for perfect agreement, 0 for chance, below 0 for less than that.

    Args:
        units: one per judged item: the values that its judges gave. A unit with one value is ignored.
        order: the values, from the lowest to the highest. Only `ordinal` needs their order.

    Returns:
        None if no unit has two values, or if all values are the same: then chance agreement is undefined.
    """
    judged = [unit for unit in units if len(unit) > 1]
    totals = Counter(value for unit in judged for value in unit)
    if len(totals) < 2:
        return None
    return float(_task(judged, lambda one, other: difference(one, other, totals, order)).alpha())


def cohen_kappa(judged: Iterable[tuple[Value, Value]]) -> float | None:
    """Cohen's kappa of two judges: (agreement - chance) / (1 - chance).

    Args:
        judged: one per item that both judged: the two values.

    Returns:
        None if no item was judged by both, or if all values are the same.
    """
    rows = [*judged]
    if len({value for row in rows for value in row}) < 2:
        return None
    return float(_task(rows, operator.ne).kappa())


def mean_kappa(judged: Mapping[str, Mapping[str, Value]]) -> float | None:
    """Mean of Cohen's kappa over all pairs of judges, weighted by the number of items that both judged.

    Args:
        judged: item -> judge -> value.
    """
    judges = sorted({judge for values in judged.values() for judge in values})
    total, weight = 0.0, 0
    for one, other in combinations(judges, 2):
        both = [
            (values[one], values[other]) for values in judged.values() if one in values and other in values
        ]
        kappa = cohen_kappa(both)
        if kappa is not None:
            total, weight = total + kappa * len(both), weight + len(both)
    return total / weight if weight else None


def _task(units: Iterable[Sequence[Value]], difference: Callable[[Value, Value], float]) -> AnnotationTask:
    """The values in NLTK's format."""
    from nltk.metrics.agreement import AnnotationTask

    rows = [(judge, number, value) for number, unit in enumerate(units) for judge, value in enumerate(unit)]
    return AnnotationTask(rows, difference)
