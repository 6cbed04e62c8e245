"""Rows in files: as `prepare` stores them while it reads the roles, and as later stages read the result."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean, pstdev
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, Self, TypeVar, overload

from rlhf.config import ConfigError
from rlhf.data.arrow import ArrowWriter, column_values, map_table, pick_batches
from rlhf.data.roles import ROLES, Role, Roles
from rlhf.data.schema import (
    PairRow,
    PromptRow,
    QuestionRow,
    Row,
    SftRow,
    Split,
    TextRow,
    ThumbRow,
    copied_answer,
    row_from_json,
    row_to_json,
    text_of,
)
from rlhf.data.tokens import ExaminedPiece, RowNumbers, TokenIds, TokenWriter, text_schema
from rlhf.digests import digest_of, file_digest
from rlhf.printable import printable

if TYPE_CHECKING:
    import pyarrow
    from numpy.typing import NDArray

AnyRow = TypeVar("AnyRow")
TrainSplit = Literal["train", "held_out"]
REPORT = "report.json"
DUPLICATE, IN_EVALUATION, LEFT_FOR_TRAINING = "duplicate", "in_evaluation", "left_for_training"
FOR_JUDGE = "for the judge"
NO_PROMPT, SAME_PROMPT = "no prompt", "same prompt"
"""Reasons to remove a row from a role that uses only the prompts of another role's rows."""
LEAK = "leak"
"""The prompt is also in an evaluation set with sources of its own."""
BEYOND_LIMIT, TOO_LONG = "beyond limit", "too long"
NOT_DROPPED = (FOR_JUDGE, IN_EVALUATION, LEFT_FOR_TRAINING, LEAK, BEYOND_LIMIT, NO_PROMPT, SAME_PROMPT)
"""Reasons to remove valid rows: another role or split has them, or they are beyond a source's limit."""
FAULTS = NEAR_DUPLICATE, CONTRADICTION, COPIED = "near_duplicate", "contradiction", "copied_answer"
"""Reasons to remove rows that other rows, or their own prompts, show to be wrong. Metrics have these
names."""
OUTVOTED = "outvoted"
"""The opposite judgement is more frequent in the data, as when several people judged a pair."""
NUM_EXAMPLES, EXCERPT_CHARACTERS = 3, 80
"""Examples per reason, and characters of text in an example."""
QUANTILES = {"p5": 0.05, "p50": 0.5, "p95": 0.95, "max": 1.0}


class LengthStats(NamedTuple):
    """Number of rows, and statistics of their tokens. Estimates of time and memory use them."""

    rows: int
    mean: float
    deviation: float
    longest: int
    shared_prefix: float = 0.0
    """Mean number of first tokens that a row shares with the row before it. CPUs compute these once."""

    def cut(self, most: int) -> LengthStats:
        """The statistics if rows with more than `most` tokens are cut or left out."""
        return self._replace(
            mean=min(self.mean, most),
            longest=min(self.longest, most),
            shared_prefix=min(self.shared_prefix, most),
        )

    def first(self, rows: int | None) -> LengthStats:
        """The statistics of the first `rows` rows."""
        return self if rows is None else self._replace(rows=min(self.rows, rows))


def role_digest(name: str, role: Role, files: Mapping[str, str]) -> str:
    """Like `PreparedData.digest`, from the file digests in a manifest."""
    return digest_of({split: files[f"{name}.{split}.arrow"] for split in role.splits})


class Rows(Sequence[AnyRow], Generic[AnyRow]):
    """Rows in a file. Each is parsed when it is accessed, so a million of them need no memory."""

    def __init__(
        self, column: pyarrow.ChunkedArray, types: Sequence[type[Row]], places: Sequence[int]
    ) -> None:
        """The rows of `column` at these places. Each is of one of the `types`."""
        self._column, self._types, self._picked = column, types, places

    def __len__(self) -> int:
        return len(self._picked)

    @overload
    def __getitem__(self, index: int) -> AnyRow: ...
    @overload
    def __getitem__(self, index: slice) -> Rows[AnyRow]: ...

    def __getitem__(self, index: int | slice) -> AnyRow | Rows[AnyRow]:
        if isinstance(index, slice):
            return Rows(self._column, self._types, self._picked[index])
        return self._parsed(self._column[self._picked[index]].as_py())

    def __iter__(self) -> Iterator[AnyRow]:
        yield from map(self._parsed, column_values(self._column, self._picked))

    def pick(self, places: Sequence[int]) -> Rows[AnyRow]:
        """The rows at these indices."""
        return Rows(self._column, self._types, array("i", (self._picked[place] for place in places)))

    def _parsed(self, text: str) -> AnyRow:
        row: Any = row_from_json(text, self._types)
        return row  # type: ignore[no-any-return]  # the role says which types it has


@dataclass(frozen=True)
class PreparedData:
    """ROLE.SPLIT.arrow files in one directory. Their column `row` holds each row as JSON, because rows of a
    user's own roles may have any fields."""

    directory: Path
    elsewhere: Mapping[str, tuple[Path, str]] = field(default_factory=dict)
    """Role -> the directory of its rows, and its name there. Other roles are in `directory`."""
    roles: Roles = field(default_factory=lambda: ROLES)
    """The roles of the config. Its stages may add their own."""

    @overload
    def rows(self, role: Literal["sft", "replay", "ptx"], split: TrainSplit) -> Rows[SftRow]: ...
    @overload
    def rows(self, role: Literal["pairs"], split: TrainSplit) -> Rows[PairRow]: ...
    @overload
    def rows(self, role: Literal["dpo"], split: TrainSplit) -> Rows[PairRow | ThumbRow]: ...
    @overload
    def rows(self, role: Literal["ppo"], split: TrainSplit) -> Rows[PromptRow]: ...
    @overload
    def rows(self, role: Literal["evaluate"], split: Literal["evaluation"]) -> Rows[PromptRow]: ...
    @overload
    def rows(
        self, role: Literal["retention"], split: Literal["evaluation"]
    ) -> Rows[TextRow | QuestionRow]: ...
    @overload
    def rows(self, role: str, split: str) -> Rows[Any]: ...

    def rows(self, role: str, split: str) -> object:
        """The rows of one split, in the order of their source. A role without a source has none. A role of a
        user's stage has rows of its own type."""
        column = map_table(self._path(role, split))["row"]
        return Rows(column, self.roles[role].row_types, range(len(column)))

    def digest(self, role: str) -> str:
        """Digest of a role's rows. It does not depend on other roles."""
        paths = [self._path(role, split) for split in self.roles[role].splits]
        return role_digest(role, self.roles[role], {path.name: file_digest(path) for path in paths})

    def content_digest(self, role: str) -> str | None:
        """Digest of a role's rows. It is equal for roles with equal rows; None if the role has no files."""
        paths = [self._path(role, split) for split in self.roles[role].splits]
        return digest_of([file_digest(path) for path in paths]) if all(map(Path.is_file, paths)) else None

    def size(self, role: str, split: Split) -> LengthStats:
        """Number of rows in a split, and the lengths of all rows of the role. A pair has the length of its
        longer side."""
        report = self._report(role)
        if report is None:  # it has no source
            return LengthStats(0, 0.0, 0.0, 0)
        tokens = report["tokens"]
        return LengthStats(
            report["kept"][split], tokens["mean"], tokens["deviation"], tokens["max"], tokens["in_common"]
        )

    def mean_answer(self, role: str) -> float | None:
        """Mean tokens of the answers in the role's training rows; None without answers."""
        path = self.tokens_path(role, "train")
        if not path.exists():
            return None
        import numpy

        spans = TokenIds(path).spans
        return float(numpy.diff(spans).mean()) if len(spans) else None

    def check_not_empty(self, role: str) -> None:
        """Refuse a role without rows that uses the prompts of another role. `prepare` itself refuses an empty
        source.

        Raises:
            ConfigError: a split is empty; the text says why the rows were removed.
        """
        report = self._report(role)
        assert report is not None
        for split, rows in report["kept"].items():
            if not rows:
                removed = [f"{each['count']} {reason}" for reason, each in report["removed"].items()]
                reasons = "; ".join([f"{report['read']} rows", *removed])
                advice = f"Give more rows, or set {self.roles[role].key} to a source that no other key uses."
                raise ConfigError(
                    f"{self.roles[role].key}={report['source']}: no prompts are left for {split}: {reasons}. "
                    f"{report['made_by_runs'] or advice}"
                )

    def write(self, role: str, split: Split, rows: Iterable[Row]) -> None:
        """Write one split."""
        with self._writer(role, split) as file:
            for row in rows:
                file.add({"row": row_to_json(row)})

    def write_batches(self, role: str, split: Split, batches: Iterable[pyarrow.RecordBatch]) -> None:
        """Write one split. The batches have one column: rows from `row_to_json`."""
        with self._writer(role, split) as file:
            for batch in batches:
                file.add_batch(batch.rename_columns(["row"]))

    def _writer(self, role: str, split: Split) -> ArrowWriter:
        import pyarrow

        return ArrowWriter(self._path(role, split), pyarrow.schema([("row", pyarrow.string())]))

    def tokens_path(self, role: str, split: str) -> Path:
        """The `TokenIds` file of a split's rows, encoded with the base model's tokenizer."""
        directory, name = self._location(role)
        return directory / f"{name}.{split}.tokens.arrow"

    def _report(self, role: str) -> dict[str, Any] | None:
        directory, name = self._location(role)
        report: dict[str, Any] = json.loads((directory / REPORT).read_text(encoding="utf-8"))
        return report.get(name)

    def _location(self, role: str) -> tuple[Path, str]:
        return self.elsewhere.get(role, (self.directory, role))

    def _path(self, role: str, split: str) -> Path:
        assert split in self.roles[role].splits, f"{role} has no split {split}"
        directory, name = self._location(role)
        return directory / f"{name}.{split}.arrow"


@dataclass
class RowStore(RowNumbers):
    """All rows of one role that were read, also those removed later. Numbers are in memory; texts and ids are
    in two files."""

    directory: Path = field(kw_only=True)
    name: str = field(kw_only=True)
    tokenizer: str = field(kw_only=True)
    """`tokenizer_digest`."""
    row_types: Sequence[type[Row]] = field(kw_only=True)
    fingerprint: list[str] = field(default_factory=list)
    """Fingerprint of each row's source."""

    def __enter__(self) -> Self:
        self._rows = ArrowWriter(self._path("rows"), text_schema())
        self._ids = TokenWriter(self._path("ids"), self.tokenizer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rows.__exit__(kind, error, trace)
        self._ids.file.__exit__(kind, error, trace)

    def add_piece(self, piece: ExaminedPiece, fingerprint: str) -> int:
        """Append rows with their sequences.

        Returns:
            The number of the first row.
        """
        first = len(self)
        self._rows.add_batch(piece.texts)
        self._ids.add(piece.sequences, len(piece.numbers))
        self.extend(piece.numbers)
        self.fingerprint += [fingerprint] * len(piece.numbers)
        return first

    @cached_property
    def table(self) -> pyarrow.Table:
        """Columns row, prompt and where."""
        return map_table(self._path("rows"))

    @cached_property
    def ids(self) -> TokenIds:
        """Token ids of all rows."""
        return TokenIds(self._path("ids"))

    def where(self, number: int) -> str:
        """The place of a row in its source."""
        return str(self.table["where"][number].as_py())

    def row(self, number: int) -> Row:
        """The row of this number."""
        return row_from_json(self.table["row"][number].as_py(), self.row_types)

    def _path(self, what: str) -> Path:
        return self.directory / f"{self.name}.{what}.arrow"


@dataclass
class Removed:
    """Number of rows that were removed for one reason, and the places of the first ones."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, where: str) -> None:
        """Count one more row."""
        self.count += 1
        if len(self.examples) < NUM_EXAMPLES:
            self.examples.append(where)

    def extend(self, other: Removed) -> None:
        """Add the rows of another count."""
        self.count += other.count
        self.examples = [*self.examples, *other.examples][:NUM_EXAMPLES]

    def places(self) -> str:
        """The examples as text, such as `train.jsonl line 4, train.jsonl line 9, ...`."""
        return ", ".join([*self.examples, *(["..."] if self.count > len(self.examples) else [])])


@dataclass
class RoleData:
    """The rows of one role: which are kept, removed, or in a split. A row is given by its number in the
    store."""

    role: str
    """Its name."""
    definition: Role
    store: RowStore
    prompts_only: bool = False
    """Whether the role uses only the prompts of rows that another role reads."""
    num_read: int = 0
    rows: array[int] = field(default_factory=lambda: array("i"))
    """The kept rows, in the order of their source."""
    shared_prefix: array[float] = field(default_factory=lambda: array("d"))
    """Per row of the store: mean number of first tokens that its sequences share with the ones before."""
    removed: dict[str, Removed] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    """User's source -> its columns, and how they are read."""
    cut: Removed = field(default_factory=Removed)
    """Kept rows that are longer than the model's context: training cuts them."""
    splits: dict[Split, array[int]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The config key of the role's source."""
        return self.definition.key

    def remove(self, reason: str, where: str) -> None:
        """Count a removed row."""
        self.removed.setdefault(reason, Removed()).add(where)

    def remove_row(self, reason: str, number: int, describe: Callable[[int], str] | None = None) -> None:
        """Count a removed row of the store. `describe` gives the text of an example."""
        removed = self.removed.setdefault(reason, Removed())
        removed.add((describe or self.store.where)(number) if len(removed.examples) < NUM_EXAMPLES else "")

    def keep(
        self, wanted: Callable[[int], bool], reason: str, describe: Callable[[int], str] | None = None
    ) -> None:
        """Keep the wanted rows, and remove the others for `reason`."""
        kept = array("i")
        for number in self.rows:
            if wanted(number):
                kept.append(number)
            else:
                self.remove_row(reason, number, describe)
        self.rows = kept
        self.splits = {split: array("i", filter(wanted, rows)) for split, rows in self.splits.items()}

    def leave_out(self, reason: str, faulty: Mapping[int, tuple[RoleData, int] | None]) -> None:
        """Remove rows for `reason`.

        Args:
            faulty: number of a row to remove -> the row that shows it to be wrong, or None.
        """

        def describe(number: int) -> str:
            other = faulty[number]
            rows = [(self, number), other] if other else [(self, number)]
            return " and ".join(role.example(place, reason) for role, place in rows)

        if faulty:
            self.keep(lambda number: number not in faulty, reason, describe)

    def example(self, number: int, reason: str) -> str:
        """The place of a row, with excerpts of its prompt and answers."""
        row = self.store.row(number)
        answers = [text_of(answer or "") for _, answer in row.exchanges()]
        if isinstance(row, ThumbRow):
            answers.append("thumb up" if row.thumb else "thumb down")
        texts_by_reason = {NEAR_DUPLICATE: [row.asked()], COPIED: [copied_answer(row) or answers[0]]}
        texts = [
            " ".join(printable(text).split()) for text in texts_by_reason.get(reason, [row.asked(), *answers])
        ]
        max_characters = EXCERPT_CHARACTERS // len(texts)
        excerpts = [f'"{text[:max_characters]}{"..." * (len(text) > max_characters)}"' for text in texts]
        return f"{self.store.where(number)}: {' > '.join(excerpts)}"

    def identity(self, number: int) -> str:
        """`prompt_identity` of a row."""
        return self.store.identity[number].hex()

    def asks_none_of(self, prompts: AbstractSet[bytes], number: int) -> bool:
        """Whether a row asks none of these prompts, in any turn."""
        return prompts.isdisjoint(self.store.asks.get(number, (self.store.identity[number],)))

    def fingerprints(self) -> set[str]:
        """Fingerprints of the sources of its rows."""
        return {self.store.fingerprint[number] for number in self.rows}

    def num_of(self, row_type: type[Row]) -> int:
        """Number of its rows of this type."""
        if self.prompts_only:
            return len(self.rows) if row_type is PromptRow else 0
        types = self.definition.row_types
        return sum(issubclass(types[self.store.kind[number]], row_type) for number in self.rows)

    def num_exchanges(self, number: int) -> int:
        """Number of a row's sequences that are exchanges. The others are separate earlier turns."""
        return 1 if self.prompts_only else self.store.num_exchanges[number]

    def tokens(self, number: int) -> int:
        """Tokens of the longest sequence of a row."""
        return (self.store.prompt_tokens if self.prompts_only else self.store.tokens)[number]

    def measure_shared_prefix(self) -> None:
        """Set `shared_prefix` for the kept rows."""
        import numpy

        self.shared_prefix = array("d", bytes(8 * len(self.store)))
        if not self.rows:
            return
        store, rows = self.store, numpy.array(self.rows, numpy.int64)
        counts = numpy.array([self.num_exchanges(number) for number in self.rows])
        places = ranges(numpy.array(store.sequences)[rows], counts)
        max_tokens = (
            numpy.array(store.prompt_tokens)[rows] if self.prompts_only else store.ids.lengths[places]
        )
        shared = numpy.add.reduceat(store.ids.shared_prefix(places, max_tokens), counts.cumsum() - counts)
        numpy.frombuffer(self.shared_prefix)[rows] = shared / counts

    def write(self, prepared: PreparedData) -> None:
        """Write the rows of each split, and their token ids."""
        import numpy

        store, sequences = self.store, numpy.array(self.store.sequences)
        texts = store.table.select(["prompt" if self.prompts_only else "row"])
        items = numpy.array(store.prompt_characters if self.prompts_only else store.characters)
        for split, numbers in self.splits.items():
            rows = numpy.array(numbers, numpy.int64)
            prepared.write_batches(self.role, split, pick_batches(texts, rows, items[rows]))
            first, prompts = sequences[rows], None
            counts = sequences[rows + 1] - first
            if self.prompts_only:
                counts, prompts = numpy.ones_like(rows), numpy.array(store.prompt_tokens)[rows]
            row = numpy.repeat(numpy.arange(len(rows)), counts)
            tokens = TokenWriter(prepared.tokens_path(self.role, split), store.tokenizer)
            with tokens.file:
                tokens.copy(store.ids, ranges(first, counts), row, prompts)

    def count(self, reason: str) -> int:
        """Number of rows removed for this reason."""
        return self.removed[reason].count if reason in self.removed else 0

    @property
    def num_dropped(self) -> int:
        """Number of rows that no role gets: duplicates and bad rows."""
        return sum(removed.count for reason, removed in self.removed.items() if reason not in NOT_DROPPED)

    @property
    def num_set_aside(self) -> int:
        """Number of valid rows that this role does not use: see `NOT_DROPPED`."""
        return sum(map(self.count, NOT_DROPPED))

    @property
    def bad_share(self) -> float:
        """Share of the rows read that the role could not use at all. Duplicates, outvoted rows and faults do
        not count."""
        others = sum(map(self.count, (DUPLICATE, OUTVOTED, *FAULTS)))
        return (self.num_dropped - others) / max(1, self.num_read)

    def share(self, reason: str) -> float:
        """Share of rows with this fault, among the rows that the role would have without faults."""
        return self.count(reason) / max(1, len(self.rows) + sum(map(self.count, FAULTS)))

    def reasons(self) -> list[str]:
        """The removed rows per reason, such as `2 tie (train.jsonl line 4, train.jsonl line 9)`."""
        return [
            f"{removed.count} {reason.replace('_', ' ')} ({removed.places()})"
            for reason, removed in self.removed.items()
        ]

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
    """Joined ranges: per begin, `count` consecutive numbers from it on."""
    import numpy

    return numpy.repeat(begins - (counts.cumsum() - counts), counts) + numpy.arange(counts.sum())


def quantiles(lengths: Iterable[int]) -> dict[str, int]:
    """The lengths at the 5th, 50th, 95th and 100th percentile."""
    ordered = sorted(lengths) or [0]
    return {name: ordered[round(share * (len(ordered) - 1))] for name, share in QUANTILES.items()}
