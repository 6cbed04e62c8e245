"""The rows that stages read, the roles they play, and what makes a row bad."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypedDict, get_args

Role = Literal["sft", "replay", "reward", "ppo", "ptx", "evaluate", "retention"]
TrainingRole = Literal["sft", "replay", "reward", "ppo", "ptx"]
Split = Literal["train", "held_out", "evaluation"]

ROLES: tuple[Role, ...] = get_args(Role)
TRAINING_ROLES: tuple[TrainingRole, ...] = get_args(TrainingRole)
EVALUATION_ROLES: tuple[Role, ...] = ("evaluate", "retention")

USER_KEYS: dict[Role, str] = {
    "sft": "sft.data",
    "replay": "sft.replay",
    "reward": "reward.pairs",
    "ppo": "ppo.prompts",
    "ptx": "ppo.ptx.data",
    "evaluate": "evaluate.prompts",
    "retention": "evaluate.retention",
}
"""What the user calls each role's source; every complaint starts with it."""


ROLE_OF: dict[str, Role] = {key: role for role, key in USER_KEYS.items()}


class Message(TypedDict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class SftRow:
    """A conversation and the answer to learn; plain text has an empty conversation."""

    prompt: list[Message]
    completion: str
    turns: int = 1
    """How many of the assistant's turns are answers to learn: the completion, and the last ones before it."""


@dataclass(frozen=True)
class PairRow:
    """Two answers to one conversation, the better one first."""

    prompt: list[Message]
    chosen: str
    rejected: str
    chosen_gold: float | None = None
    """What the true reward says of the answer, where it is known; never trained on."""
    rejected_gold: float | None = None


@dataclass(frozen=True)
class PromptRow:
    """A conversation that waits for an answer."""

    prompt: list[Message]


@dataclass(frozen=True)
class TextRow:
    """A text whose perplexity shows what the model still knows."""

    text: str
    source: str = ""
    """Name of the set that it is from."""


@dataclass(frozen=True)
class QuestionRow:
    """A multiple-choice question; `answer` is the index of the right choice."""

    question: str
    choices: list[str]
    answer: int


Row = SftRow | PairRow | PromptRow | TextRow | QuestionRow

ROW_TYPES: dict[Role, tuple[type[Row], ...]] = {
    "sft": (SftRow,),
    "replay": (SftRow,),
    "reward": (PairRow,),
    "ppo": (PromptRow,),
    "ptx": (SftRow,),
    "evaluate": (PromptRow,),
    "retention": (TextRow, QuestionRow),
}


class RowError(ValueError):
    """A row that cannot be used. `reason` is short and countable, the text is for the user."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def row_to_json(row: Row) -> str:
    """One line of a prepared file."""
    return json.dumps(vars(row), ensure_ascii=False)


def row_from_json(line: str, role: Role) -> Row:
    """The row that `row_to_json` wrote."""
    values = json.loads(line)
    (kind,) = (kind for kind in ROW_TYPES[role] if kind.__dataclass_fields__.keys() == values.keys())
    return kind(**values)


def each_turn(row: SftRow) -> Iterator[SftRow]:
    """Each answer that a conversation teaches, behind the turns before it."""
    answers = [index for index, message in enumerate(row.prompt) if message["role"] == "assistant"]
    for index in answers[len(answers) - row.turns + 1 :]:
        yield SftRow(row.prompt[:index], row.prompt[index]["content"])
    yield replace(row, turns=1)


def prompt_of(row: Row) -> list[Message]:
    """The conversation that a row answers; none of a plain text or a question."""
    return row.prompt if isinstance(row, SftRow | PairRow | PromptRow) else []


def prompt_identity(row: Row) -> str:
    """sha256 of what the row asks: equal for prompts that differ only in case, spacing or Unicode form.

    It is the text of all messages; of plain text, the text itself. Roles share it, so that a prompt is
    recognised wherever it turns up.
    """
    match row:
        case SftRow(prompt=[], completion=text) | TextRow(text=text) | QuestionRow(question=text):
            pass
        case SftRow(prompt=prompt) | PairRow(prompt=prompt) | PromptRow(prompt=prompt):
            text = "\n".join(message["content"] for message in prompt)
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return hashlib.sha256(plain.encode()).hexdigest()


def hash_fraction(identity: str, purpose: Literal["evaluation", "held_out", "limit"]) -> float:
    """A prompt's number in [0, 1), from the hash of purpose and identity."""
    digest = hashlib.sha256(f"{purpose}:{identity}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def drawn(identity: str, fraction: float, purpose: Literal["evaluation", "held_out"]) -> bool:
    """Whether a prompt belongs to the `fraction` set aside for this purpose.

    The hash of purpose and identity, read as a number in [0, 1), decides. So a prompt's lot depends neither
    on its role nor on the rows around it, and the two draws are independent: held-out rows are as large a
    share of what the evaluation left as they would be of everything.
    """
    return hash_fraction(identity, purpose) < fraction
