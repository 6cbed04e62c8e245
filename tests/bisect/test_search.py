"""The search for causes, with answers that are made up: which trials it asks for, and what it concludes."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from rlhf.bisect.search import Answer, Found, Part, plan, search, smallest

STAGES = [
    ["ppo.a", "ppo.b", "ppo.c", "ppo.d"],
    ["reward.a", "reward.b"],
    ["sft.a", "sft.b", "sft.c"],
    ["seed"],
]
NAMES = frozenset(itertools.chain(*STAGES))


class Oracle:
    """Answers by a rule, remembers, and counts the trials."""

    def __init__(self, rule: Callable[[Part], Answer | bool]) -> None:
        self.rule, self.asked = rule, list[Part]()

    def __call__(self, part: Part) -> Answer:
        if part not in self.asked:
            self.asked.append(part)
        answer = self.rule(part)
        return answer if isinstance(answer, Answer) else Answer.BAD if answer else Answer.GOOD


def part(*names: str) -> Part:
    return frozenset(names)


@pytest.mark.parametrize("cause", sorted(NAMES))
def test_one_cause_is_found_in_few_trials(cause: str) -> None:
    oracle = Oracle(lambda tried: cause in tried)
    assert search(STAGES, oracle) == Found([part(cause)], Answer.GOOD)
    assert len(oracle.asked) <= 9  # one by one it takes 10, and that would show no interaction
    assert NAMES - {cause} in oracle.asked, "taken out it mends"
    assert part(cause) in oracle.asked, "put in alone it breaks"


def test_whole_stages_are_tried_before_single_keys_and_the_first_group_before_the_others() -> None:
    oracle = Oracle(lambda tried: "sft.b" in tried)
    search(STAGES, oracle)
    groups = [frozenset(group) for group in STAGES]
    is_whole = [all(group <= tried or not group & tried for group in groups) for tried in oracle.asked]
    first_part = is_whole.index(False)
    assert all(is_whole[:first_part]) and oracle.asked[0] == groups[0] | groups[1]
    assert all(tried <= groups[2] for tried in oracle.asked[first_part:-1])


@pytest.mark.parametrize("pair", itertools.combinations(sorted(NAMES), 2))
def test_two_that_are_bad_only_together_are_one_cause(pair: tuple[str, str]) -> None:
    oracle = Oracle(lambda tried: {*pair} <= tried)
    assert search(STAGES, oracle) == Found([part(*pair)], Answer.GOOD)
    assert len(oracle.asked) <= 15


def test_many_that_are_bad_only_together_take_few_trials() -> None:
    """As of a reward of its own that takes five keys, among four that do nothing."""
    stages = [["ppo.a", "ppo.b", "ppo.c"], ["generate.a", "generate.b"], ["reward.a", "reward.b"], ["sft.a"]]
    cause = part("ppo.b", "ppo.c", "generate.a", "generate.b", "reward.b")
    oracle = Oracle(cause.issubset)
    assert search(stages, oracle) == Found([cause], Answer.GOOD)
    assert {cause - {name} for name in cause} <= {*oracle.asked}, "each is shown to be needed"
    assert len(oracle.asked) <= 21  # ddmin takes 37


def test_what_one_difference_hides_is_left_out_again() -> None:
    """`c` mends what `b` breaks, and `a` breaks all: with all three in, half of them looks needed."""
    oracle = Oracle(lambda tried: "a" in tried and ("b" not in tried or "c" in tried))
    assert smallest([part(name) for name in "bca"], oracle) == part("a")


def test_each_half_of_a_pair_is_shown_to_be_good_alone() -> None:
    oracle = Oracle(lambda tried: {"ppo.a", "sft.b"} <= tried)
    search(STAGES, oracle)
    assert {part("ppo.a"), part("sft.b")} <= {*oracle.asked}


@pytest.mark.parametrize("pair", [("ppo.a", "sft.b"), ("sft.a", "sft.c"), ("ppo.d", "seed")])
def test_two_of_which_each_is_bad_alone_are_two_causes(pair: tuple[str, str]) -> None:
    found = search(STAGES, Oracle(lambda tried: bool({*pair} & tried)))
    assert {*found.causes} == {part(pair[0]), part(pair[1])}
    assert found.without is Answer.GOOD


def test_a_key_that_cannot_go_without_another_is_found_with_it() -> None:
    """As with a reward that needs a column which only the other run's rows have."""

    def rule(tried: Part) -> Answer:
        if ("ppo.a" in tried) != ("reward.a" in tried):
            return Answer.UNKNOWN
        return Answer.BAD if "ppo.a" in tried else Answer.GOOD

    assert search(STAGES, Oracle(rule)) == Found([part("ppo.a", "reward.a")], Answer.GOOD)


def test_an_unknown_answer_makes_the_result_larger_but_never_wrong() -> None:
    unknown = {part("sft.b"), part("sft.a", "sft.b")}
    found = search(STAGES, Oracle(lambda each: Answer.UNKNOWN if each in unknown else "sft.b" in each))
    assert len(found.causes) == 1
    assert "sft.b" in found.causes[0] and len(found.causes[0]) == 2


def test_where_nothing_can_be_told_everything_remains_and_it_ends() -> None:
    oracle = Oracle(lambda tried: Answer.UNKNOWN)
    assert search(STAGES, oracle) == Found([NAMES], Answer.GOOD)
    assert len(oracle.asked) < 100


def test_an_unknown_end_is_said() -> None:
    found = search([["a"], ["b"]], Oracle(lambda tried: tried == {"a"} or Answer.UNKNOWN))
    assert found == Found([part("a")], Answer.UNKNOWN)


def test_one_difference_takes_no_trial() -> None:
    oracle = Oracle(lambda tried: pytest.fail("asked"))
    assert search([["sft.data"]], oracle) == Found([part("sft.data")], Answer.GOOD)


def test_none_can_be_left_out_of_the_smallest() -> None:
    def rule(tried: Part) -> bool:
        return len(tried & {"a", "b", "c", "d", "e"}) >= 3

    found = smallest([part(name) for name in "abcdefgh"], Oracle(rule))
    assert rule(found) and not any(rule(found - {name}) for name in found)


def test_the_plan_names_the_trials_that_would_follow() -> None:
    plans = plan(STAGES, lambda tried: Answer.BAD if tried == NAMES else None)
    assert len(plans) == len(NAMES)
    for cause, planned in zip(itertools.chain(*STAGES), plans, strict=True):
        oracle = Oracle(frozenset([cause]).issubset)
        search(STAGES, oracle)
        assert planned == oracle.asked


def test_the_plan_shrinks_with_what_is_known() -> None:
    oracle = Oracle(lambda tried: "sft.b" in tried)
    search(STAGES, oracle)
    known = {tried: "sft.b" in tried for tried in oracle.asked[:3]}

    def answer(tried: Part) -> Answer | None:
        if tried not in known:
            return None
        return Answer.BAD if known[tried] else Answer.GOOD

    plans = plan(STAGES, answer)
    assert oracle.asked[3:] in plans
    assert len(plans) < len(NAMES), "causes that do not go with the answers are left out"
