"""How a question becomes a prompt, and what goes when the context is too short."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf.compare.prompts import (
    FewShotConfig,
    Question,
    RetrievalConfig,
    few_shot_prompt,
    fill,
    fit_prompt,
    retrieval_prompt,
)
from rlhf.config import ConfigError, validated
from rlhf.data.schema import Message, PromptRow, SftRow

FEW_SHOT = {"examples": 2, "choice": "nearest", "template": "Q: {question}"}
RETRIEVAL = {"passages": 2, "passage_template": "- {passage}\n", "template": "{passages}\nAsked: {question}"}


def user(text: str) -> Message:
    return Message(role="user", content=text)


def few_shot(**changes: Any) -> FewShotConfig:
    return validated(FewShotConfig, FEW_SHOT | changes, "compare.few_shot")


def retrieval(**changes: Any) -> RetrievalConfig:
    return validated(RetrievalConfig, RETRIEVAL | changes, "compare.retrieval")


def question(*messages: Message) -> Question:
    return Question("here", PromptRow(list(messages) or [user("Why?")]), None)


def test_examples_are_turns_and_the_nearest_stands_last() -> None:
    examples = [SftRow([user(text)], text.upper()) for text in ("near", "far")]
    system = Message(role="system", content="Be short.")
    earlier = [user("Hi"), Message(role="assistant", content="Hello")]
    prompt = few_shot_prompt(question(system, *earlier, user("Why?")), examples, few_shot())
    assert [(turn["role"], turn["content"]) for turn in prompt] == [
        ("system", "Be short."),
        ("user", "Q: far"), ("assistant", "FAR"), ("user", "Q: near"), ("assistant", "NEAR"),
        ("user", "Hi"), ("assistant", "Hello"), ("user", "Q: Why?"),
    ]  # fmt: skip


def test_passages_stand_before_the_question_the_best_first() -> None:
    prompt = retrieval_prompt(question(user("Hi"), user("Why?")), ["best", "second"], retrieval())
    assert prompt == [user("Hi"), user("- best\n- second\n\nAsked: Why?")]


def test_without_passages_the_question_is_asked_alone() -> None:
    assert retrieval_prompt(question(), [], retrieval()) == [user("Why?")]


def test_braces_in_texts_are_only_text() -> None:
    template = '{"notes": "{passages}", "ask": "{question}"}'
    filled = fill(template, passages="{question} {0}", question="{passages}")
    assert filled == '{"notes": "{question} {0}", "ask": "{passages}"}'


@pytest.mark.parametrize(
    ("room", "kept", "left_out"),
    [(99, "abc", 0), (3, "abc", 0), (2, "ab", 1), (0, "", 3), (-5, "", 3)],
)
def test_the_least_good_go_first_and_whole(room: int, kept: str, left_out: int) -> None:
    found = fit_prompt(
        lambda items: [user("".join(items))], "abc", lambda prompt: len(prompt[0]["content"]), room
    )
    assert found == ([user(kept)], left_out)


@pytest.mark.parametrize("key", ["passage_template", "template"])
def test_a_template_must_name_what_it_is_filled_with(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"compare\.retrieval\.{key}=.*must hold \{{passages?\}}"):
        retrieval(**{key: "Look: {question}"})
    with pytest.raises(ConfigError, match=r"compare\.few_shot\.template=.*must hold \{question\}"):
        few_shot(template="Look")
