"""Token ids of rows: made once, on all cores, and kept in an Arrow file that every rank maps.

`Examiner` makes them of a source's rows, with all else that `prepare` wants to know of each.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf.data.arrow import ArrowWriter, mapped, picked
from rlhf.data.chat_template import Encoded, encode, tokenizer_digest
from rlhf.data.cores import on_all_cores
from rlhf.data.formats import checked_json, with_columns
from rlhf.data.schema import (
    LONG_WORDS,
    PromptRow,
    Row,
    RowError,
    SftRow,
    TextRow,
    calls_tools,
    copied_answer,
    each_turn,
    judgement,
    number_of,
    plain_words,
    prompt_identity,
    row_to_json,
)

if TYPE_CHECKING:
    import numpy
    import pyarrow
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from rlhf.data.roles import Role
    from rlhf.data.sources import SourceConfig, Unread

COLUMNS = ("row", "ids", "spans")
"""Of a file: which row a sequence is of, its ids, and (begin, end) of each answer in it."""
COMPARED = 64
"""Tokens of two sequences that are compared at once."""
ROWS_AT_ONCE = 500
"""Rows that a process encodes before it hands them over."""


class TokenIds:
    """The sequences of all rows of a file. In memory are numbers; ids are read when they are asked for."""

    def __init__(self, path: Path) -> None:
        table = mapped(path)
        self.tokenizer = table.schema.metadata[b"tokenizer"].decode()
        """`tokenizer_digest` of the tokenizer that made them."""
        self.table = table
        """Columns row, ids and spans."""

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, index: int) -> NDArray[numpy.int32]:
        """The ids of a sequence, in the mapped file."""
        ids: NDArray[numpy.int32] = self.table["ids"][int(index)].values.to_numpy(zero_copy_only=True)
        return ids

    def encoded(self, index: int) -> Encoded:
        """A sequence with its spans."""
        return Encoded(
            self[index], self.spans[self.span_ends[index - 1] if index else 0 : self.span_ends[index]]
        )

    def shared_prefix(self, places: NDArray[numpy.int64], most: NDArray[numpy.int32]) -> NDArray[numpy.int64]:
        """How many first tokens each sequence at these places, which ascend, shares with the one before it.

        Args:
            most: so many tokens of each sequence count.
        """
        import numpy

        found = numpy.zeros(len(places), numpy.int64)
        chunks = self.table["ids"].chunks
        starts = numpy.cumsum([0, *map(len, chunks)])
        bounds = numpy.searchsorted(places, starts)
        for chunk, (low, high), start in zip(chunks, pairwise(bounds), starts, strict=False):
            if low == high:
                continue
            ids, ends = chunk.values.to_numpy(zero_copy_only=True), chunk.offsets.to_numpy()
            begins, lengths = ends[places[low:high] - start], most[low:high]
            found[low + 1 : high] = _equal(ids, begins, lengths)
            if low:  # with the last one of another chunk
                pair = [self[places[n]][: most[n]] for n in (low - 1, low)]
                joined = numpy.concatenate(pair)
                (found[low],) = _equal(joined, numpy.array([0, len(pair[0])]), most[low - 1 : low + 1])
        return found

    @cached_property
    def row(self) -> NDArray[numpy.int32]:
        """The row that each sequence is of."""
        return self._numbers(self.table["row"])

    @cached_property
    def lengths(self) -> NDArray[numpy.int32]:
        """Tokens of each sequence."""
        from pyarrow import compute

        return self._numbers(compute.list_value_length(self.table["ids"]))

    @cached_property
    def span_ends(self) -> NDArray[numpy.int64]:
        """How many spans the sequences up to and with each one have."""
        from pyarrow import compute

        found: NDArray[numpy.int64] = (
            self._numbers(compute.list_value_length(self.table["spans"])).cumsum() // 2
        )
        return found

    @cached_property
    def spans(self) -> NDArray[numpy.int32]:
        """(begin, end) of the answers of all sequences, one after the other: [spans, 2]."""
        from pyarrow import compute

        return self._numbers(compute.list_flatten(self.table["spans"])).reshape(-1, 2)

    def _numbers(self, column: Any) -> NDArray[numpy.int32]:
        found: NDArray[numpy.int32] = column.to_numpy()
        return found


def _equal(
    ids: NDArray[numpy.int32], begins: NDArray[numpy.integer[Any]], lengths: NDArray[numpy.int32]
) -> NDArray[numpy.int64]:
    """How many first tokens each of the sequences but the first shares with the one before it."""
    import numpy

    found = numpy.zeros(len(begins) - 1, numpy.int64)
    most = numpy.minimum(lengths[1:], lengths[:-1])
    left, columns = numpy.flatnonzero(most), numpy.arange(COMPARED)
    while len(left):
        places = found[left, None] + columns
        inside = places < most[left, None]
        one, other = (
            ids[numpy.where(inside, begin[left, None] + places, 0)] for begin in (begins[:-1], begins[1:])
        )
        same = inside & (one == other)
        equal = numpy.where(same.all(1), COMPARED, same.argmin(1))
        found[left] += equal
        left = left[equal == COMPARED]
    return found


def batch_of(rows: Iterable[Sequence[Encoded]]) -> pyarrow.RecordBatch:
    """The sequences of rows as columns, which another process and Arrow take much faster than lists."""
    import pyarrow

    numbered = [(number, *each) for number, sequences in enumerate(rows) for each in sequences]
    numbers, ids, spans = zip(*numbered, strict=True) if numbered else ((), (), ())
    flat = [[place for span in some for place in span] for some in spans]
    columns = [pyarrow.array(numbers, pyarrow.int32()), list_column(ids), list_column(flat)]
    return pyarrow.RecordBatch.from_arrays(columns, names=COLUMNS)


def list_column(lists: Sequence[Any]) -> pyarrow.ListArray:
    """Lists or arrays of int32 numbers."""
    import numpy
    import pyarrow

    ends = numpy.cumsum([0, *map(len, lists)], dtype=numpy.int32)
    arrays = [numpy.asarray(each, numpy.int32) for each in lists]
    items = numpy.concatenate(arrays) if arrays else numpy.array([], numpy.int32)
    return pyarrow.ListArray.from_arrays(pyarrow.array(ends), pyarrow.array(items))


class TokenWriter:
    """Writes the sequences of rows, some rows at a time."""

    def __init__(self, path: Path, tokenizer: str) -> None:
        """Args:
        tokenizer: `tokenizer_digest` of the one that makes the ids.
        """
        import pyarrow

        numbers = pyarrow.list_(pyarrow.int32())
        types = zip(COLUMNS, (pyarrow.int32(), numbers, numbers), strict=True)
        self.schema = pyarrow.schema([*types], {"tokenizer": tokenizer})
        self.file = ArrowWriter(path, self.schema)
        self._num_rows = 0

    def add(self, batch: pyarrow.RecordBatch, num_rows: int) -> None:
        """Append the sequences of the next rows, which are numbered from 0 in the batch."""
        from pyarrow import compute

        numbers = compute.add(batch["row"], compute.cast(self._num_rows, batch["row"].type))
        self.file.add_batch(batch.from_arrays([numbers, *batch.columns[1:]], schema=self.schema))
        self._num_rows += num_rows

    def copy(
        self,
        ids: TokenIds,
        places: NDArray[numpy.int64],
        rows: NDArray[numpy.int64],
        prompts: NDArray[numpy.int32] | None,
    ) -> None:
        """Append sequences of another file.

        Args:
            places: where they are there, ascending.
            rows: which row each of them is of.
            prompts: take only so many tokens of each sequence, as a prompt without an answer; None for all.
        """
        import numpy
        import pyarrow

        num_spans = numpy.diff(ids.span_ends, prepend=0)[places] if prompts is None else 0
        items = 1 + (ids.lengths[places] if prompts is None else prompts) + 2 * num_spans
        begin = 0
        for batch in picked(ids.table, places, items):
            some = slice(begin, begin + len(batch))
            columns = [pyarrow.array(rows[some], pyarrow.int32()), *batch.columns[1:]]
            if prompts is not None:
                found, ends = columns[1].values.to_numpy(), columns[1].offsets.to_numpy()
                cut = zip(ends[:-1], prompts[some], strict=True)
                columns[1:] = (
                    list_column([found[start : start + most] for start, most in cut]),
                    list_column([[]] * len(batch)),
                )
            self.file.add_batch(pyarrow.RecordBatch.from_arrays(columns, schema=self.schema))
            begin = some.stop


def write_tokens(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Row],
    on_rows: Callable[[int], None] = lambda rows: None,
) -> None:
    """Encode rows on all cores, and write their ids.

    Args:
        on_rows: called with the number of rows that are newly written.
    """
    writer = TokenWriter(path, tokenizer_digest(tokenizer))
    with writer.file:
        for some in on_all_cores(partial(_encode_all, tokenizer), in_pieces(rows)):
            writer.add(*some)
            on_rows(some[1])


def in_pieces(rows: Iterable[Any]) -> Iterator[list[Any]]:
    """Lists of so many rows as a process takes at once."""
    rows = iter(rows)
    while some := list(islice(rows, ROWS_AT_ONCE)):
        yield some


def _encode_all(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> tuple[pyarrow.RecordBatch, int]:
    return batch_of(compact(encode(tokenizer, row)) for row in rows), len(rows)


def compact(sequences: Sequence[Encoded]) -> list[Encoded]:
    """With arrays for ids, which take an eighth of the memory of lists."""
    import numpy

    return [Encoded(numpy.array(each.ids, numpy.int32), each.spans) for each in sequences]


TEMPLATE_WITHOUT_TOOLS = "template without tools"
"""Why a row is refused that is fine itself."""


class Fault(NamedTuple):
    """A `RowError` as plain values."""

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
    sequences: list[Encoded] | Fault | None
    """None where nobody asked for them."""
    words: int
    """`number_of` its `plain_words`: equal for near duplicates."""
    is_long: bool
    """Whether it asks in `LONG_WORDS`."""
    judgement: int
    is_copy: bool
    """Whether it has a `copied_answer`."""


@dataclass
class RowNumbers:
    """What is kept in memory of each row that was read."""

    identity: list[bytes] = field(default_factory=list)
    asks: dict[int, tuple[bytes, ...]] = field(default_factory=dict)
    """Of conversations with several answers."""
    kind: bytearray = field(default_factory=bytearray)
    can_be_cut: bytearray = field(default_factory=bytearray)
    has_prompt: bytearray = field(default_factory=bytearray)
    waits: bytearray = field(default_factory=bytearray)
    """Whether it has an answer that is to be sampled."""
    characters: array[int] = field(default_factory=lambda: array("i"))
    """Of its JSON."""
    prompt_characters: array[int] = field(default_factory=lambda: array("i"))
    """Of its prompt's JSON."""
    tokens: array[int] = field(default_factory=lambda: array("i"))
    """Of the longest sequence of its exchanges."""
    prompt_tokens: array[int] = field(default_factory=lambda: array("i"))
    """Of its first exchange."""
    num_exchanges: array[int] = field(default_factory=lambda: array("i"))
    sequences: array[int] = field(default_factory=lambda: array("q", [0]))
    """Number of sequences before each row, and of all."""
    refused: dict[int, Fault] = field(default_factory=dict)
    """By the chat template."""
    words: array[int] = field(default_factory=lambda: array("q"))
    is_long: bytearray = field(default_factory=bytearray)
    judgement: array[int] = field(default_factory=lambda: array("q"))
    is_copy: bytearray = field(default_factory=bytearray)

    def __len__(self) -> int:
        return len(self.identity)

    def add(self, row: Examined) -> Sequence[Encoded]:
        """Append a row.

        Returns:
            Its sequences.
        """
        number, found = len(self), row.sequences or []
        if isinstance(found, Fault):
            self.refused[number] = found
            found = []
        if row.asks:
            self.asks[number] = row.asks
        own = found[: row.num_exchanges]
        self.identity.append(row.identity)
        self.kind.append(row.kind)
        self.can_be_cut.append(row.can_be_cut)
        self.has_prompt.append(row.prompt is not None)
        self.waits.append(any(not each.spans for each in own))
        self.characters.append(len(row.text))
        self.prompt_characters.append(len(row.prompt or ""))
        self.tokens.append(max((len(each.ids) for each in own), default=0))
        self.prompt_tokens.append(own[0].num_prompt if own else 0)
        self.num_exchanges.append(row.num_exchanges)
        self.sequences.append(self.sequences[-1] + len(found))
        self.words.append(row.words)
        self.is_long.append(row.is_long)
        self.judgement.append(row.judgement)
        self.is_copy.append(row.is_copy)
        return found

    def extend(self, other: RowNumbers) -> None:
        """Append others."""
        before, sequences = len(self), self.sequences[-1]
        self.asks.update((before + number, asks) for number, asks in other.asks.items())
        self.refused.update((before + number, refused) for number, refused in other.refused.items())
        self.sequences.extend(sequences + number for number in other.sequences[1:])
        self.identity += other.identity
        self.kind += other.kind
        self.can_be_cut += other.can_be_cut
        self.has_prompt += other.has_prompt
        self.waits += other.waits
        self.characters += other.characters
        self.prompt_characters += other.prompt_characters
        self.tokens += other.tokens
        self.prompt_tokens += other.prompt_tokens
        self.num_exchanges += other.num_exchanges
        self.words += other.words
        self.is_long += other.is_long
        self.judgement += other.judgement
        self.is_copy += other.is_copy


class Bad(NamedTuple):
    """A row that cannot be used."""

    where: str
    complaint: Fault
    raw: dict[str, Any] | None
    """As it stood in its source, if it was a row at all."""


class ExaminedPiece(NamedTuple):
    """Some rows of a source, as they travel between processes: in columns."""

    found: list[bytes | Bad]
    """In their order: the digest of each row that can be used, or what is wrong with it."""
    first: dict[str, Any] | None
    """The first of those that can be used, as it stood in the source."""
    numbers: RowNumbers
    """Of those that can be used, as the next two."""
    texts: pyarrow.RecordBatch
    """Row, prompt and where. Row and prompt are null where nobody asked for the row's sequences."""
    sequences: pyarrow.RecordBatch

    def where(self, number: int) -> str:
        """Where a row that can be used was found."""
        return str(self.texts["where"][number].as_py())


def text_schema() -> pyarrow.Schema:
    """Of a store's file of texts: each row's JSON, its prompt's, and where it was found."""
    import pyarrow

    return pyarrow.schema([(name, pyarrow.string()) for name in ("row", "prompt", "where")])


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

    def all(self) -> Iterator[ExaminedPiece]:
        """What every row of the source was found to be.

        Raises:
            ConfigError: the source as a whole cannot be read.
        """
        yield from on_all_cores(self._some, in_pieces(self.source.unread(self.role.key)))

    def _some(self, piece: Sequence[Unread]) -> ExaminedPiece:
        import pyarrow

        found: list[bytes | Bad] = []
        numbers, texts, sequences, first = RowNumbers(), [], [], None
        for where, content in piece:
            raw = self.source.read(content)
            try:
                if isinstance(raw, RowError):
                    raise raw
                row = self._one(raw)
            except RowError as error:
                complaint = Fault(error.reason, str(error))
                found.append(Bad(where, complaint, raw if isinstance(raw, dict) else None))
                continue
            first = first or raw
            found.append(row.digest)
            texts.append((*((row.text, row.prompt) if row.sequences is not None else (None, None)), where))
            sequences.append(numbers.add(row))
        empty = [pyarrow.array([], pyarrow.string())] * 3
        columns = [pyarrow.array(column, pyarrow.string()) for column in zip(*texts, strict=True)] or empty
        return ExaminedPiece(
            found,
            first,
            numbers,
            pyarrow.RecordBatch.from_arrays(columns, schema=text_schema()),
            batch_of(sequences),
        )

    def _one(self, raw: dict[str, Any]) -> Examined:
        row = self.role.parse(raw)
        text, prompt = row_to_json(row), row.exchanges()[0][0]
        is_asked = bool(prompt) and not calls_tools(prompt)  # nothing samples behind tools
        lent = checked_json(with_columns(prompt, raw)) if self.is_lent and is_asked else None
        # one prompt is one row, whatever its other columns hold
        alone = row_to_json(PromptRow(prompt)) if isinstance(row, PromptRow) else text
        digest = hashlib.sha256(alone.encode()).digest()[:16]
        if isinstance(row, TextRow):
            text = row_to_json(replace(row, source=self.source.name))
        words = plain_words(row.asked())
        turns = each_turn(row) if isinstance(row, SftRow) and row.turns > 1 else ()
        return Examined(
            text,
            lent,
            digest,
            bytes.fromhex(prompt_identity(row)),
            tuple(bytes.fromhex(prompt_identity(turn)) for turn in turns),
            next(kind for kind, row_type in enumerate(self.role.row_types) if isinstance(row, row_type)),
            len(row.exchanges()),
            isinstance(row, SftRow),
            self._sequences(row) if self.chosen is None or digest in self.chosen else None,
            number_of(words),
            len(words.split()) >= LONG_WORDS,
            judgement(row),
            copied_answer(row) is not None,
        )

    def _sequences(self, row: Row) -> list[Encoded] | Fault:
        from jinja2 import TemplateError

        try:
            return compact(encode(self.tokenizer, row))
        except TemplateError as error:  # some refuse a system turn, or two turns of one speaker
            text = f"the chat template refuses the conversation: {error}."
            is_fine = isinstance(row, SftRow) and row.uses_tools
            return Fault(TEMPLATE_WITHOUT_TOOLS if is_fine else "refused by template", text)
