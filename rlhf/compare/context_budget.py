"""What fits a model's context, and how long questions, examples and passages are in its tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, TypeVar

from rlhf.compare.dataset import QUESTIONS, Library
from rlhf.compare.prompts import (
    FewShotConfig,
    PromptMethod,
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
"""Examples and passages whose tokens are counted, evenly spread over all."""


@dataclass(frozen=True)
class ContextBudget:
    """What a model's context has room for."""

    tokenizer: PreTrainedTokenizerBase
    context_length: int
    max_new_tokens: int

    def length(self, messages: Sequence[Message]) -> int:
        """Tokens of a conversation that waits for an answer."""
        return len(prompt_ids(self.tokenizer, messages))

    def reference_length(self, question: Question) -> int:
        """Tokens of the reference with its end of turn, half of the context at most; 0 without one."""
        if question.reference is None:
            return 0
        ids, given = exchange_ids(self.tokenizer, question.prompt, question.reference)
        return min(len(ids) - given, self.context_length // 2)

    def beside_answer(self, question: Question) -> int:
        """Tokens that a prompt may have: the sampled answer follows it, and the reference does."""
        return self.context_length - max(self.max_new_tokens, self.reference_length(question))

    def check(self, question: Question, prompt: Sequence[Message]) -> int:
        """Tokens of the prompt that has nothing around the question.

        Raises:
            ConfigError: it does not fit.
        """
        length, room = self.length(prompt), self.beside_answer(question)
        if length > room:
            raise ConfigError(
                f"{QUESTIONS}: {question.where}: the question has {length} tokens; the model's "
                f"context of {self.context_length} leaves {room} beside its answer. Shorten it, or lower "
                f"compare.max_new_tokens={self.max_new_tokens}."
            )
        return length


@dataclass(frozen=True)
class Sizes:
    """How long everything is that prompts are made of."""

    questions: dict[PromptMethod, LengthStats]
    """With nothing around them but the method's template."""
    references: LengthStats
    examples: LengthStats
    passages: LengthStats

    def asked(self, method: PromptMethod, few_shot: FewShotConfig, retrieval: RetrievalConfig) -> LengthStats:
        """Questions with all that a method would put before them, if it fitted."""
        question = self.questions[method]
        before = {
            "zero_shot": [],
            "few_shot": [self.examples] * few_shot.examples,
            "retrieval": [self.passages] * retrieval.passages,
        }
        return joined(question, *before[method])._replace(rows=question.rows)


def measured(
    room: ContextBudget,
    questions: Sequence[Question],
    library: Library,
    methods: Collection[PromptMethod],
    few_shot: FewShotConfig,
    retrieval: RetrievalConfig,
) -> Sizes:
    """Count the tokens of all of them.

    Raises:
        ConfigError: a question does not fit the context, even with nothing around it.
    """

    def bare(method: PromptMethod, question: Question) -> Sequence[Message]:
        if method == "few_shot":
            return few_shot_prompt(question, (), few_shot)
        return retrieval_prompt(question, (), retrieval)

    asked = {
        method: lengths_of([room.check(question, bare(method, question)) for question in questions])
        for method in methods
    }
    examples = [
        len(exchange_ids(room.tokenizer, row.prompt, row.completion)[0]) for row in _some(library.examples)
    ]
    passages = [
        len(room.tokenizer(fill(retrieval.passage_template, passage=text))["input_ids"])
        for text in _some(library.passages)
    ]
    references = [room.reference_length(question) for question in questions]
    return Sizes(asked, lengths_of(references), lengths_of(examples), lengths_of(passages))


def lengths_of(tokens: Sequence[int]) -> LengthStats:
    """Of rows with so many tokens."""
    if not tokens:
        return LengthStats(0, 0.0, 0.0, 0)
    return LengthStats(len(tokens), fmean(tokens), pstdev(tokens), max(tokens))


def _some(rows: Sequence[Item]) -> Sequence[Item]:
    return rows[:: max(1, len(rows) // MEASURED_ROWS)]
