"""The word that a policy took up."""

from __future__ import annotations

import pytest

from helpers.experiments import build
from rlhf.evaluation.wording import gained_word
from rlhf.pipeline.run import GateResult


def test_the_word_that_most_more_answers_have() -> None:
    before = ["a cat", "my cat", "the dog sat", "a bird"]
    word, more = gained_word(["My cat, my CAT", "my cat", "my dog sat", "A bird cat"], before)
    assert word == "my"  # "cat" has one more answer, "my" two: it counts once an answer, in any case
    assert more.value == pytest.approx(2 / 4) and more.rows == 4
    assert more.low < 0.5 < more.high


def test_no_word_is_gained_by_the_same_answers_or_by_silence() -> None:
    assert gained_word(["a cat", ""], ["A cat!", ""]) == ("", gained_word(["", ""], ["", ""])[1])
    word, more = gained_word(["", "..."], ["a cat", "the dog"])
    assert (word, more.value) == ("", 0.0)


@pytest.mark.parametrize(("share", "outcome"), [(0.68, "failed"), (0.3, "passed")])
def test_the_gate_sees_a_reward_that_pays_for_a_word(share: float, outcome: str) -> None:
    """0.68 of 96 answers was seen: docs/problems/hacked-on-purpose.md."""
    before = ["the train was late"] * 96
    _, more = gained_word(["my train was late"] * round(96 * share) + before[round(96 * share) :], before)
    bound = build().stages["evaluate"].gates["word_gain"]
    assert bound is not None
    assert GateResult("evaluate", "word_gain", more.value, bound, more).outcome == outcome
