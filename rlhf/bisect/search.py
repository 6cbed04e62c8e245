"""The smallest sets of differences that make a good run bad, with few trials.

Sources: Zeller and Hildebrandt 2002, "Simplifying and isolating failure-inducing input", IEEE Transactions on
Software Engineering 28(2): delta debugging. Junker 2004, "QuickXplain: preferred explanations and relaxations
for over-constrained problems", AAAI, algorithm 1: the order of the trials. Where k of n differences do harm
only together, it takes in the order of k log(n / k) trials, and ddmin of Zeller and Hildebrandt k squared.
Misherghi and Su 2006, "HDD: hierarchical delta debugging", ICSE: groups before their members.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import Enum
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
        stages = union(harmful([frozenset(group) for group in rest if group], test))
        names = [name for group in rest for name in group if name in stages]
        cause = smallest([frozenset([name]) for name in names], test)
        causes.append(cause)
        rest = [[name for name in group if name not in cause] for group in rest]
        left = union(map(frozenset, rest))
        without = test(left) if left else Answer.GOOD
    return Found(causes, without)


def smallest(units: Sequence[Part], test: Test) -> Part:
    """Some of the units that together are bad, of which none can be left out. All of them together are known
    to be bad."""
    needed = harmful(units, test)
    for unit in needed if len(needed) > 1 else ():
        # if one difference hides the harm of another, QuickXplain may keep what is not needed
        rest = [each for each in needed if each != unit]
        if rest and test(union(rest)) is Answer.BAD:
            needed = rest
    return union(needed)


def harmful(
    units: Sequence[Part], test: Test, background: Sequence[Part] = (), *, is_new: bool = False
) -> list[Part]:
    """The algorithm QuickXplain: few of the units that together with the background are bad. All of them
    together with the background are known to be bad.

    An unknown answer counts as not bad, so the result may be larger than necessary, but is never wrong.

    Args:
        is_new: whether the background has grown, so that it may be bad without any of the units.
    """
    if is_new and test(union(background)) is Answer.BAD:
        return []
    if len(units) == 1:
        return [*units]
    half = (len(units) + 1) // 2
    first, second = units[:half], units[half:]
    of_second = harmful(second, test, [*background, *first], is_new=True)
    of_first = harmful(first, test, [*background, *of_second], is_new=bool(of_second))
    return [*of_first, *of_second]


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
