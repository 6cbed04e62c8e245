"""The rows that stages read: their types, their prompts, and the errors of bad rows."""

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
"""Punctuation before and after words that does not change the meaning. Marks inside code or a number, and
marks alone between spaces, do change it; 5! is not 5 if more text follows."""
FRAME_MARKS = re.compile(
    r"^(?:(?:[-*•#>]+|\d+[.)])\s+(?=[^\W\d])|(?:q|question)\s*[:.]\s+)+|^\*\*(?=.*\*\*$)|\*\*$"
)
"""Marks of a list item, a question, or a fully bold text."""
POLITE_WORDS = re.compile(
    r"^(?:please |kindly |bitte )+|(?: please| bitte| thanks| thank you| thanks in advance| \(please\))+$"
)
MIN_LONG_WORDS = 30
"""Fewest words of a long text. A shorter text is a near duplicate only of a text with the same words."""
MIN_COPY_CHARACTERS = 40
"""Fewest characters of an answer that can count as a copy: many prompts contain "yes"."""
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
    """Only in the first message of a conversation: the tools that the assistant may call, as JSON schemas."""


Answer = str | Message
"""An answer of the assistant: text, or a full message if it calls tools."""


def message_without(message: Message, name: Literal["tools", "tool_calls"]) -> Message:
    """A copy of the message without this key."""
    copy = message.copy()
    copy.pop(name, None)
    return copy


def message_with(message: Message, content: str) -> Message:
    """A copy of the message with other content."""
    copy = message.copy()
    copy["content"] = content
    return copy


def calls_tools(messages: Sequence[Message]) -> bool:
    """Whether the messages offer tools, call them, or contain their answers."""
    return any({"tools", "tool_calls"} & each.keys() or each["role"] == "tool" for each in messages)


class Row(ABC):
    """One example of a data set. A subclass is a frozen dataclass whose fields are plain JSON values."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @abstractmethod
    def exchanges(self) -> Sequence[tuple[list[Message], Answer | None]]:
        """The conversations made from the row, each with its answer, or None if the answer is to be
        sampled."""

    def asked(self) -> str:
        """The prompt as text. For plain text, the text itself."""
        prompt, answer = self.exchanges()[0]
        if prompt:
            return "\n".join(message["content"] for message in prompt)
        return text_of(answer or "")


@dataclass(frozen=True)
class SftRow(Row):
    """A conversation and the answer to learn. Plain text has an empty conversation."""

    prompt: list[Message]
    completion: Answer
    turns: int = 1
    """Number of assistant turns to learn: the completion, and the last ones before it."""

    @property
    def uses_tools(self) -> bool:
        """Whether the conversation offers tools, calls them, or contains their answers."""
        return calls_tools(self.prompt) or not isinstance(self.completion, str)

    @property
    def conversation(self) -> list[Message]:
        """Prompt and completion."""
        if isinstance(self.completion, str):
            return [*self.prompt, {"role": "assistant", "content": self.completion}]
        return [*self.prompt, self.completion]

    def exchanges(self) -> Sequence[tuple[list[Message], Answer | None]]:
        """The full conversation."""
        return [(self.prompt, self.completion)]


@dataclass(frozen=True)
class PairRow(Row):
    """Two answers to one conversation, the better one first."""

    prompt: list[Message]
    chosen: str
    rejected: str
    chosen_gold: float | None = None
    """The true reward of the answer, if it is known. It is never trained on."""
    rejected_gold: float | None = None

    def exchanges(self) -> list[tuple[list[Message], str | None]]:
        """Both sides."""
        return [(self.prompt, self.chosen), (self.prompt, self.rejected)]


@dataclass(frozen=True)
class ThumbRow(Row):
    """An answer to a conversation, with a thumb up or down."""

    prompt: list[Message]
    completion: str
    thumb: bool
    """True is up."""

    def exchanges(self) -> list[tuple[list[Message], str | None]]:
        """The full conversation."""
        return [(self.prompt, self.completion)]


@dataclass(frozen=True)
class PromptRow(Row):
    """A conversation without an answer, with the other columns of its file."""

    prompt: list[Message]
    columns: dict[str, Any] = field(default_factory=dict, kw_only=True)
    """The other columns of its file, such as `answer`, without null values. Rewards read them."""
    is_text: bool = field(default=False, kw_only=True)
    """Whether the file has the prompt as text, not as messages. Reward functions in TRL's form then get
    texts."""

    def exchanges(self) -> list[tuple[list[Message], str | None]]:
        """The prompt."""
        return [(self.prompt, None)]


@dataclass(frozen=True)
class TextRow(Row):
    """A text whose perplexity shows what the model still knows."""

    text: str
    source: str = ""
    """Name of its data set."""

    def exchanges(self) -> list[tuple[list[Message], str | None]]:
        """The text, without a prompt."""
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
    """The text of an answer, without its calls."""
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
        return RowError, (self.reason, str(self))  # so that it can be sent from another process


def row_to_json(row: Row) -> str:
    """The row as a prepared file has it."""
    return json.dumps(vars(row), ensure_ascii=False, default=_as_json)


def _as_json(value: Any) -> Any:
    """A JSON value for a type that only Parquet or the Hub has. Dates, times and decimal numbers become text;
    others, such as images, become null."""
    return str(value) if isinstance(value, date | time | timedelta | Decimal) else None


def row_from_json(text: str, row_types: Sequence[type[Row]]) -> Row:
    """The row that `row_to_json` wrote. Its type is the one with the same fields."""
    values = json.loads(text)
    (row_type,) = (each for each in row_types if each.__dataclass_fields__.keys() == values.keys())
    return row_type(**values)


def each_turn(row: SftRow) -> Iterator[SftRow]:
    """Per answer to learn in a conversation: a row of the answer and the turns before it."""
    answers = [index for index, message in enumerate(row.prompt) if message["role"] == "assistant"]
    for index in answers[len(answers) - row.turns + 1 :]:
        yield SftRow(row.prompt[:index], answer_of(row.prompt[index]))
    yield replace(row, turns=1)


def prompt_identity(row: Row) -> str:
    """sha256 of the prompt: equal for prompts that differ only in case, spacing or Unicode form.

    It does not depend on the role, so the same prompt is recognised in every data set.
    """
    return _identity(row.asked())


def _identity(text: str) -> str:
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return hashlib.sha256(plain.encode()).hexdigest()


def asked_identities(row: Row) -> set[str]:
    """The identity of every prompt that a row asks: its own, those of earlier answers to learn, and each
    message of the user, alone and after the system message."""
    turns = each_turn(row) if isinstance(row, SftRow) and row.turns > 1 else ()
    found = {prompt_identity(row), *map(prompt_identity, turns)}
    prompt = row.exchanges()[0][0]
    if len(prompt) > 1:
        own = [message["content"] for message in prompt if message["role"] == "user"]
        system = [message["content"] for message in prompt[:1] if message["role"] == "system"]
        found |= {_identity("\n".join([*before, text])) for text in own for before in ([], system)}
    return found


def plain_words(text: str) -> str:
    """The text in lower case, without punctuation and polite words. Two prompts with equal results ask the
    same. Numbers, operators and brackets stay."""
    folded = unicodedata.normalize("NFKC", text).casefold().strip()
    words = SENTENCE_MARKS.sub("", FRAME_MARKS.sub("", folded)).split()
    return POLITE_WORDS.sub("", " ".join(words)) or folded


def text_hash(*texts: str) -> int:
    """A 63-bit hash of the texts; never 0."""
    digest = hashlib.sha256("\0".join(texts).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1 or 1


def judgement(row: Row) -> int:
    """A hash of prompt, answers and judgement. The opposite judgement has the negative number; a row without
    a judgement has 0."""
    if not isinstance(row, PairRow | ThumbRow):
        return 0
    answers = [" ".join(text_of(answer or "").split()) for _, answer in row.exchanges()]
    is_positive = row.thumb if isinstance(row, ThumbRow) else answers[0] < answers[1]
    return text_hash(plain_words(row.asked()), *sorted(answers)) * (1 if is_positive else -1)


def copied_answer(row: Row) -> str | None:
    """An answer that its own prompt contains, or None. To repeat an earlier tool answer, an earlier answer,
    or a full message of the user is no fault, so these do not count."""
    for prompt, answer in row.exchanges():
        text = text_of(answer or "").strip()
        if len(text) >= MIN_COPY_CHARACTERS and any(
            text in each["content"] and text != each["content"].strip()
            for each in prompt
            if each["role"] not in ("tool", "assistant")
        ):
            return text
    return None


Purpose = Literal["evaluation", "held_out", "judge", "sealed"]
"""What a share of the prompts is set aside for."""


def hash_fraction(identity: str, purpose: Purpose | Literal["limit"]) -> float:
    """A number in [0, 1) from the hash of purpose and prompt identity."""
    digest = hashlib.sha256(f"{purpose}:{identity}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def drawn(identity: str, fraction: float, purpose: Purpose) -> bool:
    """Whether a prompt belongs to the `fraction` set aside for this purpose.

    `hash_fraction` decides. So the draw does not depend on the role or on other rows. Draws for different
    purposes are independent: the held-out share is the same with and without the evaluation prompts.
    """
    return hash_fraction(identity, purpose) < fraction


def draw_at_most(
    items: Sequence[Item],
    limit: int | None,
    identity: Callable[[Item], str],
    kind: Callable[[Item], str] = lambda item: "",
) -> list[Item]:
    """At most `limit` items in their order, drawn by the hash of their prompts. Each kind keeps one if it
    can.

    Args:
        identity: gives the `prompt_identity` of an item.
        kind: gives the kind of an item, such as its split.
    """
    if limit is None or len(items) <= limit:
        return list(items)
    order = sorted(range(len(items)), key=lambda index: hash_fraction(identity(items[index]), "limit"))
    firsts: dict[str, int] = {}
    for index in order:
        firsts.setdefault(kind(items[index]), index)
    drawn_indices = set(list(dict.fromkeys([*firsts.values(), *order]))[:limit])
    return [item for index, item in enumerate(items) if index in drawn_indices]
