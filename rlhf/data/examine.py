"""A source's rows, examined on all cores: what each becomes, what it asks, and its token ids.

What decides about rows (hashes, counts) is kept in memory, their texts and ids in files.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from rlhf.data.arrow import ArrowWriter, mapped
from rlhf.data.chat_template import Encoded, encode
from rlhf.data.cores import on_all_cores
from rlhf.data.roles import Role
from rlhf.data.schema import (
    PromptRow,
    Row,
    RowError,
    SftRow,
    TextRow,
    each_turn,
    prompt_identity,
    row_to_json,
)
from rlhf.data.sources import Located, SourceConfig
from rlhf.data.tokens import TokenIds, TokenWriter, compact, in_pieces

if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedTokenizerBase


class Complaint(NamedTuple):
    """A `RowError` that can travel between processes."""

    reason: str
    text: str


class Examined(NamedTuple):
    """A row that can be used, if its template agrees."""

    text: str
    """Its JSON."""
    prompt: str | None
    """JSON of the `PromptRow` that other roles take; None where it has no prompt, or no role takes it."""
    digest: bytes
    """Of the row, without its source's name: equal for duplicates."""
    identity: bytes
    """`prompt_identity`."""
    asks: tuple[bytes, ...]
    """`prompt_identity` of all that it teaches an answer to, of a conversation with several answers."""
    kind: int
    """Which of the role's types it is of."""
    num_exchanges: int
    can_be_cut: bool
    """Whether training may cut off the end of its answer."""
    sequences: list[Encoded] | Complaint | None
    """None where nobody asked for them."""


@dataclass(frozen=True)
class Examiner:
    """Examines the rows of one source for one role."""

    role: Role
    source: SourceConfig
    tokenizer: PreTrainedTokenizerBase
    is_lent: bool
    """Whether another role takes the rows' prompts."""
    chosen: Collection[bytes] | None = None
    """Digests of the rows that are encoded; None for all."""

    def all(self) -> Iterator[tuple[Located, Examined | Complaint]]:
        """Every row of the source, with what it was found to be.

        Raises:
            ConfigError: the source as a whole cannot be read.
        """
        waiting: list[list[Located]] = []

        def contents() -> Iterator[list[dict[str, Any] | Complaint]]:
            for piece in in_pieces(self.source.rows(self.role.key)):
                waiting.append(piece)
                yield [
                    Complaint(raw.reason, str(raw)) if isinstance(raw, RowError) else raw for _, raw in piece
                ]

        for found in on_all_cores(self._some, contents()):
            yield from zip(waiting.pop(0), found, strict=True)

    def _some(self, piece: Sequence[dict[str, Any] | Complaint]) -> list[Examined | Complaint]:
        return [raw if isinstance(raw, Complaint) else self._one(raw) for raw in piece]

    def _one(self, raw: dict[str, Any]) -> Examined | Complaint:
        try:
            row = self.role.parse(raw)
        except RowError as error:
            return Complaint(error.reason, str(error))
        digest = hashlib.sha256(row_to_json(row).encode()).digest()[:16]
        if isinstance(row, TextRow):
            row = replace(row, source=self.source.name)
        exchanges = row.exchanges()
        prompt = exchanges[0][0]
        turns = each_turn(row) if isinstance(row, SftRow) and row.turns > 1 else ()
        return Examined(
            row_to_json(row),
            row_to_json(PromptRow(prompt)) if self.is_lent and prompt else None,
            digest,
            bytes.fromhex(prompt_identity(row)),
            tuple(bytes.fromhex(prompt_identity(turn)) for turn in turns),
            next(kind for kind, row_type in enumerate(self.role.row_types) if isinstance(row, row_type)),
            len(exchanges),
            isinstance(row, SftRow),
            self._sequences(row) if self.chosen is None or digest in self.chosen else None,
        )

    def _sequences(self, row: Row) -> list[Encoded] | Complaint:
        from jinja2 import TemplateError

        try:
            return compact(encode(self.tokenizer, row))
        except TemplateError as error:  # some refuse a system turn, or two turns of one speaker
            text = f"the chat template refuses the conversation: {error}."
            return Complaint("refused by template", text)


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
        return TokenIds(self._path("ids"))

    def where(self, number: int) -> str:
        """Where a row was found."""
        return str(self.table["where"][number].as_py())

    def _path(self, what: str) -> Path:
        return self.directory / f"{self.name}.{what}.arrow"
