"""Token ids of rows: encoded once, on all cores, and stored in an Arrow file that every rank maps.

`Examiner` encodes the rows of a source and collects everything else that `prepare` needs of each row.
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

from rlhf.data.arrow import ArrowWriter, map_table, pick_batches
from rlhf.data.chat_template import Encoded, encode, tokenizer_digest
from rlhf.data.cores import on_all_cores
from rlhf.data.formats import checked_json, with_columns
from rlhf.data.schema import (
    MIN_LONG_WORDS,
    PromptRow,
    Row,
    RowError,
    SftRow,
    TextRow,
    asked_identities,
    calls_tools,
    copied_answer,
    judgement,
    plain_words,
    prompt_identity,
    row_to_json,
    text_hash,
)

if TYPE_CHECKING:
    import numpy
    import pyarrow
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from rlhf.data.roles import Role
    from rlhf.data.sources import SourceConfig, Unread

COLUMNS = ("row", "ids", "spans")
"""Columns of a file: the row of a sequence, its ids, and the (begin, end) of each answer in it."""
COMPARED_TOKENS = 64
"""Tokens of two sequences that are compared at once."""
ROWS_AT_ONCE = 500
"""Rows that a process encodes before it returns them."""


class TokenIds:
    """The sequences of all rows of a file. Ids are read from the file when they are accessed."""

    def __init__(self, path: Path) -> None:
        table = map_table(path)
        self.tokenizer = table.schema.metadata[b"tokenizer"].decode()
        """`tokenizer_digest` of the tokenizer that made the ids."""
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

    def shared_prefix(
        self, places: NDArray[numpy.int64], max_tokens: NDArray[numpy.int32]
    ) -> NDArray[numpy.int64]:
        """Number of first tokens that each sequence shares with the one before it.

        Args:
            places: indices of the sequences, ascending.
            max_tokens: per sequence, the number of first tokens to compare.
        """
        import numpy

        shared = numpy.zeros(len(places), numpy.int64)
        chunks = self.table["ids"].chunks
        starts = numpy.cumsum([0, *map(len, chunks)])
        bounds = numpy.searchsorted(places, starts)
        for chunk, (low, high), start in zip(chunks, pairwise(bounds), starts, strict=False):
            if low == high:
                continue
            ids, ends = chunk.values.to_numpy(zero_copy_only=True), chunk.offsets.to_numpy()
            begins, lengths = ends[places[low:high] - start], max_tokens[low:high]
            shared[low + 1 : high] = _shared_prefixes(ids, begins, lengths)
            if low:  # compare with the last one of an earlier chunk
                pair = [self[places[n]][: max_tokens[n]] for n in (low - 1, low)]
                joined = numpy.concatenate(pair)
                (shared[low],) = _shared_prefixes(
                    joined, numpy.array([0, len(pair[0])]), max_tokens[low - 1 : low + 1]
                )
        return shared

    @cached_property
    def row(self) -> NDArray[numpy.int32]:
        """The row number of each sequence."""
        return self._numbers(self.table["row"])

    @cached_property
    def lengths(self) -> NDArray[numpy.int32]:
        """Tokens of each sequence."""
        from pyarrow import compute

        return self._numbers(compute.list_value_length(self.table["ids"]))

    @cached_property
    def span_ends(self) -> NDArray[numpy.int64]:
        """Number of spans in all sequences up to each one, including it."""
        from pyarrow import compute

        ends: NDArray[numpy.int64] = (
            self._numbers(compute.list_value_length(self.table["spans"])).cumsum() // 2
        )
        return ends

    @cached_property
    def spans(self) -> NDArray[numpy.int32]:
        """(begin, end) of the answers of all sequences in order: [spans, 2]."""
        from pyarrow import compute

        return self._numbers(compute.list_flatten(self.table["spans"])).reshape(-1, 2)

    def _numbers(self, column: Any) -> NDArray[numpy.int32]:
        numbers: NDArray[numpy.int32] = column.to_numpy()
        return numbers


def _shared_prefixes(
    ids: NDArray[numpy.int32], begins: NDArray[numpy.integer[Any]], lengths: NDArray[numpy.int32]
) -> NDArray[numpy.int64]:
    """Number of first tokens that each sequence, from the second on, shares with the one before it.

    Args:
        begins: where each sequence begins in `ids`.
        lengths: tokens of each sequence to compare.
    """
    import numpy

    num_shared = numpy.zeros(len(begins) - 1, numpy.int64)
    max_shared = numpy.minimum(lengths[1:], lengths[:-1])
    open_pairs, columns = numpy.flatnonzero(max_shared), numpy.arange(COMPARED_TOKENS)
    while len(open_pairs):
        places = num_shared[open_pairs, None] + columns
        is_inside = places < max_shared[open_pairs, None]
        one, other = (
            ids[numpy.where(is_inside, begin[open_pairs, None] + places, 0)]
            for begin in (begins[:-1], begins[1:])
        )
        is_equal = is_inside & (one == other)
        num_equal = numpy.where(is_equal.all(1), COMPARED_TOKENS, is_equal.argmin(1))
        num_shared[open_pairs] += num_equal
        open_pairs = open_pairs[num_equal == COMPARED_TOKENS]
    return num_shared


def batch_of(rows: Iterable[Sequence[Encoded]]) -> pyarrow.RecordBatch:
    """The sequences of rows as columns: faster to send to another process and to write than lists."""
    import pyarrow

    numbered = [(number, *each) for number, sequences in enumerate(rows) for each in sequences]
    numbers, ids, spans = zip(*numbered, strict=True) if numbered else ((), (), ())
    flat = [[place for span in row_spans for place in span] for row_spans in spans]
    columns = [pyarrow.array(numbers, pyarrow.int32()), list_column(ids), list_column(flat)]
    return pyarrow.RecordBatch.from_arrays(columns, names=COLUMNS)


def list_column(lists: Sequence[Any]) -> pyarrow.ListArray:
    """A column of lists of int32 numbers."""
    import numpy
    import pyarrow

    ends = numpy.cumsum([0, *map(len, lists)], dtype=numpy.int32)
    arrays = [numpy.asarray(each, numpy.int32) for each in lists]
    items = numpy.concatenate(arrays) if arrays else numpy.array([], numpy.int32)
    return pyarrow.ListArray.from_arrays(pyarrow.array(ends), pyarrow.array(items))


class TokenWriter:
    """Writes the sequences of rows in batches."""

    def __init__(self, path: Path, tokenizer: str) -> None:
        """Args:
        tokenizer: `tokenizer_digest` of the tokenizer that makes the ids.
        """
        import pyarrow

        numbers = pyarrow.list_(pyarrow.int32())
        types = zip(COLUMNS, (pyarrow.int32(), numbers, numbers), strict=True)
        self.schema = pyarrow.schema([*types], {"tokenizer": tokenizer})
        self.file = ArrowWriter(path, self.schema)
        self._num_rows = 0

    def add(self, batch: pyarrow.RecordBatch, num_rows: int) -> None:
        """Append the sequences of the next `num_rows` rows. The batch numbers these from 0."""
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
            places: their indices in that file, ascending.
            rows: the row number of each sequence.
            prompts: per sequence, the number of first tokens to copy, as a prompt without an answer. None
                copies full sequences.
        """
        import numpy
        import pyarrow

        num_spans = numpy.diff(ids.span_ends, prepend=0)[places] if prompts is None else 0
        items = 1 + (ids.lengths[places] if prompts is None else prompts) + 2 * num_spans
        begin = 0
        for batch in pick_batches(ids.table, places, items):
            part = slice(begin, begin + len(batch))
            columns = [pyarrow.array(rows[part], pyarrow.int32()), *batch.columns[1:]]
            if prompts is not None:
                batch_ids, ends = columns[1].values.to_numpy(), columns[1].offsets.to_numpy()
                cut = zip(ends[:-1], prompts[part], strict=True)
                columns[1:] = (
                    list_column([batch_ids[start : start + length] for start, length in cut]),
                    list_column([[]] * len(batch)),
                )
            self.file.add_batch(pyarrow.RecordBatch.from_arrays(columns, schema=self.schema))
            begin = part.stop


def write_tokens(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Row],
    on_rows: Callable[[int], None] = lambda rows: None,
) -> None:
    """Encode rows on all cores, and write their ids.

    Args:
        on_rows: called after each batch with the number of its rows.
    """
    writer = TokenWriter(path, tokenizer_digest(tokenizer))
    with writer.file:
        for piece in on_all_cores(partial(_encode_all, tokenizer), in_pieces(rows)):
            writer.add(*piece)
            on_rows(piece[1])


def in_pieces(rows: Iterable[Any]) -> Iterator[list[Any]]:
    """Lists of at most `ROWS_AT_ONCE` rows."""
    rows = iter(rows)
    while piece := list(islice(rows, ROWS_AT_ONCE)):
        yield piece


def _encode_all(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> tuple[pyarrow.RecordBatch, int]:
    return batch_of(compact(encode(tokenizer, row)) for row in rows), len(rows)


def compact(sequences: Sequence[Encoded]) -> list[Encoded]:
    """The sequences with arrays for ids, which take an eighth of the memory of lists."""
    import numpy

    return [Encoded(numpy.array(each.ids, numpy.int32), each.spans) for each in sequences]


TEMPLATE_WITHOUT_TOOLS = "template without tools"
"""Reason to refuse a valid row: the template cannot show its tools."""


class Fault(NamedTuple):
    """A `RowError` as plain values."""

    reason: str
    text: str


class ExaminedRow(NamedTuple):
    """A valid row with everything that `prepare` needs of it. The chat template may still refuse it."""

    text: str
    """Its JSON."""
    prompt: str | None
    """JSON of the `PromptRow` for roles that use its prompt; None if it has no prompt or no role uses it."""
    digest: bytes
    """Digest of the row without the name of its source: equal for duplicates."""
    identity: bytes
    """`prompt_identity`."""
    asks: tuple[bytes, ...]
    """`asked_identities`, if they are several."""
    kind: int
    """Index of its type in the role's `row_types`."""
    num_exchanges: int
    can_be_cut: bool
    """Whether training may cut off the end of its answer."""
    sequences: list[Encoded] | Fault | None
    """Its sequences, or why the template refuses it; None if the row is not encoded."""
    words: int
    """`text_hash` of its `plain_words`: equal for near duplicates."""
    is_long: bool
    """Whether its prompt has at least `MIN_LONG_WORDS` words."""
    judgement: int
    is_copy: bool
    """Whether it has a `copied_answer`."""


@dataclass
class RowNumbers:
    """What stays in memory of each row that was read."""

    identity: list[bytes] = field(default_factory=list)
    asks: dict[int, tuple[bytes, ...]] = field(default_factory=dict)
    """Row number -> `ExaminedRow.asks`, for conversations of several messages."""
    kind: bytearray = field(default_factory=bytearray)
    can_be_cut: bytearray = field(default_factory=bytearray)
    has_prompt: bytearray = field(default_factory=bytearray)
    awaits_answer: bytearray = field(default_factory=bytearray)
    """Whether an answer to the row is to be sampled."""
    characters: array[int] = field(default_factory=lambda: array("i"))
    """Characters of the row's JSON."""
    prompt_characters: array[int] = field(default_factory=lambda: array("i"))
    """Characters of the prompt's JSON."""
    tokens: array[int] = field(default_factory=lambda: array("i"))
    """Tokens of the longest sequence of its exchanges."""
    prompt_tokens: array[int] = field(default_factory=lambda: array("i"))
    """Prompt tokens of its first exchange."""
    num_exchanges: array[int] = field(default_factory=lambda: array("i"))
    sequences: array[int] = field(default_factory=lambda: array("q", [0]))
    """Number of sequences before each row, and in total."""
    refused: dict[int, Fault] = field(default_factory=dict)
    """Row number -> why the chat template refuses it."""
    words: array[int] = field(default_factory=lambda: array("q"))
    is_long: bytearray = field(default_factory=bytearray)
    judgement: array[int] = field(default_factory=lambda: array("q"))
    is_copy: bytearray = field(default_factory=bytearray)

    def __len__(self) -> int:
        return len(self.identity)

    def add(self, row: ExaminedRow) -> Sequence[Encoded]:
        """Append a row.

        Returns:
            Its sequences.
        """
        number, sequences = len(self), row.sequences or []
        if isinstance(sequences, Fault):
            self.refused[number] = sequences
            sequences = []
        if row.asks:
            self.asks[number] = row.asks
        exchanges = sequences[: row.num_exchanges]
        self.identity.append(row.identity)
        self.kind.append(row.kind)
        self.can_be_cut.append(row.can_be_cut)
        self.has_prompt.append(row.prompt is not None)
        self.awaits_answer.append(any(not each.spans for each in exchanges))
        self.characters.append(len(row.text))
        self.prompt_characters.append(len(row.prompt or ""))
        self.tokens.append(max((len(each.ids) for each in exchanges), default=0))
        self.prompt_tokens.append(exchanges[0].num_prompt if exchanges else 0)
        self.num_exchanges.append(row.num_exchanges)
        self.sequences.append(self.sequences[-1] + len(sequences))
        self.words.append(row.words)
        self.is_long.append(row.is_long)
        self.judgement.append(row.judgement)
        self.is_copy.append(row.is_copy)
        return sequences

    def extend(self, other: RowNumbers) -> None:
        """Append the rows of another."""
        before, sequences = len(self), self.sequences[-1]
        self.asks.update((before + number, asks) for number, asks in other.asks.items())
        self.refused.update((before + number, refused) for number, refused in other.refused.items())
        self.sequences.extend(sequences + number for number in other.sequences[1:])
        self.identity += other.identity
        self.kind += other.kind
        self.can_be_cut += other.can_be_cut
        self.has_prompt += other.has_prompt
        self.awaits_answer += other.awaits_answer
        self.characters += other.characters
        self.prompt_characters += other.prompt_characters
        self.tokens += other.tokens
        self.prompt_tokens += other.prompt_tokens
        self.num_exchanges += other.num_exchanges
        self.words += other.words
        self.is_long += other.is_long
        self.judgement += other.judgement
        self.is_copy += other.is_copy


class BadRow(NamedTuple):
    """A row that cannot be used."""

    where: str
    complaint: Fault
    raw: dict[str, Any] | None
    """Its columns in the source; None if it could not be parsed."""


class ExaminedPiece(NamedTuple):
    """A piece of a source's rows, in columns that are sent between processes."""

    results: list[bytes | BadRow]
    """Per row, in order: the digest of a usable row, or what is wrong with it."""
    first: dict[str, Any] | None
    """The columns in the source of the first usable row."""
    numbers: RowNumbers
    """Numbers of the usable rows; `texts` and `sequences` hold the same rows."""
    texts: pyarrow.RecordBatch
    """Columns row, prompt and where. Row and prompt are null for a row that is not encoded."""
    sequences: pyarrow.RecordBatch

    def where(self, number: int) -> str:
        """The place of a usable row in its source."""
        return str(self.texts["where"][number].as_py())


def text_schema() -> pyarrow.Schema:
    """Schema of a store's text file: the JSON of each row and of its prompt, and its place in the source."""
    import pyarrow

    return pyarrow.schema([(name, pyarrow.string()) for name in ("row", "prompt", "where")])


@dataclass(frozen=True)
class Examiner:
    """Examines the rows of one source for one role."""

    role: Role
    source: SourceConfig
    tokenizer: PreTrainedTokenizerBase
    is_lent: bool
    """Whether another role uses the prompts of these rows."""
    chosen: Collection[bytes] | None = None
    """Digests of the rows to encode; None encodes all."""

    def all(self) -> Iterator[ExaminedPiece]:
        """All rows of the source, examined.

        Raises:
            ConfigError: the source cannot be read at all.
        """
        yield from on_all_cores(self._examine_piece, in_pieces(self.source.unread(self.role.key)))

    def _examine_piece(self, piece: Sequence[Unread]) -> ExaminedPiece:
        import pyarrow

        results: list[bytes | BadRow] = []
        numbers, texts, sequences, first = RowNumbers(), [], [], None
        for where, content in piece:
            raw = self.source.read(content)
            try:
                if isinstance(raw, RowError):
                    raise raw
                row = self._examine_row(raw)
            except RowError as error:
                complaint = Fault(error.reason, str(error))
                results.append(BadRow(where, complaint, raw if isinstance(raw, dict) else None))
                continue
            first = first or raw
            results.append(row.digest)
            texts.append((*((row.text, row.prompt) if row.sequences is not None else (None, None)), where))
            sequences.append(numbers.add(row))
        empty = [pyarrow.array([], pyarrow.string())] * 3
        columns = [pyarrow.array(column, pyarrow.string()) for column in zip(*texts, strict=True)] or empty
        return ExaminedPiece(
            results,
            first,
            numbers,
            pyarrow.RecordBatch.from_arrays(columns, schema=text_schema()),
            batch_of(sequences),
        )

    def _examine_row(self, raw: dict[str, Any]) -> ExaminedRow:
        row = self.role.parse(raw)
        text, prompt = row_to_json(row), row.exchanges()[0][0]
        has_prompt = bool(prompt) and not calls_tools(prompt)  # no stage samples after tools
        lent_prompt = checked_json(with_columns(prompt, raw)) if self.is_lent and has_prompt else None
        # rows with the same prompt are duplicates, whatever their other columns hold
        digest_text = row_to_json(PromptRow(prompt)) if isinstance(row, PromptRow) else text
        digest = hashlib.sha256(digest_text.encode()).digest()[:16]
        if isinstance(row, TextRow):
            text = row_to_json(replace(row, source=self.source.name))
        words = plain_words(row.asked())
        asks = asked_identities(row)
        return ExaminedRow(
            text,
            lent_prompt,
            digest,
            bytes.fromhex(prompt_identity(row)),
            tuple(map(bytes.fromhex, asks)) if len(asks) > 1 else (),
            next(kind for kind, row_type in enumerate(self.role.row_types) if isinstance(row, row_type)),
            len(row.exchanges()),
            isinstance(row, SftRow),
            self._sequences(row) if self.chosen is None or digest in self.chosen else None,
            text_hash(words),
            len(words.split()) >= MIN_LONG_WORDS,
            judgement(row),
            copied_answer(row) is not None,
        )

    def _sequences(self, row: Row) -> list[Encoded] | Fault:
        from jinja2 import TemplateError

        try:
            return compact(encode(self.tokenizer, row))
        except TemplateError as error:  # some refuse a system turn, or two turns of one role in a row
            text = f"the chat template refuses the conversation: {error}."
            is_fine = isinstance(row, SftRow) and row.uses_tools
            return Fault(TEMPLATE_WITHOUT_TOOLS if is_fine else "refused by template", text)
