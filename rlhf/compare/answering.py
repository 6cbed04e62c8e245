"""Asks a policy: builds the prompts of a method, measures its setup, and times single requests."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf.compare.candidate import Method
from rlhf.compare.context_budget import ContextBudget
from rlhf.compare.dataset import Library, Texts
from rlhf.compare.prompts import (
    FewShotConfig,
    Question,
    RetrievalConfig,
    few_shot_prompt,
    fit_prompt,
    retrieval_prompt,
)
from rlhf.compare.retrieval import Index
from rlhf.data.schema import Message, SftRow, text_of
from rlhf.generation.policy_model import PolicyModel


@dataclass(frozen=True)
class PromptBuilder:
    """Makes prompts from questions."""

    find: Callable[[str], Sequence[Any]]
    """Question text -> examples or passages, the best first."""
    prompt: Callable[[Question, Sequence[Any]], list[Message]]
    """(question, examples or passages) -> the conversation."""
    setup_seconds: float = 0.0
    """Seconds to build the search index."""
    num_bytes: int = 0
    """Bytes of the prompts' source texts and of their search index."""

    def build(self, question: Question, budget: ContextBudget | None) -> tuple[list[Message], int]:
        """The conversation, and the number of examples or passages that did not fit.

        Args:
            budget: of the model that is asked; None takes all examples and passages.

        Raises:
            ConfigError: the question alone does not fit.
        """
        items = self.find(question.text)
        if budget is None:
            return self.prompt(question, items), 0
        budget.check(question, self.prompt(question, ()))  # a tuned model's context may be shorter
        build = partial(self.prompt, question)
        return fit_prompt(build, items, budget.length, budget.max_prompt_tokens(question))


QUESTION_ALONE = PromptBuilder(lambda text: (), lambda question, items: question.prompt)
"""Asks the question without anything else."""


def make_prompt_builder(
    method: Method,
    library: Library,
    few_shot: FewShotConfig,
    retrieval: RetrievalConfig,
    make_index: Callable[[Sequence[str]], Index],
    seed: int,
) -> PromptBuilder:
    """Build the prompt builder of a method, with its search index. few_shot needs examples in the library."""
    start = time.perf_counter()
    if method == "retrieval":
        index = make_index(library.passages)
        return PromptBuilder(
            lambda text: [library.passages[place] for place in index.search(text, retrieval.passages)],
            partial(retrieval_prompt, config=retrieval),
            time.perf_counter() - start,
            index.num_bytes,
        )
    if method != "few_shot":
        return QUESTION_ALONE
    examples, prompt = library.examples, partial(few_shot_prompt, config=few_shot)
    if few_shot.choice == "random":
        drawn = random.Random(seed).sample(examples, min(few_shot.examples, len(examples)))
        num_bytes = sum(_num_bytes(row.prompt, text_of(row.completion)) for row in drawn)
        return PromptBuilder(lambda text: drawn, prompt, 0.0, num_bytes)
    index = make_index(Texts(examples, lambda row: row.prompt[-1]["content"]))
    others = random.Random(seed).sample(range(len(examples)), len(examples))

    def nearest(text: str) -> list[SftRow]:
        nearest_places = index.search(text, few_shot.examples)
        places = [*nearest_places, *(place for place in others if place not in nearest_places)]
        return [examples[place] for place in places[: few_shot.examples]]

    return PromptBuilder(
        nearest,
        prompt,
        time.perf_counter() - start,
        index.num_bytes + sum(_num_bytes([], text_of(row.completion)) for row in examples),
    )


def _num_bytes(prompt: Sequence[Message], completion: str) -> int:
    return sum(len(text.encode()) for text in (*(turn["content"] for turn in prompt), completion))


def request_seconds(
    policy: PolicyModel,
    questions: Sequence[Question],
    answer: Callable[[Question], object],
    on_answer: Callable[[], None],
) -> Tensor:
    """Seconds of each request, fp64 [B], asked one at a time, as a user waits for it.

    The first question is asked once before timing starts, because the first call sets up caches and threads.

    Args:
        questions: B of them.
        answer: search, prompt, sampling and scoring of one request.
    """
    seconds = []
    with policy.ready():
        answer(questions[0])
        for question in questions:
            policy.hand_over()  # untimed: vLLM drops the weights after each call, a server would not
            start = time.perf_counter()
            answer(question)
            seconds.append(time.perf_counter() - start)
            on_answer()
    return torch.tensor(seconds, dtype=torch.float64)
