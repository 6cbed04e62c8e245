"""What a model is asked: the question alone, behind worked examples, or behind passages that were found."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, PositiveInt

from rlhf.config import Strict
from rlhf.data.schema import Message, SftRow, text_of

PromptMethod = Literal["zero_shot", "few_shot", "retrieval"]
RetrieverName = Literal["bm25", "embeddings"]


def _naming(*places: str) -> AfterValidator:
    def check(template: str) -> str:
        missing = [place for place in places if f"{{{place}}}" not in template]
        if missing:
            raise ValueError(f"the template must hold {{{missing[0]}}}")
        return template

    return AfterValidator(check)


class FewShotConfig(Strict):
    """`compare.few_shot.*`: rows of sft.data as earlier turns of the conversation."""

    examples: PositiveInt
    """Number of examples before each question."""
    choice: Literal["nearest", "random"]
    """nearest: found by compare.retriever for each question, and others by the seed where it finds too few;
    random: the same for all, by the seed."""
    template: Annotated[str, _naming("question")]
    """The text of the examples' turns and of the last one."""


class RetrievalConfig(Strict):
    """`compare.retrieval.*`: passages in front of the question."""

    passages: PositiveInt
    """Number of passages before the question."""
    passage_template: Annotated[str, _naming("passage")]
    """One passage; they follow each other, the best first."""
    template: Annotated[str, _naming("passages", "question")]
    """The text of the question's turn."""


@dataclass(frozen=True)
class Question:
    """A conversation that waits for an answer, and the answer that a person gave."""

    where: str
    """Such as `questions.jsonl line 4`."""
    prompt: list[Message]
    reference: str | None
    columns: dict[str, Any] = field(default_factory=dict)
    """The other columns of its file, for a reward."""

    @property
    def text(self) -> str:
        """The last thing that the user says."""
        return self.prompt[-1]["content"]


def fill(template: str, **texts: str) -> str:
    """Put texts where the template names them; braces in the texts, or any others, mean nothing."""
    names = "|".join(texts)
    return re.sub(rf"\{{({names})\}}", lambda match: texts[match[1]], template)


def few_shot_prompt(question: Question, examples: Sequence[SftRow], config: FewShotConfig) -> list[Message]:
    """The examples as turns, the best last: nearest to the question; a system message stays in front."""
    system = [message for message in question.prompt[:1] if message["role"] == "system"]
    turns: list[Message] = []
    for example in reversed(examples):
        asked = fill(config.template, question=example.prompt[-1]["content"])
        turns += [
            Message(role="user", content=asked),
            Message(role="assistant", content=text_of(example.completion)),
        ]
    last = Message(role="user", content=fill(config.template, question=question.text))
    return [*system, *turns, *question.prompt[len(system) : -1], last]


def retrieval_prompt(question: Question, passages: Sequence[str], config: RetrievalConfig) -> list[Message]:
    """The passages in the last message; without any, the question alone."""
    if not passages:
        return question.prompt
    shown = "".join(fill(config.passage_template, passage=passage) for passage in passages)
    content = fill(config.template, passages=shown, question=question.text)
    return [*question.prompt[:-1], Message(role="user", content=content)]


def fitted(
    prompt: Callable[[Sequence[Any]], list[Message]],
    items: Sequence[Any],
    length: Callable[[list[Message]], int],
    room: int,
) -> tuple[list[Message], int]:
    """The prompt with as many examples or passages as fit; the least good go first, whole.

    Args:
        prompt: examples or passages, the best first -> the conversation; with none it is the question alone.
        length: a conversation's tokens.
        room: tokens that it may have.

    Returns:
        The prompt, and how many were left out.
    """
    kept = len(items)
    while kept > 0 and length(prompt(items[:kept])) > room:
        kept -= 1
    return prompt(items[:kept]), len(items) - kept
