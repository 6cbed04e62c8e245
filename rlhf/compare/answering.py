"""One way of asking a policy: how its prompts are made, what that takes beforehand, and what it answers."""

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
    fitted,
    retrieval_prompt,
)
from rlhf.compare.retrieval import Index
from rlhf.data.schema import Message, SftRow, text_of
from rlhf.generation.policy_model import PolicyModel
from rlhf.rl.rollout import Rollout


@dataclass(frozen=True)
class PromptBuilder:
    """How questions become prompts."""

    find: Callable[[str], Sequence[Any]]
    """The question's text -> examples or passages, the best first."""
    prompt: Callable[[Question, Sequence[Any]], list[Message]]
    """Those, put around the question."""
    setup_seconds: float
    """To index what is searched."""
    num_bytes: int
    """Of the texts that prompts are made of, and of what searches them."""


def make_prompt_builder(
    method: PromptMethod,
    library: Library,
    few_shot: FewShotConfig,
    retrieval: RetrievalConfig,
    make_index: Callable[[Sequence[str]], Index],
    seed: int,
) -> PromptBuilder:
    """Index what the method searches; the library has examples if it is few_shot."""
    if method == "zero_shot":
        return PromptBuilder(lambda text: (), lambda question, found: question.prompt, 0.0, 0)
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
        found = index.search(text, few_shot.examples)
        places = [*found, *(place for place in others if place not in found)]
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
    """What one contender was asked and said, one entry a question."""

    asked: list[list[Message]]
    rollout: Rollout
    texts: list[str]
    seconds_B: Tensor
    """fp64, from the question to the last token: search, prompt and sampling."""
    num_cut: list[int]
    """Examples or passages left out, because they did not fit the context."""
    scores: dict[str, Tensor] = field(default_factory=dict)
    """fp64 [B] by the quality's name."""
    figures: dict[str, float] = field(default_factory=dict)
    """What was measured while the model was in memory, as metrics."""

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
    asking: PromptBuilder,
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    on_answer: Callable[[], None],
) -> Answers:
    """One answer a question, each alone and timed, as a user waits for it.

    The first question is asked once before the clock runs, since a first call sets up caches and threads.

    Raises:
        ConfigError: a question does not fit the context.
    """
    generator = torch.Generator().manual_seed(seed)
    room = ContextBudget(policy.tokenizer, policy.context_length, max_new_tokens)

    def answer(question: Question) -> tuple[list[Message], int, Rollout, str]:
        room.check(question, asking.prompt(question, ()))  # a tuned model may have less than the base model
        build = partial(asking.prompt, question)
        asked, num_cut = fitted(build, asking.find(question.text), room.length, room.beside_answer(question))
        rollout, texts = policy.sample(
            [asked], max_new_tokens=max_new_tokens, temperature=temperature, generator=generator, batch_rows=1
        )
        return asked, num_cut, rollout, texts[0]

    found, seconds = [], []
    with policy.ready():
        answer(questions[0])
        generator.manual_seed(seed)
        for question in questions:
            policy.hand_over()  # vLLM lets go of the weights after each call, which a server would not
            start = time.perf_counter()
            found.append(answer(question))
            seconds.append(time.perf_counter() - start)
            on_answer()
    asked, num_cut, rollouts, texts = zip(*found, strict=True)
    seconds_B = torch.tensor(seconds, dtype=torch.float64)
    return Answers(list(asked), Rollout.concatenate(list(rollouts)), list(texts), seconds_B, list(num_cut))
