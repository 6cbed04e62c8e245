"""What fits into a model's context, and the token lengths of questions, examples and passages."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, TypeVar

from rlhf.compare.candidate import Method
from rlhf.compare.dataset import Library
from rlhf.compare.prompts import (
    FewShotConfig,
    Question,
    RetrievalConfig,
    few_shot_prompt,
    fill,
    retrieval_prompt,
)
from rlhf.config import ConfigError
from rlhf.costs.stage_cost import joined
from rlhf.data.chat_template import exchange_ids, prompt_ids
from rlhf.data.prepared import LengthStats
from rlhf.data.schema import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = TypeVar("Item")
MEASURED_ROWS = 1000
"""Approximate size of the even sample of examples, and of passages, whose tokens are counted."""


@dataclass(frozen=True)
class ContextBudget:
    """Splits a model's context between prompt and answer."""

    tokenizer: PreTrainedTokenizerBase
    context_length: int
    max_new_tokens: int
    stage: str
    """The stage that asks, for errors."""

    def length(self, messages: Sequence[Message]) -> int:
        """Tokens of a conversation before its answer."""
        return len(prompt_ids(self.tokenizer, messages))

    def reference_length(self, question: Question) -> int:
        """Tokens of the reference with its end of turn, at most half of the context; 0 if none."""
        if question.reference is None:
            return 0
        ids, given = exchange_ids(self.tokenizer, question.prompt, question.reference)
        return min(len(ids) - given, self.context_length // 2)

    def max_prompt_tokens(self, question: Question) -> int:
        """Most tokens of a prompt, so that the sampled answer and the reference fit after it."""
        return self.context_length - max(self.max_new_tokens, self.reference_length(question))

    def check(self, question: Question, prompt: Sequence[Message]) -> int:
        """Tokens of a prompt that holds only the question.

        Raises:
            ConfigError: the prompt does not fit.
        """
        length, limit = self.length(prompt), self.max_prompt_tokens(question)
        if length > limit:
            raise ConfigError(
                f"{self.stage}: {question.where}: the question has {length} tokens; the model's "
                f"context of {self.context_length} leaves {limit} for a prompt. Shorten it, or lower "
                f"{self.stage}.max_new_tokens={self.max_new_tokens}."
            )
        return length


@dataclass(frozen=True)
class Sizes:
    """Token lengths of all parts of prompts."""

    questions: dict[Method, LengthStats]
    """Method -> lengths of the questions in its template, without examples or passages."""
    references: LengthStats
    examples: LengthStats
    passages: LengthStats

    def asked(self, method: Method, few_shot: FewShotConfig, retrieval: RetrievalConfig) -> LengthStats:
        """Lengths of full prompts: questions with all examples or passages, as if they always fitted."""
        question = self.questions.get(method, self.questions["zero_shot"])
        before = {
            "few_shot": [self.examples] * few_shot.examples,
            "retrieval": [self.passages] * retrieval.passages,
        }
        return joined(question, *before.get(method, []))._replace(rows=question.rows)


def measure_sizes(
    budget: ContextBudget,
    questions: Sequence[Question],
    library: Library,
    methods: Collection[Method],
    few_shot: FewShotConfig,
    retrieval: RetrievalConfig,
) -> Sizes:
    """Count the tokens of all parts of prompts.

    Raises:
        ConfigError: a question does not fit the context, even alone.
    """

    def bare(method: Method, question: Question) -> Sequence[Message]:
        if method == "few_shot":
            return few_shot_prompt(question, (), few_shot)
        return retrieval_prompt(question, (), retrieval)

    asked = {
        method: lengths_of([budget.check(question, bare(method, question)) for question in questions])
        for method in methods
    }
    examples = [
        len(exchange_ids(budget.tokenizer, row.prompt, row.completion)[0])
        for row in _sample(library.examples)
    ]
    passages = [
        len(budget.tokenizer(fill(retrieval.passage_template, passage=text))["input_ids"])
        for text in _sample(library.passages)
    ]
    references = [budget.reference_length(question) for question in questions]
    return Sizes(asked, lengths_of(references), lengths_of(examples), lengths_of(passages))


def lengths_of(tokens: Sequence[int]) -> LengthStats:
    """Length statistics from each row's tokens."""
    if not tokens:
        return LengthStats(0, 0.0, 0.0, 0)
    return LengthStats(len(tokens), fmean(tokens), pstdev(tokens), max(tokens))


def _sample(rows: Sequence[Item]) -> Sequence[Item]:
    return rows[:: max(1, len(rows) // MEASURED_ROWS)]
