"""How far annotators agree, beyond chance. NLTK computes both coefficients (`nltk.metrics.agreement`).

Ours is what it lacks: the ordinal difference; the mean of kappas where not everybody judged everything; None
where a coefficient has no meaning (NLTK says 1, or raises an error). The package `krippendorff` has the
ordinal difference, but its licence is the GPL.

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
    """Any two different values differ by 1."""
    return float(one != other)


def ordinal(one: Value, other: Value, totals: Mapping[Value, float], order: Sequence[Value]) -> float:
    """Two values differ by how many values lie between them in their order, squared."""
    low, high = sorted((order.index(one), order.index(other)))
    between = sum(totals.get(each, 0.0) for each in order[low : high + 1])
    return float(between - (totals.get(one, 0.0) + totals.get(other, 0.0)) / 2) ** 2 if low != high else 0.0


def krippendorff_alpha(
    units: Iterable[Sequence[Value]], order: Sequence[Value], difference: Difference[Value] = nominal
) -> float | None:
    """Krippendorff's alpha: 1 for perfect agreement, 0 for chance, below 0 for less than that.

    Args:
        units: for each thing that was judged, what each of its judges said. A unit with one judge counts for
            nothing.
        order: the values, from the lowest to the highest. Only `ordinal` needs their order.

    Returns:
        None if no unit has two judges, or if all of them said the same one value, so that chance has no
        meaning.
    """
    judged = [unit for unit in units if len(unit) > 1]
    totals = Counter(value for unit in judged for value in unit)
    if len(totals) < 2:
        return None
    return float(_task(judged, lambda one, other: difference(one, other, totals, order)).alpha())


def cohen_kappa(judged: Iterable[tuple[Value, Value]]) -> float | None:
    """Cohen's kappa of two judges: (agreement - chance) / (1 - chance).

    Args:
        judged: for each thing that both judged, what each of them said.

    Returns:
        None if there is nothing that both judged, or if both always said the same one value.
    """
    rows = [*judged]
    if len({value for row in rows for value in row}) < 2:
        return None
    return float(_task(rows, operator.ne).kappa())


def mean_kappa(judged: Mapping[str, Mapping[str, Value]]) -> float | None:
    """Cohen's kappa of every two judges, each weighted by the number of things that both judged.

    Args:
        judged: thing -> judge -> what they said.
    """
    judges = sorted({judge for said in judged.values() for judge in said})
    total, weight = 0.0, 0
    for one, other in combinations(judges, 2):
        both = [(said[one], said[other]) for said in judged.values() if one in said and other in said]
        kappa = cohen_kappa(both)
        if kappa is not None:
            total, weight = total + kappa * len(both), weight + len(both)
    return total / weight if weight else None


def _task(units: Iterable[Sequence[Value]], difference: Callable[[Value, Value], float]) -> AnnotationTask:
    """What each judge said of each unit, as NLTK takes it."""
    from nltk.metrics.agreement import AnnotationTask

    said = [(judge, number, value) for number, unit in enumerate(units) for judge, value in enumerate(unit)]
    return AnnotationTask(said, difference)
