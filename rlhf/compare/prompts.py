"""Prompts: the question alone, after worked examples, or after retrieved passages."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, PositiveInt

from rlhf.config import Strict
from rlhf.data.schema import Message, PromptRow, SftRow, text_of

RetrieverName = Literal["bm25", "embeddings"]


def _with_placeholders(*names: str) -> AfterValidator:
    def check(template: str) -> str:
        missing = [name for name in names if f"{{{name}}}" not in template]
        if missing:
            raise ValueError(f"the template must hold {{{missing[0]}}}")
        return template

    return AfterValidator(check)


class FewShotConfig(Strict):
    """`few_shot.*`: rows of sft.data as earlier turns of the conversation."""

    examples: PositiveInt
    """Number of examples before each question."""
    choice: Literal["nearest", "random"]
    """nearest: the retriever finds them for each question; if it finds too few, the seed draws the rest.
    random: the seed draws the same ones for all questions."""
    template: Annotated[str, _with_placeholders("question")]
    """The text of each user turn, in the examples and in the question."""


class RetrievalConfig(Strict):
    """`retrieval.*`: passages before the question."""

    passages: PositiveInt
    """Number of passages before the question."""
    passage_template: Annotated[str, _with_placeholders("passage")]
    """The text of one passage. The passages are joined, the best first."""
    template: Annotated[str, _with_placeholders("passages", "question")]
    """The text of the question's turn."""


@dataclass(frozen=True)
class Question:
    """A conversation that waits for an answer, and its reference answer, if there is one."""

    where: str
    """Place of the row, such as `questions.jsonl line 4`."""
    row: PromptRow
    """The conversation, and the other columns of its file, for a reward."""
    reference: str | None

    @property
    def prompt(self) -> list[Message]:
        """The conversation."""
        return self.row.prompt

    @property
    def text(self) -> str:
        """The last message of the user."""
        return self.prompt[-1]["content"]


def fill(template: str, **texts: str) -> str:
    """Fill in the template's placeholders. All other braces stay, also those in the texts."""
    names = "|".join(texts)
    return re.sub(rf"\{{({names})\}}", lambda match: texts[match[1]], template)


def few_shot_prompt(question: Question, examples: Sequence[SftRow], config: FewShotConfig) -> list[Message]:
    """The examples as turns, the best one last, next to the question. A system message stays first."""
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


def fit_prompt(
    prompt: Callable[[Sequence[Any]], list[Message]],
    items: Sequence[Any],
    length: Callable[[list[Message]], int],
    max_tokens: int,
) -> tuple[list[Message], int]:
    """The prompt with as many examples or passages as fit. The worst ones are left out, never cut.

    Args:
        prompt: examples or passages, the best first -> the conversation. Without items: the question alone.
        length: a conversation -> its tokens.
        max_tokens: most tokens of the conversation.

    Returns:
        The prompt, and the number of items left out.
    """
    count = len(items)
    while count > 0 and length(prompt(items[:count])) > max_tokens:
        count -= 1
    return prompt(items[:count]), len(items) - count
