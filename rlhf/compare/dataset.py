"""The questions, the worked examples and the passages, as rows of their sources."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from rlhf.compare.prompts import Question
from rlhf.config import ConfigError
from rlhf.data.formats import Raw, with_columns
from rlhf.data.prepared import PreparedData
from rlhf.data.roles import ROLES, training_roles
from rlhf.data.schema import PromptRow, Row, RowError, SftRow, limited, prompt_identity
from rlhf.data.sources import SourceConfig

QUESTIONS, CORPUS = "compare.questions", "compare.corpus"


class Library(NamedTuple):
    """What prompts are made of."""

    examples: list[SftRow]
    """Training rows of one user message and its answer."""
    passages: list[str]


class Found(NamedTuple):
    """The questions to ask."""

    questions: list[Question]
    num_leaks: int
    """Questions left out, because a training row asks the same."""


def find_questions(source: SourceConfig | None, data: PreparedData) -> Found:
    """The source's rows, with their answers where the first row has one; or sft.data's held-out rows.

    Raises:
        ConfigError: a row is none of that, or none is left.
    """
    if source is None:
        rows = data.rows("sft", "held_out")
        held_out = [
            Question("sft.data, held out", row.prompt, row.completion, {"completion": row.completion})
            for row in rows
            if row.prompt
        ]
        if not held_out:
            raise ConfigError(
                "compare.questions=null uses the held-out rows of sft.data, and these are plain text. "
                "Set compare.questions to rows with prompt and completion."
            )
        return Found(held_out, 0)
    trained = {prompt_identity(row) for role in training_roles() for row in data.rows(role, "train")}
    found, leaks = [], 0
    for question in _read_questions(source):
        if prompt_identity(PromptRow(question.prompt)) in trained:
            leaks += 1
        else:
            found.append(question)
    if not found:
        raise ConfigError(
            f"compare.questions={source}: each of its {leaks} questions is also in a training row. "
            "Give questions that no stage trains on."
        )
    return Found(found, leaks)


def find_library(corpus: SourceConfig | None, data: PreparedData) -> Library:
    """Examples from sft.data's training rows; passages from the corpus, or from the same rows.

    Raises:
        ConfigError: a row of the corpus is neither a text nor a question with its answer.
    """
    rows = data.rows("sft", "train")
    documents: Iterable[Row] = rows if corpus is None else (row for _, row, _ in _read(corpus, CORPUS, "sft"))
    passages = []
    for row in documents:
        assert isinstance(row, SftRow)
        passages.append("\n".join([*(turn["content"] for turn in row.prompt), row.completion]))
    return Library([row for row in rows if len(row.prompt) == 1], passages)


def _read_questions(source: SourceConfig) -> Iterator[Question]:
    for where, row, raw in _read(source, QUESTIONS, "sft" if _has_answers(source) else "evaluate"):
        assert isinstance(row, SftRow | PromptRow)
        if not row.prompt:
            raise ConfigError(f"{QUESTIONS}: {where}: a text without a question. It needs a prompt.")
        reference = row.completion if isinstance(row, SftRow) else None
        yield Question(where, row.prompt, reference, with_columns(row.prompt, raw).columns)


def _has_answers(source: SourceConfig) -> bool:
    """Whether the first row has one; the others shall be like it."""
    _, raw = next(source.rows(QUESTIONS))
    try:
        if not isinstance(raw, RowError):
            ROLES["sft"].parse(raw)
    except RowError as error:
        return error.reason != "no answer"
    return True


def _read(source: SourceConfig, key: str, role: str) -> list[tuple[str, Row, Raw]]:
    found: list[tuple[str, Row, Raw]] = []
    for where, raw in source.rows(key):
        try:
            if isinstance(raw, RowError):
                raise raw
            found.append((where, ROLES[role].parse(raw), raw))
        except RowError as error:
            raise ConfigError(f"{key}: {where}: {error} Fix the row.") from None
    return limited(found, source.limit, lambda each: prompt_identity(each[1]))
