"""From sources to prepared rows: each role is read, checked, measured and split; what went is counted."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator
from collections.abc import Set as AbstractSet
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from heapq import nsmallest
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table

from rlhf.config import ConfigError
from rlhf.data.arrow import picked
from rlhf.data.chat_template import tokenizer_digest
from rlhf.data.formats import read_as
from rlhf.data.prepared import REPORT, UNLIKE, PreparedData, RowStore
from rlhf.data.roles import JUDGE, ROLES, training_roles
from rlhf.data.schema import PairRow, PromptRow, Row, Split, drawn, limited
from rlhf.data.sources import SourceConfig, Sources, lender, own_sources
from rlhf.data.tokens import Bad, Complaint, Examiner, TokenWriter
from rlhf.data.unlike import unlike
from rlhf.tracking.progress import Progress
from rlhf.tracking.redaction import redacted_text

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

DUPLICATE, IN_EVALUATION, LEFT_FOR_TRAINING = "duplicate", "in_evaluation", "left_for_training"
FOR_JUDGE = "for the judge"
NO_PROMPT, SAME_PROMPT = "no prompt", "same prompt"
"""Of rows whose prompts another role takes."""
LEAK = "leak"
"""In an evaluation set that was meant to be apart."""
BEYOND_LIMIT, TOO_LONG = "beyond limit", "too long"
NOT_DROPPED = (FOR_JUDGE, IN_EVALUATION, LEFT_FOR_TRAINING, LEAK, BEYOND_LIMIT, NO_PROMPT, SAME_PROMPT)
"""Reasons of rows that are fine and only belong elsewhere."""
NUM_EXAMPLES = 3
JUDGE_TESTS = 1000
"""Most pairs on which the judge is tested: its accuracy is then known to 0.03."""
QUANTILES = {"p5": 0.05, "p50": 0.5, "p95": 0.95, "max": 1.0}


class NoRowsError(ConfigError):
    """A source, or a split of it, has no rows."""


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

    def extend(self, other: Removed) -> None:
        """Count others too."""
        self.count += other.count
        self.examples = [*self.examples, *other.examples][:NUM_EXAMPLES]

    def places(self) -> str:
        """Such as `train.jsonl line 4, train.jsonl line 9, ...`."""
        return ", ".join([*self.examples, *(["..."] if self.count > len(self.examples) else [])])


@dataclass
class RoleData:
    """One role's rows and what became of them. A row is known by its number in the store."""

    role: str
    store: RowStore
    prompts_only: bool = False
    """Whether it takes the prompts of the store's rows, which another role reads."""
    num_read: int = 0
    rows: array[int] = field(default_factory=lambda: array("i"))
    """Those that are kept, in the order of their source."""
    shared_prefix: array[float] = field(default_factory=lambda: array("d"))
    """Of each row of the store: tokens with which its sequences begin like the ones before."""
    removed: dict[str, Removed] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    """Of each source that is the user's: what it has, and what is read."""
    cut: Removed = field(default_factory=Removed)
    """Rows that are kept, though their end is beyond the model's context: training cuts them."""
    splits: dict[Split, array[int]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What the user calls the role's source."""
        return ROLES[self.role].key

    def remove(self, reason: str, where: str) -> None:
        """Count a row that is not kept."""
        self.removed.setdefault(reason, Removed()).add(where)

    def remove_row(self, reason: str, number: int) -> None:
        """Count a row of the store that is not kept."""
        removed = self.removed.setdefault(reason, Removed())
        removed.add(self.store.where(number) if len(removed.examples) < NUM_EXAMPLES else "")

    def keep(self, wanted: Callable[[int], bool], reason: str) -> None:
        """Remove the rows that are not wanted."""
        kept = array("i")
        for number in self.rows:
            if wanted(number):
                kept.append(number)
            else:
                self.remove_row(reason, number)
        self.rows = kept

    def identity(self, number: int) -> str:
        """`prompt_identity` of a row."""
        return self.store.identity[number].hex()

    def asks_none_of(self, prompts: AbstractSet[bytes], number: int) -> bool:
        """Whether a row teaches no answer to these prompts; a conversation may teach several answers."""
        alone = (self.store.identity[number],)
        asks = alone if self.prompts_only else self.store.asks.get(number, alone)
        return prompts.isdisjoint(asks)

    def fingerprints(self) -> set[str]:
        """Of the sources of its rows."""
        return {self.store.fingerprint[number] for number in self.rows}

    def num_of(self, row_type: type[Row]) -> int:
        """How many of its rows are of this type."""
        if self.prompts_only:
            return len(self.rows) if row_type is PromptRow else 0
        types = ROLES[self.role].row_types
        return sum(issubclass(types[self.store.kind[number]], row_type) for number in self.rows)

    def num_exchanges(self, number: int) -> int:
        """How many of its sequences are of exchanges; the others are turns apart."""
        return 1 if self.prompts_only else self.store.num_exchanges[number]

    def tokens(self, number: int) -> int:
        """Of the longest sequence made from a row."""
        return (self.store.prompt_tokens if self.prompts_only else self.store.tokens)[number]

    def measure_shared_prefix(self) -> None:
        """Set `shared_prefix` of the rows that are kept."""
        import numpy

        self.shared_prefix = array("d", bytes(8 * len(self.store)))
        if not self.rows:
            return
        store, rows = self.store, numpy.array(self.rows, numpy.int64)
        counts = numpy.array([self.num_exchanges(number) for number in self.rows])
        places = ranges(numpy.array(store.sequences)[rows], counts)
        most = numpy.array(store.prompt_tokens)[rows] if self.prompts_only else store.ids.lengths[places]
        shared = numpy.add.reduceat(store.ids.shared_prefix(places, most), counts.cumsum() - counts)
        numpy.frombuffer(self.shared_prefix)[rows] = shared / counts

    def write(self, prepared: PreparedData) -> None:
        """The rows of each split, and their token ids."""
        import numpy

        store, sequences = self.store, numpy.array(self.store.sequences)
        texts = store.table.select(["prompt" if self.prompts_only else "row"])
        items = numpy.array(store.prompt_characters if self.prompts_only else store.characters)
        for split, numbers in self.splits.items():
            rows = numpy.array(numbers, numpy.int64)
            prepared.write_batches(self.role, split, picked(texts, rows, items[rows]))
            first, prompts = sequences[rows], None
            counts = sequences[rows + 1] - first
            if self.prompts_only:
                counts, prompts = numpy.ones_like(rows), numpy.array(store.prompt_tokens)[rows]
            row = numpy.repeat(numpy.arange(len(rows)), counts)
            tokens = TokenWriter(prepared.tokens_path(self.role, split), store.tokenizer)
            with tokens.file:
                tokens.copy(store.ids, ranges(first, counts), row, prompts)

    def count(self, reason: str) -> int:
        """Rows removed for this reason."""
        return self.removed[reason].count if reason in self.removed else 0

    @property
    def num_dropped(self) -> int:
        """Rows that no role gets: duplicates and bad ones."""
        return sum(removed.count for reason, removed in self.removed.items() if reason not in NOT_DROPPED)

    @property
    def bad_share(self) -> float:
        """Of the rows that were read, those that the role cannot use; a duplicate is none of them."""
        return (self.num_dropped - self.count(DUPLICATE)) / max(1, self.num_read)

    def why(self) -> list[str]:
        """What was removed, such as `2 tie (train.jsonl line 4, train.jsonl line 9)`."""
        return [f"{removed.count} {reason} ({removed.places()})" for reason, removed in self.removed.items()]

    def report(self) -> dict[str, Any]:
        """The role's part of report.json."""
        lengths = [self.tokens(number) for number in self.rows]
        shared_prefix = [self.shared_prefix[number] for number in self.rows]
        return {
            "read": self.num_read,
            "kept": {split: len(rows) for split, rows in self.splits.items()},
            "longer_than_context": vars(self.cut),
            "removed": {reason: vars(removed) for reason, removed in self.removed.items()},
            "tokens": quantiles(lengths)
            | {
                "mean": fmean(lengths or [0]),
                "deviation": pstdev(lengths or [0]),
                "in_common": fmean(shared_prefix or [0.0]),
            },
        }


def ranges(begins: NDArray[Any], counts: NDArray[Any]) -> NDArray[Any]:
    """The numbers from each begin on, so many as its count says, one range behind the other."""
    import numpy

    return numpy.repeat(begins - (counts.cumsum() - counts), counts) + numpy.arange(counts.sum())


def quantiles(lengths: Iterable[int]) -> dict[str, int]:
    """The lengths at 5, 50, 95 and 100 percent of the rows."""
    ordered = sorted(lengths) or [0]
    return {name: ordered[round(share * (len(ordered) - 1))] for name, share in QUANTILES.items()}


@dataclass
class Preparation:
    """What `prepare` does to the rows of every role, and what it found."""

    sources: Sources
    held_out_fraction: float
    evaluation_fraction: float
    judge_fraction: float
    on_bad_row: Literal["error", "drop"]
    response_tokens: int
    tokenizer: PreTrainedTokenizerBase
    """The base model's: its chat template decides what a row's tokens are."""
    context: int
    """Of the base model, tokens."""
    scratch: Path
    """A directory for what was read. It is needed until all is written."""
    digest: str = field(init=False)
    """`tokenizer_digest`."""
    data: dict[str, RoleData] = field(default_factory=dict)
    """Role -> its rows, in the order of the table of roles."""
    differences: list[str] = field(default_factory=list)
    """In what data sets are unlike others; known when they are written."""

    def __post_init__(self) -> None:
        self.digest = tokenizer_digest(self.tokenizer)

    def prepare(self, progress: Progress) -> None:
        """Read and check every role, set the evaluation prompts aside, split the rest.

        Raises:
            ConfigError: a source or a row cannot be used, or no row is left for a split.
        """
        for role in ROLES:
            self._read(role, progress)
        self.data = {role: self.data[role] for role in ROLES}
        self._measure()
        self._choose_evaluation()
        self._set_judge_apart()
        self._split()
        self._check_not_empty()

    def write(self, directory: Path) -> None:
        """The rows of each split, and report.json."""
        prepared = PreparedData(directory)
        report = {}
        for role in self.data.values():
            role.write(prepared)
            if not self.sources[role.role]:
                continue
            source, digest = ", ".join(self._names(role.role)), prepared.digest(role.role)
            report[role.role] = {"source": source, "digest": digest, **role.report()}
        rows = {role: prepared.rows(role, ROLES[role].splits[0]) for role in report}
        self.differences = [*unlike(rows)]
        for name, content in {REPORT: report, UNLIKE: self.differences}.items():
            text = json.dumps(content, indent=2, ensure_ascii=False)
            (directory / name).write_text(redacted_text(text), encoding="utf-8")

    def metrics(self) -> dict[str, float]:
        """How many rows there are, and how many were left out; of the role that lost most, which share."""
        counts = {
            name: self.data[role].num_of(row_type)
            for role, entry_of_role in ROLES.items()
            if entry_of_role.metrics
            for name, row_type in zip(entry_of_role.metrics, entry_of_role.row_types, strict=True)
        }
        dropped = sum(role.num_dropped for role in self.data.values())
        bad_share = max(role.bad_share for role in self.data.values())
        return counts | {"dropped": dropped, "bad_share": bad_share, "leaks": self.num_leaks}

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
        for said in self.differences:
            console.print(f"  {said}", style="yellow", markup=False, highlight=False)
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

    def _read(self, role: str, progress: Progress) -> None:
        """Read a role, after the one whose prompts it takes."""
        if role in self.data:
            return
        other = lender(self.sources, role)
        if other is not None:
            self._read(other, progress)
            self._take_prompts(role, self.data[other])
            return
        sources = own_sources(self.sources, role)
        alike = next((data for data in self.data.values() if self._reads_the_same(data, role)), None)
        if alike is not None:  # rows are read and encoded once
            self.data[role] = replace(
                alike, role=role, rows=alike.rows[:], removed=deepcopy(alike.removed), cut=Removed()
            )
            return
        store = RowStore(directory=self.scratch, name=role, tokenizer=self.digest)
        data = self.data[role] = RoleData(role, store)
        seen: set[bytes] = set()
        with store, progress.task(f"reading {data.key}", None) as task:
            for source in sources:
                for num_rows in self._read_source(source, data, seen):
                    task.advance(num_rows)

    def _reads_the_same(self, data: RoleData, role: str) -> bool:
        """Whether `data` is what the role would read too."""
        one, other = ROLES[data.role], ROLES[role]
        same_sources = own_sources(self.sources, data.role) == own_sources(self.sources, role)
        has_prompts = self._is_lent(data.role) or not self._is_lent(role)
        return not data.prompts_only and one.parse is other.parse and same_sources and has_prompts

    def _is_lent(self, role: str) -> bool:
        return any(lender(self.sources, other) == role for other in ROLES)

    def _take_prompts(self, role: str, lends: RoleData) -> None:
        """The prompts of another role's rows, each once."""
        data = self.data[role] = RoleData(role, lends.store, prompts_only=True)
        seen: set[bytes] = set()
        for number in lends.rows:
            data.num_read += 1
            identity = data.store.identity[number]
            if not data.store.has_prompt[number]:
                data.remove_row(NO_PROMPT, number)
            elif identity in seen:
                data.remove_row(SAME_PROMPT, number)
            else:
                seen.add(identity)
                data.rows.append(number)

    def _read_source(self, source: SourceConfig, data: RoleData, seen: set[bytes]) -> Iterator[int]:
        """Read a source. Gives the number of rows that are newly read."""
        role, fingerprint, beyond = ROLES[data.role], source.fingerprint(data.key), Removed()
        examiner = Examiner(role, source, self.tokenizer, self._is_lent(data.role))
        if source.limit is not None:
            examiner = replace(examiner, chosen=self._within_limit(examiner, source.limit, seen))
        for piece in examiner.all():
            data.num_read += len(piece.found)
            yield len(piece.found)
            if piece.first is not None and str(source) not in data.columns and source.samples is None:
                columns = dict.fromkeys(source.fields.get(column, column) for column in piece.first)
                data.columns[str(source)] = (
                    f"has {', '.join(columns)}; read as {read_as(piece.first, role.columns, source.fields)}"
                )
            first, place = data.store.add_piece(piece, fingerprint), 0
            for found in piece.found:
                if isinstance(found, Bad):
                    self._bad(data, found.where, found.complaint, self._advice(source, data, found))
                    continue
                if found in seen:
                    data.remove(DUPLICATE, piece.where(place))
                else:
                    seen.add(found)
                    if examiner.chosen is None or found in examiner.chosen:
                        data.rows.append(first + place)
                    else:
                        beyond.add(piece.where(place))
                place += 1
        if beyond.count:
            data.removed.setdefault(BEYOND_LIMIT, Removed()).extend(beyond)

    def _within_limit(self, examiner: Examiner, limit: int, seen: Collection[bytes]) -> set[bytes]:
        """Digests of the rows that a source's limit leaves."""
        identities: dict[bytes, str] = {}
        for piece in replace(examiner, chosen=()).all():
            usable = (found for found in piece.found if isinstance(found, bytes))
            for digest, identity in zip(usable, piece.numbers.identity, strict=True):
                if digest not in seen:
                    identities.setdefault(digest, identity.hex())
        return {
            *limited([*identities], limit, identities.__getitem__, lambda row: self._kind(identities[row]))
        }

    def _kind(self, identity: str) -> Split:
        """The split that a row would be in if evaluation read its source too."""
        is_evaluated = drawn(identity, self.evaluation_fraction, "evaluation")
        return "evaluation" if is_evaluated else self._training_split(identity)

    def _training_split(self, identity: str) -> Split:
        return "held_out" if drawn(identity, self.held_out_fraction, "held_out") else "train"

    def _advice(self, source: SourceConfig, data: RoleData, bad: Bad) -> str:
        """How to name the columns of a row that lacks some."""
        lacks = bad.complaint.reason in ("missing field", "no answer")
        if not lacks or bad.raw is None or source.fields:
            return ""
        return (
            f" Are they in other columns? {source.with_fields(data.key, ROLES[data.role].columns, bad.raw)}."
        )

    def _bad(self, data: RoleData, where: str, complaint: Complaint, advice: str = "") -> None:
        is_own = lender(self.sources, data.role) is None  # the user never said that others' rows are prompts
        if self.on_bad_row == "error" and is_own:
            raise ConfigError(
                f"{data.key}: {where}: {complaint.text.removesuffix('.')}.{advice} "
                "Fix the row, or set prepare.on_bad_row=drop to leave out such rows."
            )
        data.remove(complaint.reason, where)

    def _measure(self) -> None:
        """A row that does not fit the context is left out and counted. Where its answer can be cut it stays,
        and training cuts it, as `sft.max_tokens` says."""
        if self.response_tokens >= self.context:
            raise ConfigError(
                f"ppo.max_new_tokens={self.response_tokens} leaves no room for a prompt "
                f"in the model's context of {self.context} tokens. Lower it."
            )
        for role in self.data.values():
            kept = array("i")
            for number in role.rows:
                refused = role.store.refused.get(number)
                if refused is not None:
                    self._bad(role, role.store.where(number), refused)
                    continue
                if role.tokens(number) > self._room(role, number):
                    if not self._can_be_cut(role, number):
                        role.remove_row(TOO_LONG, number)
                        continue
                    role.cut.add(role.store.where(number))
                kept.append(number)
            role.rows = kept
            role.measure_shared_prefix()

    def _room(self, role: RoleData, number: int) -> int:
        """Tokens that a row may have: a prompt leaves some for its answer."""
        waits = role.prompts_only or role.store.waits[number]
        return self.context - (self.response_tokens if waits else 0)

    def _can_be_cut(self, role: RoleData, number: int) -> bool:
        """Whether the context has room for a part of the answer."""
        store = role.store
        return (
            not role.prompts_only
            and bool(store.can_be_cut[number])
            and store.prompt_tokens[number] < self.context
        )

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
        trained = {fingerprint for role in training for fingerprint in role.fingerprints()}
        shared: set[bytes] = set()
        apart: set[bytes] = set()
        for role in self.data.values():
            if role.role not in names:
                role.keep(partial(self._is_evaluated, role, trained), LEFT_FOR_TRAINING)
                for number in role.rows:
                    is_shared = role.store.fingerprint[number] in trained
                    (shared if is_shared else apart).add(role.store.identity[number])
        for role in training:
            role.keep(partial(role.asks_none_of, shared), IN_EVALUATION)
            role.keep(partial(role.asks_none_of, apart), LEAK)

    def _is_evaluated(self, role: RoleData, trained: Collection[str], number: int) -> bool:
        """Whether an evaluation role keeps a row, if training reads the sources `trained`."""
        is_shared = role.store.fingerprint[number] in trained
        return not is_shared or drawn(role.identity(number), self.evaluation_fraction, "evaluation")

    def _set_judge_apart(self) -> None:
        """Leave the prompts that the judge learns from out of all other preferences."""
        if JUDGE not in self.data:
            return
        judge = self.data[JUDGE]
        taught = {number for number in judge.rows if self._teaches_judge(judge.identity(number))}
        prompts = {judge.store.identity[number] for number in taught}
        for role in self.data.values():
            if role is not judge and PairRow in ROLES[role.role].row_types:
                role.keep(partial(role.asks_none_of, prompts), FOR_JUDGE)

    def _teaches_judge(self, identity: str) -> bool:
        return drawn(identity, self.judge_fraction, "judge")

    def _split(self) -> None:
        for role in self.data.values():
            splits = ROLES[role.role].splits
            role.splits = {split: array("i") for split in splits}
            for number in role.rows:
                split = self._split_of(role, number) if "train" in splits else "evaluation"
                role.splits[split].append(number)
        if JUDGE in self.data:  # which is tested on what others learn from, of which some are enough
            judge = self.data[JUDGE]
            tests = {*nsmallest(JUDGE_TESTS, judge.splits["held_out"], key=judge.identity)}  # at random
            judge.splits["held_out"] = array("i", filter(tests.__contains__, judge.splits["held_out"]))

    def _split_of(self, role: RoleData, number: int) -> Split:
        identity = role.identity(number)
        if role.role == JUDGE:
            return "train" if self._teaches_judge(identity) else "held_out"
        return self._training_split(identity)

    def _check_not_empty(self) -> None:
        for role in self.data.values():
            for split, rows in role.splits.items():
                if not rows and own_sources(self.sources, role.role):
                    raise NoRowsError(
                        f"{role.key}: no rows are left for {split}: "
                        f"{'; '.join([f'{role.num_read} read', f'{len(role.rows)} kept', *role.why()])}. "
                        f"{self._more(role, split)}"
                        f"{f' {self._too_long()}' if role.count(TOO_LONG) else ''}"
                    )

    def _more(self, role: RoleData, split: Split) -> str:
        """What gives a split its first row."""
        if split == "held_out" and len({role.identity(number) for number in role.rows}) == 1:
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
        lengths = quantiles(map(role.tokens, role.rows))
        for name in ("p50", "p95", "max"):
            yield str(lengths[name])
