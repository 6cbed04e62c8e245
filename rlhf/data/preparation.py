"""From sources to prepared rows: each role is read, checked, measured and split; what went is counted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table

from rlhf.config import ConfigError
from rlhf.data.chat_template import prompt_ids, sequences
from rlhf.data.formats import likely_fields, read_as
from rlhf.data.prepared import REPORT, PreparedData
from rlhf.data.roles import ROLES, training_roles
from rlhf.data.schema import (
    PromptRow,
    Row,
    RowError,
    SftRow,
    Split,
    TextRow,
    drawn,
    each_turn,
    limited,
    prompt_identity,
    row_to_json,
)
from rlhf.data.sources import SourceConfig, Sources, lender, own_sources
from rlhf.distributed.batching import equal_tokens
from rlhf.tracking.progress import Progress
from rlhf.tracking.redaction import redacted_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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

    role: str
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
        return ROLES[self.role].key

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


def quantiles(lengths: Iterable[int]) -> dict[str, int]:
    """The lengths at 5, 50, 95 and 100 percent of the rows."""
    ordered = sorted(lengths) or [0]
    return {name: ordered[round(share * (len(ordered) - 1))] for name, share in QUANTILES.items()}


def fields_line(source: SourceConfig, data: RoleData, raw: Mapping[str, Any]) -> str:
    """`sft.data='{path: FILE, fields: {prompt: question, ...}}'`, ready to be corrected and typed."""
    place = {"path": source.path} if source.path is not None else {"hub": source.hub}
    kind, name = next(iter(place.items()))
    return f"{data.key}='{{{kind}: {name}, fields: {likely_fields(raw, ROLES[data.role].columns)}}}'"


@dataclass
class Preparation:
    """What `prepare` does to the rows of every role, and what it found."""

    sources: Sources
    held_out_fraction: float
    evaluation_fraction: float
    on_bad_row: Literal["error", "drop"]
    response_tokens: int
    tokenizer: PreTrainedTokenizerBase
    """The base model's: its chat template decides what a row's tokens are."""
    context: int
    """Of the base model, tokens."""
    data: dict[str, RoleData] = field(default_factory=dict)
    """Role -> its rows, in the order of the table of roles."""

    def prepare(self, progress: Progress) -> None:
        """Read and check every role, set the evaluation prompts aside, split the rest.

        Raises:
            ConfigError: a source or a row cannot be used, or no row is left for a split.
        """
        for role in ROLES:
            self._read(role)
        self.data = {role: self.data[role] for role in ROLES}
        self._measure(progress)
        self._choose_evaluation()
        self._split()
        self._check_not_empty()

    def write(self, directory: Path) -> None:
        """The rows of each split, and report.json."""
        prepared = PreparedData(directory)
        report = {}
        for role in self.data.values():
            for split, entries in role.splits.items():
                prepared.write(role.role, split, (entry.row for entry in entries))
            if not self.sources[role.role]:
                continue
            source, digest = ", ".join(self._names(role.role)), prepared.digest(role.role)
            report[role.role] = {"source": source, "digest": digest, **role.report()}
        text = json.dumps(report, indent=2, ensure_ascii=False)
        (directory / REPORT).write_text(redacted_text(text), encoding="utf-8")

    def metrics(self) -> dict[str, int]:
        """How many rows there are, and how many were left out."""
        counts = {
            name: sum(isinstance(entry.row, row_type) for entry in self.data[role].entries)
            for role, entry_of_role in ROLES.items()
            if entry_of_role.metrics
            for name, row_type in zip(entry_of_role.metrics, entry_of_role.row_types, strict=True)
        }
        dropped = sum(role.num_dropped for role in self.data.values())
        return counts | {"dropped": dropped, "leaks": self.num_leaks}

    @property
    def num_leaks(self) -> int:
        """Training rows that ask what an evaluation set asks that was meant to be apart."""
        return sum(self.data[role].count(LEAK) for role in training_roles())

    def show(self, console: Console) -> None:
        """What was read, kept and left out, and why."""
        table = Table("data", "source", box=None, pad_edge=False, header_style="dim")
        for heading in ("read", "train", "held out", "evaluation", "dropped", "tokens p50", "p95", "max"):
            table.add_column(heading, justify="right")
        for role in self.data.values():
            if self.sources[role.role]:
                table.add_row(*self._table_cells(role))
        console.print(table, highlight=False)
        for role in self.data.values():
            for name, columns in role.columns.items():
                text = f"  {role.key}: {Path(name).name} {columns}"
                console.print(text, style="dim", markup=False, highlight=False)
            cut = [f"{role.cut.count} to be cut ({role.cut.places()})"] if role.cut.count else []
            if role.num_dropped or cut:
                text = f"  {role.key}: {'; '.join([*role.why(), *cut])}"
                console.print(text, style="yellow", markup=False, highlight=False)
        if any(role.count(TOO_LONG) + role.cut.count for role in self.data.values()):
            console.print(f"  {self._too_long()}", style="yellow", highlight=False)
        if self.num_leaks:
            places = "; ".join(
                f"{role.count(LEAK)} in {role.key} ({role.removed[LEAK].places()})"
                for role in self.data.values()
                if LEAK in role.removed
            )
            evaluated = " or ".join(each.key for each in ROLES.values() if "train" not in each.splits)
            text = (
                f"LEAK: {self.num_leaks} training rows ask what {evaluated} asks; "
                f"they are left out: {places}."
            )
            console.print(text, style="bold red", markup=False, highlight=False)

    def _read(self, role: str) -> None:
        """Read a role, after the one whose prompts it takes."""
        if role in self.data:
            return
        other = lender(self.sources, role)
        if other is not None:
            self._read(other)
        data = self.data[role] = RoleData(role)
        if other is not None:
            self._take_prompts(data, self.data[other])
        seen: set[str] = set()
        for source in own_sources(self.sources, role):
            self._read_source(source, data, seen)

    def _take_prompts(self, data: RoleData, rows: RoleData) -> None:
        """The prompts of another role's rows, each once."""
        seen: set[str] = set()
        for entry in rows.entries:
            data.num_read += 1
            prompt, _ = entry.row.exchanges()[0]
            if not prompt:
                data.remove(NO_PROMPT, entry.where)
            elif entry.identity in seen:
                data.remove(SAME_PROMPT, entry.where)
            else:
                seen.add(entry.identity)
                data.entries.append(replace(entry, row=PromptRow(prompt)))

    def _read_source(self, source: SourceConfig, data: RoleData, seen: set[str]) -> None:
        fingerprint, found, role = source.fingerprint(data.key), list[Entry](), ROLES[data.role]
        for where, raw in source.rows(data.key):
            data.num_read += 1
            try:
                if isinstance(raw, RowError):
                    raise raw
                row = role.parse(raw)
            except RowError as error:
                advice, lacks = "", error.reason in ("missing field", "no answer")
                if lacks and isinstance(raw, dict) and not source.fields:
                    advice = f" Are they in other columns? {fields_line(source, data, raw)}."
                self._bad(data, where, error, advice)
                continue
            if not data.columns.get(str(source)) and source.samples is None:
                columns = dict.fromkeys(source.fields.get(column, column) for column in raw)
                data.columns[str(source)] = (
                    f"has {', '.join(columns)}; read as {read_as(raw, role.columns, source.fields)}"
                )
            text = row_to_json(row)
            if text in seen:
                data.remove(DUPLICATE, where)
                continue
            seen.add(text)
            if isinstance(row, TextRow):
                row = replace(row, source=source.name)
            found.append(Entry(where, row, prompt_identity(row), fingerprint))
        kept = limited(found, source.limit, lambda entry: entry.identity, self._kind)
        left = set(map(id, kept))
        for entry in found:
            if id(entry) not in left:
                data.remove(BEYOND_LIMIT, entry.where)
        data.entries += kept

    def _kind(self, entry: Entry) -> Split:
        """The split that a row would be in if evaluation read its source too."""
        is_evaluated = drawn(entry.identity, self.evaluation_fraction, "evaluation")
        return "evaluation" if is_evaluated else self._training_split(entry)

    def _training_split(self, entry: Entry) -> Split:
        return "held_out" if drawn(entry.identity, self.held_out_fraction, "held_out") else "train"

    def _bad(self, data: RoleData, where: str, error: RowError, advice: str = "") -> None:
        is_own = lender(self.sources, data.role) is None  # the user never said that others' rows are prompts
        if self.on_bad_row == "error" and is_own:
            raise ConfigError(
                f"{data.key}: {where}: {str(error).removesuffix('.')}.{advice} "
                "Fix the row, or set prepare.on_bad_row=drop to leave out such rows."
            )
        data.remove(error.reason, where)

    def _measure(self, progress: Progress) -> None:
        """Count tokens. A row that does not fit the context is left out and counted. Where its answer can be
        cut it stays, and training cuts it, as `sft.max_tokens` says."""
        if self.response_tokens >= self.context:
            raise ConfigError(
                f"ppo.max_new_tokens={self.response_tokens} leaves no room for a prompt "
                f"in the model's context of {self.context} tokens. Lower it."
            )
        total = sum(len(role.entries) for role in self.data.values())
        with progress.task("counting tokens", total) as task:
            for role in self.data.values():
                kept: list[Entry] = []
                before: list[int] = []
                for entry in role.entries:
                    task.advance()
                    try:
                        found = self._sequences(entry.row)
                    except RowError as error:
                        self._bad(role, entry.where, error)
                        continue
                    entry.tokens = max(map(len, found))
                    if entry.tokens > self._room(entry.row):
                        if not self._can_be_cut(entry.row):
                            role.remove(TOO_LONG, entry.where)
                            continue
                        role.cut.add(entry.where)
                    entry.shared_prefix = fmean(equal_tokens(*pair) for pair in pairwise([before, *found]))
                    before = found[-1]
                    kept.append(entry)
                role.entries = kept

    def _sequences(self, row: Row) -> list[list[int]]:
        from jinja2 import TemplateError

        try:
            return sequences(self.tokenizer, row)
        except TemplateError as error:  # some refuse a system turn, or two turns of one speaker
            raise RowError(
                "refused by template", f"the chat template refuses the conversation: {error}."
            ) from None

    def _room(self, row: Row) -> int:
        """Tokens that a row may have: a prompt leaves some for its answer."""
        waits = any(answer is None for _, answer in row.exchanges())
        return self.context - (self.response_tokens if waits else 0)

    def _can_be_cut(self, row: Row) -> bool:
        """Whether the context has room for a part of the answer."""
        return isinstance(row, SftRow) and len(prompt_ids(self.tokenizer, row.prompt)) < self.context

    def _too_long(self) -> str:
        """What is too long, and what becomes of it."""
        return (
            f"Too long is what has more tokens than the model's context of {self.context}, a prompt more "
            f"than {self.context - self.response_tokens} beside an answer of "
            f"ppo.max_new_tokens={self.response_tokens}. "
            "Answers of sft.data are cut there, as at sft.max_tokens; other rows are left out."
        )

    def _choose_evaluation(self) -> None:
        """Take the evaluation prompts and the retention rows, and leave them out of every training role.

        From a source that a training role reads too, a share is drawn. Other sources were meant to be apart
        from training, and a row in both is a leak.
        """
        names = training_roles()
        training = [self.data[role] for role in names]
        trained = {entry.fingerprint for role in training for entry in role.entries}
        shared: set[str] = set()
        apart: set[str] = set()
        for role in self.data.values():
            if role.role in names:
                continue
            role.keep(
                lambda entry: (
                    entry.fingerprint not in trained
                    or drawn(entry.identity, self.evaluation_fraction, "evaluation")
                ),
                LEFT_FOR_TRAINING,
            )
            for entry in role.entries:
                (shared if entry.fingerprint in trained else apart).add(entry.identity)
        for role in training:
            role.keep(lambda entry: not entry.asks & shared, IN_EVALUATION)
            role.keep(lambda entry: not entry.asks & apart, LEAK)

    def _split(self) -> None:
        for role in self.data.values():
            splits = ROLES[role.role].splits
            role.splits = {split: [] for split in splits}
            for entry in role.entries:
                role.splits[self._training_split(entry) if "train" in splits else "evaluation"].append(entry)

    def _check_not_empty(self) -> None:
        for role in self.data.values():
            for split, entries in role.splits.items():
                if not entries and own_sources(self.sources, role.role):
                    raise ConfigError(
                        f"{role.key}: no rows are left for {split}: "
                        f"{'; '.join([f'{role.num_read} read', f'{len(role.entries)} kept', *role.why()])}. "
                        f"{self._more(role, split)}"
                        f"{f' {self._too_long()}' if role.count(TOO_LONG) else ''}"
                    )

    def _more(self, role: RoleData, split: Split) -> str:
        """What gives a split its first row."""
        if split == "held_out" and len({entry.identity for entry in role.entries}) == 1:
            return "Rows with the same prompt stay together: give rows with other prompts."
        if split == "train" or role.num_read == 1:  # no other share of one row helps
            return "Give more rows."
        share = self.held_out_fraction if split == "held_out" else self.evaluation_fraction
        return f"Give more rows or raise prepare.{split}_fraction={share:g}."

    def _names(self, role: str) -> list[str]:
        """A role's sources, as the user wrote them."""
        other = lender(self.sources, role)
        return [ROLES[other].key] if other else [*map(str, own_sources(self.sources, role))]

    def _table_cells(self, role: RoleData) -> Iterator[str]:
        yield role.key
        yield ", ".join(source.rsplit("/", 1)[-1] for source in self._names(role.role))
        yield str(role.num_read)
        for split in ("train", "held_out", "evaluation"):
            yield str(len(role.splits[split])) if split in role.splits else "-"
        yield str(role.num_dropped)
        lengths = quantiles(entry.tokens for entry in role.entries)
        for name in ("p50", "p95", "max"):
            yield str(lengths[name])
