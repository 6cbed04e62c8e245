"""Rows in files: as `prepare` reads them, one role after the other, and as later stages read the result."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, Self, TypeVar, overload

from rlhf.config import ConfigError
from rlhf.data.arrow import ArrowWriter, mapped, values
from rlhf.data.formats import Complaint, Examined
from rlhf.data.roles import ROLES
from rlhf.data.schema import (
    PairRow,
    PromptRow,
    QuestionRow,
    Row,
    SftRow,
    Split,
    TextRow,
    row_from_json,
    row_to_json,
)
from rlhf.digests import digest_of, file_digest

if TYPE_CHECKING:
    import pyarrow

    from rlhf.data.chat_template import Encoded
    from rlhf.data.tokens import TokenIds

AnyRow = TypeVar("AnyRow")
TrainSplit = Literal["train", "held_out"]
REPORT = "report.json"


class LengthStats(NamedTuple):
    """Number of rows and of their tokens. Time and memory depend on them."""

    rows: int
    mean: float
    deviation: float
    longest: int
    shared_prefix: float = 0.0
    """Mean number of first tokens that a row shares with the row before it. On CPUs they are computed
    once."""

    def cut(self, most: int) -> LengthStats:
        """The lengths if rows with more than `most` tokens are cut or left out."""
        return self._replace(
            mean=min(self.mean, most),
            longest=min(self.longest, most),
            shared_prefix=min(self.shared_prefix, most),
        )

    def first(self, rows: int | None) -> LengthStats:
        """The lengths of the first `rows` rows."""
        return self if rows is None else self._replace(rows=min(self.rows, rows))


def role_digest(role: str, files: Mapping[str, str]) -> str:
    """Like `PreparedData.digest`, from the file digests in a manifest."""
    return digest_of({split: files[f"{role}.{split}.arrow"] for split in ROLES[role].splits})


class Rows(Sequence[AnyRow], Generic[AnyRow]):
    """Rows in a file. Each is made when it is asked for, so that a million of them need no memory."""

    def __init__(self, column: pyarrow.ChunkedArray, types: Sequence[type[Row]], picked: range) -> None:
        """The rows of `column` at the places `picked`, each of one of the types."""
        self._column, self._types, self._picked = column, types, picked

    def __len__(self) -> int:
        return len(self._picked)

    @overload
    def __getitem__(self, index: int) -> AnyRow: ...
    @overload
    def __getitem__(self, index: slice) -> Rows[AnyRow]: ...

    def __getitem__(self, index: int | slice) -> AnyRow | Rows[AnyRow]:
        if isinstance(index, slice):
            return Rows(self._column, self._types, self._picked[index])
        return self._made(self._column[self._picked[index]].as_py())

    def __iter__(self) -> Iterator[AnyRow]:
        yield from map(self._made, values(self._column, self._picked))

    def _made(self, text: str) -> AnyRow:
        row: Any = row_from_json(text, self._types)
        return row  # type: ignore[no-any-return]  # the role's entry in ROLES says which types it has


@dataclass(frozen=True)
class PreparedData:
    """ROLE.SPLIT.arrow files in one directory. Their column `row` has each row as JSON, since rows of users'
    roles have fields of any kind."""

    directory: Path

    @overload
    def rows(self, role: Literal["sft", "replay", "ptx"], split: TrainSplit) -> Rows[SftRow]: ...
    @overload
    def rows(self, role: Literal["pairs"], split: TrainSplit) -> Rows[PairRow]: ...
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
        """The rows of one split, in the order of their source; none of a role without a source. A role of a
        user's stage gives rows of its own type."""
        column = mapped(self._path(role, split))["row"]
        return Rows(column, ROLES[role].row_types, range(len(column)))

    def digest(self, role: str) -> str:
        """Digest of a role's rows. It does not depend on other roles."""
        paths = [self._path(role, split) for split in ROLES[role].splits]
        return role_digest(role, {path.name: file_digest(path) for path in paths})

    def size(self, role: str, split: Split) -> LengthStats:
        """Number of rows in a split, with the lengths of the role's rows; for pairs, of the longer side."""
        report = json.loads((self.directory / REPORT).read_text(encoding="utf-8")).get(role)
        if report is None:  # it has no source
            return LengthStats(0, 0.0, 0.0, 0)
        tokens = report["tokens"]
        return LengthStats(
            report["kept"][split], tokens["mean"], tokens["deviation"], tokens["max"], tokens["in_common"]
        )

    def check_not_empty(self, role: str) -> None:
        """Refuse rows that `prepare` took from others' where none are left; an empty source of the role's own
        it refuses itself.

        Raises:
            ConfigError: what became of them.
        """
        report = json.loads((self.directory / REPORT).read_text(encoding="utf-8"))[role]
        for split, rows in report["kept"].items():
            if not rows:
                removed = [f"{each['count']} {reason}" for reason, each in report["removed"].items()]
                why = "; ".join([f"{report['read']} rows", *removed])
                raise ConfigError(
                    f"{ROLES[role].key}={report['source']}: no prompts are left for {split}: {why}. "
                    f"Give more rows, or set {ROLES[role].key} to a source that no other key uses."
                )

    def write(self, role: str, split: Split, rows: Iterable[Row]) -> None:
        """Write one split."""
        self.write_json(role, split, map(row_to_json, rows))

    def write_json(self, role: str, split: Split, rows: Iterable[str]) -> None:
        """Write one split. Its rows are what `row_to_json` made."""
        import pyarrow

        schema = pyarrow.schema([("row", pyarrow.string())])
        with ArrowWriter(self._path(role, split), schema) as file:
            for row in rows:
                file.add({"row": row})

    def tokens_path(self, role: str, split: str) -> Path:
        """Where the token ids of a split's rows are, by the base model's tokenizer: a file of `TokenIds`."""
        return self.directory / f"{role}.{split}.tokens.arrow"

    def _path(self, role: str, split: str) -> Path:
        assert split in ROLES[role].splits, f"{role} has no split {split}"
        return self.directory / f"{role}.{split}.arrow"


@dataclass
class RowStore:
    """Rows of one role as they were read. Numbers are in memory; texts and ids in two files."""

    directory: Path
    name: str
    tokenizer: str
    """`tokenizer_digest`."""
    identity: list[bytes] = field(default_factory=list)
    asks: dict[int, tuple[bytes, ...]] = field(default_factory=dict)
    """Of conversations with several answers."""
    fingerprint: list[str] = field(default_factory=list)
    """Of each row's source."""
    kind: bytearray = field(default_factory=bytearray)
    can_be_cut: bytearray = field(default_factory=bytearray)
    has_prompt: bytearray = field(default_factory=bytearray)
    waits: bytearray = field(default_factory=bytearray)
    """Whether it has an answer that is to be sampled."""
    tokens: array[int] = field(default_factory=lambda: array("i"))
    """Of the longest sequence of its exchanges."""
    prompt_tokens: array[int] = field(default_factory=lambda: array("i"))
    """Of its first exchange."""
    num_exchanges: array[int] = field(default_factory=lambda: array("i"))
    sequences: array[int] = field(default_factory=lambda: array("q", [0]))
    """Number of sequences before each row, and of all."""
    refused: dict[int, Complaint] = field(default_factory=dict)
    """By the chat template."""

    def __enter__(self) -> Self:
        import pyarrow

        from rlhf.data.tokens import TokenWriter

        columns = [(name, pyarrow.string()) for name in ("row", "prompt", "where")]
        self._rows = ArrowWriter(self._path("rows"), pyarrow.schema(columns))
        self._ids = TokenWriter(self._path("ids"), self.tokenizer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rows.__exit__(kind, error, trace)
        self._ids.file.__exit__(kind, error, trace)

    def add(self, where: str, row: Examined, fingerprint: str) -> int:
        """Append a row with its sequences.

        Returns:
            Its number.
        """
        number = len(self.identity)
        self._rows.add({"row": row.text, "prompt": row.prompt, "where": where})
        self.identity.append(row.identity)
        self.fingerprint.append(fingerprint)
        self.kind.append(row.kind)
        self.can_be_cut.append(row.can_be_cut)
        self.has_prompt.append(row.prompt is not None)
        self.num_exchanges.append(row.num_exchanges)
        if row.asks:
            self.asks[number] = row.asks
        found: list[Encoded] = []
        if isinstance(row.sequences, Complaint):
            self.refused[number] = row.sequences
        else:
            assert row.sequences is not None
            found = row.sequences
        own = found[: row.num_exchanges]
        self.waits.append(any(not each.spans for each in own))
        self.tokens.append(max((len(each.ids) for each in own), default=0))
        self.prompt_tokens.append(own[0].num_prompt if own else 0)
        self.sequences.append(self.sequences[-1] + len(found))
        self._ids.add(found)
        return number

    @cached_property
    def table(self) -> pyarrow.Table:
        """Columns row, prompt and where."""
        return mapped(self._path("rows"))

    @cached_property
    def ids(self) -> TokenIds:
        """Token ids of all rows."""
        from rlhf.data.tokens import TokenIds

        return TokenIds(self._path("ids"))

    def where(self, number: int) -> str:
        """Where a row was found."""
        return str(self.table["where"][number].as_py())

    def _path(self, what: str) -> Path:
        return self.directory / f"{self.name}.{what}.arrow"
