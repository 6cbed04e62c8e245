"""Delta debugging: the smallest sets of differences that make a good run bad.

Sources: Zeller and Hildebrandt 2002, "Simplifying and isolating failure-inducing input", IEEE Transactions on
Software Engineering 28(2), figure 5; groups before their members as in Misherghi and Su 2006, "HDD:
hierarchical delta debugging", ICSE.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from itertools import pairwise
from typing import NamedTuple

Part = frozenset[str]
"""Names of differences."""


class Answer(Enum):
    """What a trial showed."""

    GOOD = "good"
    BAD = "bad"
    UNKNOWN = "cannot tell"


Test = Callable[[Part], Answer]
"""Asks whether the good run with these differences put in is bad. It is not called for none of them."""


class Found(NamedTuple):
    """What a search found."""

    causes: list[Part]
    """Sets of differences. Each makes the good run bad, alone. The members of one set only do so together."""
    without: Answer
    """The bad run with all causes taken out."""


def search(groups: Sequence[Sequence[str]], test: Test) -> Found:
    """Find all causes, one after the other: a further one is looked for as long as the bad run without those
    that were found is still bad.

    Args:
        groups: the differences, group by group (such as the keys of a stage). What comes first is tried
            first.
        test: answers. It should remember its answers: the same question comes several times.
    """
    causes: list[Part] = []
    rest = [[*group] for group in groups]
    without = Answer.BAD
    while without is Answer.BAD and any(rest):
        stages = smallest([frozenset(group) for group in rest if group], test)
        names = [name for group in rest for name in group if name in stages]
        cause = smallest([frozenset([name]) for name in names], test)
        causes.append(cause)
        rest = [[name for name in group if name not in cause] for group in rest]
        left = frozenset(name for group in rest for name in group)
        without = test(left) if left else Answer.GOOD
    return Found(causes, without)


def smallest(units: Sequence[Part], test: Test) -> Part:
    """The algorithm ddmin: some of the units that together are bad, of which none can be left out. All of
    them together are known to be bad.

    An unknown answer counts as not bad, so the result may be larger than necessary, but is never wrong.
    """
    num_pieces = 2
    while len(units) > 1:
        pieces = pieces_of(units, min(num_pieces, len(units)))
        rests = [[unit for unit in units if unit not in piece] for piece in pieces]
        if (bad := next((each for each in pieces if test(union(each)) is Answer.BAD), None)) is not None:
            units, num_pieces = bad, 2
        elif (bad := next((each for each in rests if test(union(each)) is Answer.BAD), None)) is not None:
            units, num_pieces = bad, max(2, len(pieces) - 1)
        elif len(pieces) < len(units):
            num_pieces = 2 * len(pieces)
        else:
            break
    return union(units)


def pieces_of(units: Sequence[Part], number: int) -> list[Sequence[Part]]:
    """The units in this many pieces of nearly the same size, in order."""
    ends = [round(len(units) * index / number) for index in range(number + 1)]
    return [units[start:end] for start, end in pairwise(ends)]


def union(parts: Iterable[Part]) -> Part:
    """All names of these parts."""
    return frozenset[str]().union(*parts)


def plan(groups: Sequence[Sequence[str]], known: Callable[[Part], Answer | None]) -> list[list[Part]]:
    """For each difference: the trials that follow, in order, if it alone is to blame. A difference that does
    not go with what is known is left out.

    Args:
        known: the answer of a part that has been tried, or that can never be told; None for all others.
    """
    plans: list[list[Part]] = []
    for cause in (name for group in groups for name in group):
        asked: dict[Part, None] = {}

        def test(part: Part, cause: str = cause, asked: dict[Part, None] = asked) -> Answer:
            if (answer := known(part)) is not None:
                return answer
            asked[part] = None
            return Answer.BAD if cause in part else Answer.GOOD

        found = search(groups, test)
        if found.causes == [frozenset([cause])] or not plans:
            plans.append([*asked])
    return plans
