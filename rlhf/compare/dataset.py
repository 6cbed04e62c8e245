"""Reads the questions, worked examples and passages from their sources."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Generic, NamedTuple, TypeVar, overload

from rlhf.compare.prompts import Question
from rlhf.config import ConfigError
from rlhf.data.formats import Raw, with_columns
from rlhf.data.prepared import PreparedData
from rlhf.data.roles import ROLES, training_roles
from rlhf.data.schema import (
    PromptRow,
    Row,
    RowError,
    SftRow,
    asked_identities,
    draw_at_most,
    prompt_identity,
    text_of,
)
from rlhf.data.sources import SourceConfig

QUESTIONS = "compare.questions"

AnyRow = TypeVar("AnyRow", bound=Row)


class Texts(Sequence[str], Generic[AnyRow]):
    """One text per row, made on access. So the texts of rows in a file need no memory."""

    def __init__(self, rows: Sequence[AnyRow], text: Callable[[AnyRow], str]) -> None:
        self._rows, self._text = rows, text

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Texts[AnyRow]: ...

    def __getitem__(self, index: int | slice) -> str | Texts[AnyRow]:
        if isinstance(index, slice):
            return Texts(self._rows[index], self._text)
        return self._text(self._rows[index])

    def __iter__(self) -> Iterator[str]:
        return map(self._text, self._rows)


class Library(NamedTuple):
    """Examples and passages for prompts. Rows of sft.data stay in their file; a corpus is in memory."""

    examples: Sequence[SftRow]
    """Training rows with one user message and its answer."""
    passages: Sequence[str]


class FoundQuestions(NamedTuple):
    """The questions to ask."""

    questions: list[Question]
    num_leaks: int
    """Number of questions left out because a training row asks the same."""


def find_questions(
    source: SourceConfig | None, data: PreparedData, max_questions: int | None
) -> FoundQuestions:
    """The source's rows, with answers if the first row has one; without a source, sft.data's held-out rows.

    Args:
        max_questions: take the first ones only; None for all.

    Raises:
        ConfigError: a row has another format, or no question is left.
    """
    if source is None:
        usable = (row for row in data.rows("sft", "held_out") if row.prompt and not row.uses_tools)
        texts = ((row.prompt, text_of(row.completion)) for row in islice(usable, max_questions))
        held_out = [
            Question("sft.data, held out", PromptRow(prompt, columns={"completion": text}), text)
            for prompt, text in texts
        ]
        if not held_out:
            raise ConfigError(
                "compare.questions=null uses the held-out rows of sft.data, and these are plain text. "
                "Set compare.questions to rows with prompt and completion."
            )
        return FoundQuestions(held_out, 0)
    asked = [*_read_questions(source)]
    identities = [prompt_identity(question.row) for question in asked]
    training = (row for role in training_roles(data.roles) for row in data.rows(role, "train"))
    leaks = {*identities}.intersection(each for row in training for each in asked_identities(row))
    questions = [question for question, each in zip(asked, identities, strict=True) if each not in leaks]
    num_leaks = len(asked) - len(questions)
    if not questions:
        raise ConfigError(
            f"compare.questions={source}: each of its {num_leaks} questions is also in a training row. "
            "Give questions that no stage trains on."
        )
    return FoundQuestions(questions[:max_questions], num_leaks)


def find_library(corpus: SourceConfig | None, data: PreparedData, key: str) -> Library:
    """Examples from sft.data's training rows; passages from the corpus, or from the same rows.

    Args:
        key: the corpus's config key.

    Raises:
        ConfigError: a row of the corpus is neither a text nor a question with its answer.
    """
    rows = data.rows("sft", "train")
    usable = (len(row.prompt) == 1 and not row.uses_tools for row in rows)
    examples = rows.pick([place for place, is_one in enumerate(usable) if is_one])
    if corpus is None:
        return Library(examples, Texts(rows, _passage))
    return Library(examples, [_passage(row) for _, row, _ in _read(corpus, key, "sft")])


def _passage(row: Row) -> str:
    assert isinstance(row, SftRow)
    return "\n".join([*(turn["content"] for turn in row.prompt), text_of(row.completion)])


def _read_questions(source: SourceConfig) -> Iterator[Question]:
    for where, row, raw in _read(source, QUESTIONS, "sft" if _has_answers(source) else "evaluate"):
        assert isinstance(row, SftRow | PromptRow)
        if not row.prompt:
            raise ConfigError(f"{QUESTIONS}: {where}: a text without a question. It needs a prompt.")
        if isinstance(row, SftRow) and row.uses_tools:
            raise ConfigError(f"{QUESTIONS}: {where}: it uses tools. compare asks without tools.")
        reference = text_of(row.completion) if isinstance(row, SftRow) else None
        yield Question(f"{QUESTIONS}: {where}", with_columns(row.prompt, raw), reference)


def _has_answers(source: SourceConfig) -> bool:
    """Whether the first row has an answer. The other rows must be like it."""
    _, raw = next(source.rows(QUESTIONS))
    try:
        if not isinstance(raw, RowError):
            ROLES["sft"].parse(raw)
    except RowError as error:
        return error.reason != "no answer"
    return True


def _read(source: SourceConfig, key: str, role: str) -> list[tuple[str, Row, Raw]]:
    rows: list[tuple[str, Row, Raw]] = []
    for where, raw in source.rows(key):
        try:
            if isinstance(raw, RowError):
                raise raw
            rows.append((where, ROLES[role].parse(raw), raw))
        except RowError as error:
            raise ConfigError(f"{key}: {where}: {error} Fix the row.") from None
    return draw_at_most(rows, source.limit, lambda each: prompt_identity(each[1]))
