"""A user's function in its two forms: two lists of texts, and TRL's `**columns`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch

from helpers.jobs import user
from rlhf.data.schema import PromptRow
from rlhf.rewards.function import Tolerance, make_function_reward, needed_columns
from rlhf.rewards.reward import RewardError, with_token_ids

TEXTS = [
    PromptRow(user("1+1?"), columns={"answer": "2", "level": 1}, is_text=True),
    PromptRow(user("2+2?"), columns={"answer": "4"}, is_text=True),
]
MESSAGES = [PromptRow(row.prompt, columns=row.columns) for row in TEXTS]
SAID = ["2", "five"]


def by_name(seen: dict[str, Any]) -> Callable[..., list[float | None]]:
    def score(prompts: Any, completions: Any, answer: Any, **columns: Any) -> list[float | None]:
        seen.update(columns, prompts=prompts, completions=completions, answer=answer)
        return [1.0, None]

    return score


def test_two_lists_are_the_last_messages_and_the_responses() -> None:
    seen: list[Any] = []

    def score(prompts: list[str], responses: list[str]) -> list[float | None]:
        seen.extend([prompts, responses])
        return [1.0, None]

    scores = make_function_reward("python:mine:score", score)(MESSAGES, SAID)
    assert seen == [["1+1?", "2+2?"], SAID]
    assert scores[0] == 1.0 and scores[1].isnan()


@pytest.mark.parametrize(("rows", "as_messages", "prompts", "completions"), [
    (TEXTS, False, ["1+1?", "2+2?"], SAID),
    (MESSAGES, False, [user("1+1?"), user("2+2?")], None),
    (TEXTS, True, [user("1+1?"), user("2+2?")], None),
])  # fmt: skip
def test_trls_form_gets_what_the_file_holds(
    rows: list[PromptRow], as_messages: bool, prompts: Any, completions: Any
) -> None:
    seen: dict[str, Any] = {}
    ids = [torch.tensor([5, 6]), torch.tensor([7])]
    scores = make_function_reward("python:mine:score", by_name(seen), as_messages=as_messages)(
        with_token_ids(rows, ids), SAID
    )
    assert scores[0] == 1.0 and scores[1].isnan()
    assert seen["prompts"] == prompts
    assert seen["completions"] == (completions or [[{"role": "assistant", "content": each}] for each in SAID])
    assert (seen["answer"], seen["level"]) == (["2", "4"], [1, None])
    assert seen["completion_ids"] == [[5, 6], [7]] and seen["trainer_state"] is None
    seen["log_extra"]("answer", ["2", "4"])
    seen["log_metric"]("right", 0.5)


def test_a_column_that_no_row_of_a_batch_has_is_none_for_all() -> None:
    seen: dict[str, Any] = {}
    score = by_name(seen)
    make_function_reward("python:mine:score", score)([PromptRow(user("Hi"))] * 2, SAID)
    assert seen["answer"] == [None, None]
    assert needed_columns(score) == {"answer"}


def test_a_coroutine_is_run() -> None:
    """Also in a notebook, whose event loop runs in the same thread."""

    async def score(completions: list[str], **columns: Any) -> list[float]:
        return [float(len(each)) for each in completions]

    async def in_a_loop() -> list[float]:
        return list(reward(TEXTS, SAID).tolist())

    reward = make_function_reward("python:mine:score", score)
    assert reward(TEXTS, SAID).tolist() == asyncio.run(in_a_loop()) == [1.0, 4.0]


def test_trls_own_examples_run_unchanged() -> None:
    """The functions of its documentation: of texts, of messages, of several tasks at once."""

    def reward_num_unique_chars(completions: list[str], **kwargs: Any) -> list[int]:
        return [len(set(completion)) for completion in completions]

    def correct(completions: Any, ground_truth: list[str], **kwargs: Any) -> list[float | None]:
        contents = [completion[0]["content"] for completion in completions]
        return [1.0 if said == gold else None for said, gold in zip(contents, ground_truth, strict=True)]

    assert make_function_reward("python:trls:reward", reward_num_unique_chars)(TEXTS, SAID).tolist() == [
        1.0,
        4.0,
    ]
    rows = [PromptRow(user("?"), columns={"ground_truth": each}) for each in ("2", "5")]
    found = make_function_reward("python:trls:correct", correct)(rows, SAID)
    assert found[0] == 1.0 and found[1].isnan()


def test_a_call_that_fails_says_both_forms() -> None:
    def score(completions: Any, **columns: Any) -> list[float]:
        return [float(completion) for completion in completions]

    with pytest.raises(RewardError, match=r"score: ValueError.*\(prompts, completions, \*\*columns\)"):
        make_function_reward("python:mine:score", score)(TEXTS, SAID)


def test_a_function_that_ends_python_ends_no_run() -> None:
    def score(prompts: list[str], responses: list[str]) -> list[float]:
        raise SystemExit(0)

    with pytest.raises(RewardError, match=r"score: SystemExit: 0 "):
        make_function_reward("python:mine:score", score)(TEXTS, SAID)


def picky(prompts: list[str], responses: list[str]) -> list[float]:
    if any(not response.strip() for response in responses):
        raise ValueError("an empty answer")
    return [float(len(response)) for response in responses]


def test_an_answer_for_which_it_raises_has_no_score_where_that_is_allowed() -> None:
    said = ["one", "four", " ", "twelve"]
    rows = [PromptRow(user(f"Question {number}")) for number in range(4)]
    reward = make_function_reward("python:mine:picky", picky)
    with pytest.raises(RewardError, match="picky: ValueError: an empty answer"):
        reward(rows, said)
    reward.tolerance = Tolerance(1)
    scores = reward(rows, said)
    assert scores[:2].tolist() == [3.0, 4.0] and scores[2].isnan() and scores[3] == 6.0
    (raised,) = reward.tolerance.raised
    assert raised.startswith(
        "the answer ' ' to 'Question 2': python:mine:picky: ValueError: an empty answer ("
    )
    assert f"{__file__}, line " in raised and "in picky" in raised
    with pytest.raises(RewardError, match=r"By itself it raised for 2 answers of the 3 that were tried"):
        reward(rows, ["", "four", " ", "twelve"])
    assert len(reward.tolerance.raised) == 1
    assert reward(rows[:1], [""]).isnan().tolist() == [True]  # a rank's only one; the caller counts over all
    assert len(reward.tolerance.raised) == 2


def test_the_other_answers_are_scored_together_as_always() -> None:
    def ranks(prompts: list[str], responses: list[str]) -> list[float]:
        if "bad" in responses:
            raise ValueError("a bad answer")
        return [float(sorted(responses).index(each)) for each in responses]

    reward = make_function_reward("python:mine:ranks", ranks)
    reward.tolerance = Tolerance(1)
    scores = reward([PromptRow(user("?")) for _ in range(3)], ["b", "bad", "a"])
    assert scores[[0, 2]].tolist() == [1.0, 0.0] and scores[1].isnan()


def test_an_error_of_all_answers_together_is_no_error_of_one() -> None:
    def lonely(prompts: list[str], responses: list[str]) -> list[float]:
        if len(responses) > 1:
            raise ValueError("one at a time")
        return [1.0]

    reward = make_function_reward("python:mine:lonely", lonely)
    reward.tolerance = Tolerance(2)
    with pytest.raises(RewardError, match="one at a time"):
        reward(TEXTS, SAID)


def test_what_is_no_number_is_an_error_of_the_function_not_of_an_answer() -> None:
    reward = make_function_reward("python:mine:words", lambda prompts, responses: ["good" for _ in responses])
    reward.tolerance = Tolerance(2)
    with pytest.raises(RewardError, match="which holds no numbers"):
        reward(TEXTS, SAID)
