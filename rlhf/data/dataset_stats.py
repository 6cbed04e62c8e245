"""A role's rows while they are checked, split and measured, with a tally of those that were not kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any, TypeVar

from rlhf.data.chat_template import exchange_ids, prompt_ids
from rlhf.data.schema import (
    USER_KEYS,
    PairRow,
    PromptRow,
    QuestionRow,
    Role,
    Row,
    SftRow,
    Split,
    TextRow,
    each_turn,
    hash_fraction,
    prompt_identity,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = TypeVar("Item")

DUPLICATE, IN_EVALUATION, LEFT_FOR_TRAINING = "duplicate", "in_evaluation", "left_for_training"
NO_PROMPT, SAME_PROMPT = "no prompt", "same prompt"
"""Of rows whose prompts another role takes."""
LEAK = "leak"
"""In an evaluation set that was meant to be apart."""
BEYOND_LIMIT, TOO_LONG = "beyond limit", "too long"
NOT_DROPPED = (IN_EVALUATION, LEFT_FOR_TRAINING, LEAK, BEYOND_LIMIT, NO_PROMPT, SAME_PROMPT)
"""Reasons of rows that are fine and only belong elsewhere."""
NUM_EXAMPLES = 3
QUANTILES = {"p5": 0.05, "p50": 0.5, "p95": 0.95, "max": 1.0}


@dataclass
class Entry:
    """A row, where it was found, what it asks (`prompt_identity`), and its source's fingerprint."""

    where: str
    row: Row
    identity: str
    fingerprint: str
    tokens: int = 0
    """Of the longest sequence made from it."""
    shared_prefix: float = 0.0
    """Tokens with which a sequence made from it begins like the one before."""

    @property
    def asks(self) -> set[str]:
        """`prompt_identity` of all that it teaches an answer to: of a conversation, each turn."""
        turns = each_turn(self.row) if isinstance(self.row, SftRow) else [self.row]
        return {prompt_identity(turn) for turn in turns}


@dataclass
class Removed:
    """How many rows went for one reason, and where the first of them stand."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, where: str) -> None:
        """Count one more."""
        self.count += 1
        if len(self.examples) < NUM_EXAMPLES:
            self.examples.append(where)

    def places(self) -> str:
        """Such as `train.jsonl line 4, train.jsonl line 9, ...`."""
        return ", ".join([*self.examples, *(["..."] if self.count > len(self.examples) else [])])


@dataclass
class RoleData:
    """One role's rows and what became of them."""

    role: Role
    num_read: int = 0
    entries: list[Entry] = field(default_factory=list)
    removed: dict[str, Removed] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    """Of each source that is the user's: what it has, and what is read."""
    cut: Removed = field(default_factory=Removed)
    """Rows that are kept, though their end is beyond the model's context: training cuts them."""
    splits: dict[Split, list[Entry]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What the user calls the role's source."""
        return USER_KEYS[self.role]

    def remove(self, reason: str, where: str) -> None:
        """Count a row that is not kept."""
        self.removed.setdefault(reason, Removed()).add(where)

    def keep(self, wanted: Callable[[Entry], bool], reason: str) -> None:
        """Remove the entries that are not wanted."""
        kept = []
        for entry in self.entries:
            if wanted(entry):
                kept.append(entry)
            else:
                self.remove(reason, entry.where)
        self.entries = kept

    def count(self, reason: str) -> int:
        """Rows removed for this reason."""
        return self.removed[reason].count if reason in self.removed else 0

    @property
    def num_dropped(self) -> int:
        """Rows that no role gets: duplicates and bad ones."""
        return sum(removed.count for reason, removed in self.removed.items() if reason not in NOT_DROPPED)

    def why(self) -> list[str]:
        """What was removed, such as `2 tie (train.jsonl line 4, train.jsonl line 9)`."""
        return [f"{removed.count} {reason} ({removed.places()})" for reason, removed in self.removed.items()]

    def report(self) -> dict[str, Any]:
        """The role's part of report.json."""
        lengths = [entry.tokens for entry in self.entries]
        shared_prefix = [entry.shared_prefix for entry in self.entries]
        return {
            "read": self.num_read,
            "kept": {split: len(entries) for split, entries in self.splits.items()},
            "longer_than_context": vars(self.cut),
            "removed": {reason: vars(removed) for reason, removed in self.removed.items()},
            "tokens": quantiles(lengths)
            | {
                "mean": fmean(lengths or [0]),
                "deviation": pstdev(lengths or [0]),
                "in_common": fmean(shared_prefix or [0.0]),
            },
        }


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


def sequences(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[list[int]]:
    """Token ids that are made from a row; of a pair, both sides."""
    match row:
        case SftRow(prompt=prompt, completion=completion):
            return [exchange_ids(tokenizer, prompt, completion)[0]]
        case PairRow(prompt=prompt, chosen=chosen, rejected=rejected):
            return [exchange_ids(tokenizer, prompt, answer)[0] for answer in (chosen, rejected)]
        case PromptRow(prompt=prompt):
            return [prompt_ids(tokenizer, prompt)]
        case TextRow(text=text):
            return [exchange_ids(tokenizer, [], text)[0]]
        case QuestionRow(question=question, choices=choices):
            return [exchange_ids(tokenizer, [], "\n".join([question, *choices]))[0]]


def quantiles(lengths: Iterable[int]) -> dict[str, int]:
    """The lengths at 5, 50, 95 and 100 percent of the rows."""
    ordered = sorted(lengths) or [0]
    return {name: ordered[round(share * (len(ordered) - 1))] for name, share in QUANTILES.items()}
