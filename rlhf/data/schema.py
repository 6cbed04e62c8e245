"""The rows that stages read, what they ask, and what makes a row bad."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any, ClassVar, Literal, NotRequired, TypedDict, TypeVar

_OPEN, _CLOSE = "[\"'\u2018-\u201e\u2039«¿¡「『]", "[!.,?;:\"'\u2019\u201d\u203a»、。」』؟،؛।…]"
SENTENCE_MARKS = re.compile(
    rf"(?<!\S){_OPEN}+(?=\w)|(?<=\S)(?:(?<!\d)|(?!!)|(?=!*\s*$)){_CLOSE}+(?=\s|$)|\s+[!.?؟।]+\s*$"
)
"""Marks before and behind words, that do not change what is asked. Inside of code or a number they do, and
alone between blanks; 5! is not 5 where more follows."""
FRAME = re.compile(
    r"^(?:(?:[-*•#>]+|\d+[.)])\s+(?=[^\W\d])|(?:q|question)\s*[:.]\s+)+|^\*\*(?=.*\*\*$)|\*\*$"
)
"""That a text is a point of a list, a question, or bold as a whole."""
POLITE = re.compile(
    r"^(?:please |kindly |bitte )+|(?: please| bitte| thanks| thank you| thanks in advance| \(please\))+$"
)
LONG_WORDS = 30
"""A text with fewer words is a near duplicate of one with the same words alone."""
SHORTEST_COPY = 40
"""Characters of an answer that is taken for a copy; "yes" stands in many prompts."""
Split = Literal["train", "held_out", "evaluation"]
Item = TypeVar("Item")


class Message(TypedDict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    tool_calls: NotRequired[list[dict[str, Any]]]
    """The assistant's calls, each {"type": "function", "function": {"name": ..., "arguments": {...}}}."""
    tool_call_id: NotRequired[str]
    """The call that a tool answers."""
    name: NotRequired[str]
    """The tool that answers."""
    tools: NotRequired[list[dict[str, Any]]]
    """Only of a conversation's first message: the tools that the assistant may call, as JSON schemas."""


Answer = str | Message
"""Of the assistant: text; or a whole message, where it calls tools."""


def without(message: Message, name: Literal["tools", "tool_calls"]) -> Message:
    """A copy that lacks this."""
    copy = message.copy()
    copy.pop(name, None)
    return copy


def message_with(message: Message, content: str) -> Message:
    """A copy that says something else."""
    copy = message.copy()
    copy["content"] = content
    return copy


def calls_tools(messages: Sequence[Message]) -> bool:
    """Whether tools are offered, called, or answer."""
    return any({"tools", "tool_calls"} & each.keys() or each["role"] == "tool" for each in messages)


class Row(ABC):
    """One example of a data set. A subclass is a frozen dataclass whose fields are plain JSON values."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @abstractmethod
    def exchanges(self) -> Sequence[tuple[list[Message], Answer | None]]:
        """The conversations that are made from it, each with its answer; None where one is to be sampled."""

    def asked(self) -> str:
        """What it asks, as text; of plain text, the text itself."""
        prompt, answer = self.exchanges()[0]
        if prompt:
            return "\n".join(message["content"] for message in prompt)
        return text_of(answer or "")


@dataclass(frozen=True)
class SftRow(Row):
    """A conversation and the answer to learn; plain text has an empty conversation."""

    prompt: list[Message]
    completion: Answer
    turns: int = 1
    """How many of the assistant's turns are answers to learn: the completion, and the last ones before it."""

    @property
    def uses_tools(self) -> bool:
        """Whether tools are offered, called, or answer."""
        return calls_tools(self.prompt) or not isinstance(self.completion, str)

    @property
    def conversation(self) -> list[Message]:
        """Prompt and completion."""
        if isinstance(self.completion, str):
            return [*self.prompt, {"role": "assistant", "content": self.completion}]
        return [*self.prompt, self.completion]

    def exchanges(self) -> Sequence[tuple[list[Message], Answer | None]]:
        """The whole conversation."""
        return [(self.prompt, self.completion)]


@dataclass(frozen=True)
class PairRow(Row):
    """Two answers to one conversation, the better one first."""

    prompt: list[Message]
    chosen: str
    rejected: str
    chosen_gold: float | None = None
    """What the true reward says of the answer, where it is known; never trained on."""
    rejected_gold: float | None = None

    def exchanges(self) -> list[tuple[list[Message], str | None]]:
        """Both sides."""
        return [(self.prompt, self.chosen), (self.prompt, self.rejected)]


@dataclass(frozen=True)
class ThumbRow(Row):
    """An answer to a conversation, and whether somebody liked it."""

    prompt: list[Message]
    completion: str
    thumb: bool
    """True is up."""

    def exchanges(self) -> list[tuple[list[Message], str | None]]:
        """The whole conversation."""
        return [(self.prompt, self.completion)]


@dataclass(frozen=True)
class PromptRow(Row):
    """A conversation that waits for an answer, with what else its file says of it."""

    prompt: list[Message]
    columns: dict[str, Any] = field(default_factory=dict, kw_only=True)
    """The other columns of its file, such as `answer`, without those that are null. Rewards read them."""
    is_text: bool = field(default=False, kw_only=True)
    """Whether the file gives the prompt as text, not as messages. Functions in TRL's form then get texts."""

    def exchanges(self) -> list[tuple[list[Message], str | None]]:
        """The prompt."""
        return [(self.prompt, None)]


@dataclass(frozen=True)
class TextRow(Row):
    """A text whose perplexity shows what the model still knows."""

    text: str
    source: str = ""
    """Name of the set that it is from."""

    def exchanges(self) -> list[tuple[list[Message], str | None]]:
        """The text, behind no prompt."""
        return [([], self.text)]


@dataclass(frozen=True)
class QuestionRow(Row):
    """A multiple-choice question; `answer` is the index of the right choice."""

    question: str
    choices: list[str]
    answer: int

    def exchanges(self) -> list[tuple[list[Message], str | None]]:
        """Question and choices, as plain text."""
        return [([], "\n".join([self.question, *self.choices]))]

    def asked(self) -> str:
        """The question without its choices."""
        return self.question


def text_of(answer: Answer) -> str:
    """What it says, without its calls."""
    return answer if isinstance(answer, str) else answer["content"]


def answer_of(message: Message) -> Answer:
    """The assistant's turn as an answer."""
    return message if "tool_calls" in message else message["content"]


class RowError(ValueError):
    """A row that cannot be used. `reason` is short and countable, the text is for the user."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[RowError], tuple[str, str]]:
        return RowError, (self.reason, str(self))  # another process may have found it


def row_to_json(row: Row) -> str:
    """As it stands in a prepared file."""
    return json.dumps(vars(row), ensure_ascii=False, default=_as_json)


def _as_json(value: Any) -> Any:
    """A value that Parquet or the Hub knows and JSON does not: a date, a time or a decimal number as text;
    others, such as images, as null."""
    return str(value) if isinstance(value, date | time | timedelta | Decimal) else None


def row_from_json(text: str, row_types: Sequence[type[Row]]) -> Row:
    """The row that `row_to_json` wrote: of the type that has its fields."""
    values = json.loads(text)
    (found,) = (each for each in row_types if each.__dataclass_fields__.keys() == values.keys())
    return found(**values)


def each_turn(row: SftRow) -> Iterator[SftRow]:
    """Each answer that a conversation teaches, behind the turns before it."""
    answers = [index for index, message in enumerate(row.prompt) if message["role"] == "assistant"]
    for index in answers[len(answers) - row.turns + 1 :]:
        yield SftRow(row.prompt[:index], answer_of(row.prompt[index]))
    yield replace(row, turns=1)


def prompt_identity(row: Row) -> str:
    """sha256 of what the row asks: equal for prompts that differ only in case, spacing or Unicode form.

    Roles share it, so that a prompt is recognised wherever it turns up.
    """
    plain = " ".join(unicodedata.normalize("NFKC", row.asked()).casefold().split())
    return hashlib.sha256(plain.encode()).hexdigest()


def plain_words(text: str) -> str:
    """In small letters, without marks of sentences and politeness: two prompts that are then equal ask the
    same. Numbers, operators and brackets stay."""
    folded = unicodedata.normalize("NFKC", text).casefold().strip()
    words = SENTENCE_MARKS.sub("", FRAME.sub("", folded)).split()
    return POLITE.sub("", " ".join(words)) or folded


def number_of(*texts: str) -> int:
    """63 bits of their hash; never 0."""
    digest = hashlib.sha256("\0".join(texts).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1 or 1


def judgement(row: Row) -> int:
    """A number of prompt and answers: of the contrary judgement its negative, 0 where nothing is judged."""
    if not isinstance(row, PairRow | ThumbRow):
        return 0
    answers = [" ".join(text_of(answer or "").split()) for _, answer in row.exchanges()]
    is_positive = row.thumb if isinstance(row, ThumbRow) else answers[0] < answers[1]
    return number_of(plain_words(row.asked()), *sorted(answers)) * (1 if is_positive else -1)


def copied_answer(row: Row) -> str | None:
    """An answer that stands in its own prompt. To repeat what a tool or the assistant said before, or a whole
    message of the user, is no sign that the prompt holds its answer."""
    for prompt, answer in row.exchanges():
        said = text_of(answer or "").strip()
        if len(said) >= SHORTEST_COPY and any(
            said in each["content"] and said != each["content"].strip()
            for each in prompt
            if each["role"] not in ("tool", "assistant")
        ):
            return said
    return None


def hash_fraction(identity: str, purpose: Literal["evaluation", "held_out", "limit", "judge"]) -> float:
    """A prompt's number in [0, 1), from the hash of purpose and identity."""
    digest = hashlib.sha256(f"{purpose}:{identity}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def drawn(identity: str, fraction: float, purpose: Literal["evaluation", "held_out", "judge"]) -> bool:
    """Whether a prompt belongs to the `fraction` set aside for this purpose.

    The hash of purpose and identity, read as a number in [0, 1), decides. So the draw depends neither on the
    prompt's role nor on the rows around it, and the draws are independent: held-out rows are as large a
    share of what the evaluation left as they would be of everything.
    """
    return hash_fraction(identity, purpose) < fraction


def limited(
    items: Sequence[Item],
    limit: int | None,
    identity: Callable[[Item], str],
    kind: Callable[[Item], str] = lambda item: "",
) -> list[Item]:
    """At most `limit` items in their order, drawn by their prompts' hash, one of each kind at least.

    Args:
        identity: an item's `prompt_identity`.
        kind: such as the split that it belongs to.
    """
    if limit is None or len(items) <= limit:
        return list(items)
    order = sorted(range(len(items)), key=lambda index: hash_fraction(identity(items[index]), "limit"))
    firsts: dict[str, int] = {}
    for index in order:
        firsts.setdefault(kind(items[index]), index)
    chosen = set(list(dict.fromkeys([*firsts.values(), *order]))[:limit])
    return [item for index, item in enumerate(items) if index in chosen]
