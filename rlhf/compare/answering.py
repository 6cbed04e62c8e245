"""Asks a policy with one prompt method: builds the prompts, measures the setup, and collects the answers."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf.compare.context_budget import ContextBudget
from rlhf.compare.dataset import Library, Texts
from rlhf.compare.prompts import (
    FewShotConfig,
    PromptMethod,
    Question,
    RetrievalConfig,
    few_shot_prompt,
    fit_prompt,
    retrieval_prompt,
)
from rlhf.compare.retrieval import Index
from rlhf.data.schema import Message, SftRow, text_of
from rlhf.generation.policy_model import PolicyModel
from rlhf.rl.rollout import Rollout


@dataclass(frozen=True)
class PromptBuilder:
    """Makes prompts from questions."""

    find: Callable[[str], Sequence[Any]]
    """Question text -> examples or passages, the best first."""
    prompt: Callable[[Question, Sequence[Any]], list[Message]]
    """(question, examples or passages) -> the conversation."""
    setup_seconds: float
    """Seconds to build the search index."""
    num_bytes: int
    """Bytes of the prompts' source texts and of their search index."""


def make_prompt_builder(
    method: PromptMethod,
    library: Library,
    few_shot: FewShotConfig,
    retrieval: RetrievalConfig,
    make_index: Callable[[Sequence[str]], Index],
    seed: int,
) -> PromptBuilder:
    """Build the prompt builder of a method, with its search index. few_shot needs examples in the library."""
    if method == "zero_shot":
        return PromptBuilder(lambda text: (), lambda question, items: question.prompt, 0.0, 0)
    start = time.perf_counter()
    if method == "retrieval":
        index = make_index(library.passages)
        return PromptBuilder(
            lambda text: [library.passages[place] for place in index.search(text, retrieval.passages)],
            partial(retrieval_prompt, config=retrieval),
            time.perf_counter() - start,
            index.num_bytes,
        )
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


@dataclass
class Answers:
    """One contender's prompts and answers, one entry per question."""

    asked: list[list[Message]]
    rollout: Rollout
    texts: list[str]
    seconds_B: Tensor
    """Seconds from the question to the last token, fp64: search, prompt and sampling."""
    num_cut: list[int]
    """Number of examples or passages that were left out because they did not fit the context."""
    scores: dict[str, Tensor] = field(default_factory=dict)
    """Name of the quality -> scores, fp64 [B]."""
    figures: dict[str, float] = field(default_factory=dict)
    """Metrics measured while the model was in memory."""

    def row(self, index: int) -> dict[str, Any]:
        """One answer as plain values."""
        return {
            "response": self.texts[index],
            "stopped": bool(self.rollout.stopped[index]),
            "tokens": len(self.rollout.response_ids[index]),
            "seconds": round(float(self.seconds_B[index]), 4),
            "cut": self.num_cut[index],
            **{quality: round(float(score_B[index]), 4) for quality, score_B in self.scores.items()},
        }


def answer_one_by_one(
    policy: PolicyModel,
    builder: PromptBuilder,
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    on_answer: Callable[[], None],
) -> Answers:
    """One answer per question, each sampled alone and timed, as a user waits for it.

    The first question is asked once before timing starts, because the first call sets up caches and threads.

    Raises:
        ConfigError: a question does not fit the context.
    """
    generator = torch.Generator().manual_seed(seed)
    budget = ContextBudget(policy.tokenizer, policy.context_length, max_new_tokens)

    def answer(question: Question) -> tuple[list[Message], int, Rollout, str]:
        budget.check(question, builder.prompt(question, ()))  # a tuned model's context may be shorter
        build = partial(builder.prompt, question)
        asked, num_cut = fit_prompt(
            build, builder.find(question.text), budget.length, budget.max_prompt_tokens(question)
        )
        rollout, texts = policy.sample(
            [asked], max_new_tokens=max_new_tokens, temperature=temperature, generator=generator, batch_rows=1
        )
        return asked, num_cut, rollout, texts[0]

    answered, seconds = [], []
    with policy.ready():
        answer(questions[0])
        generator.manual_seed(seed)
        for question in questions:
            policy.hand_over()  # untimed: vLLM drops the weights after each call, a server would not
            start = time.perf_counter()
            answered.append(answer(question))
            seconds.append(time.perf_counter() - start)
            on_answer()
    asked, num_cut, rollouts, texts = zip(*answered, strict=True)
    seconds_B = torch.tensor(seconds, dtype=torch.float64)
    return Answers(list(asked), Rollout.concatenate(list(rollouts)), list(texts), seconds_B, list(num_cut))
