"""Token ids of rows: made once, on all cores, and kept in an Arrow file that every rank maps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.data.arrow import ArrowWriter, mapped
from rlhf.data.chat_template import Encoded, encode, tokenizer_digest
from rlhf.data.cores import on_all_cores
from rlhf.data.schema import Row

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

ROWS_AT_ONCE = 500
"""Rows that a process encodes before it hands them over."""


class TokenIds:
    """The sequences of all rows of a file. In memory are numbers; ids are read when they are asked for."""

    def __init__(self, path: Path) -> None:
        table = mapped(path)
        self.tokenizer = table.schema.metadata[b"tokenizer"].decode()
        """`tokenizer_digest` of the tokenizer that made them."""
        self._table = table

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: int) -> NDArray[numpy.int32]:
        """The ids of a sequence, in the mapped file."""
        ids: NDArray[numpy.int32] = self._table["ids"][int(index)].values.to_numpy(zero_copy_only=True)
        return ids

    def encoded(self, index: int) -> Encoded:
        """A sequence with its spans."""
        return Encoded(
            self[index], self.spans[self.span_ends[index - 1] if index else 0 : self.span_ends[index]]
        )

    @cached_property
    def row(self) -> NDArray[numpy.int32]:
        """The row that each sequence is of."""
        return self._numbers(self._table["row"])

    @cached_property
    def lengths(self) -> NDArray[numpy.int32]:
        """Tokens of each sequence."""
        from pyarrow import compute

        return self._numbers(compute.list_value_length(self._table["ids"]))

    @cached_property
    def span_ends(self) -> NDArray[numpy.int64]:
        """How many spans the sequences up to and with each one have."""
        from pyarrow import compute

        found: NDArray[numpy.int64] = (
            self._numbers(compute.list_value_length(self._table["spans"])).cumsum() // 2
        )
        return found

    @cached_property
    def spans(self) -> NDArray[numpy.int32]:
        """(begin, end) of the answers of all sequences, one after the other: [spans, 2]."""
        from pyarrow import compute

        return self._numbers(compute.list_flatten(self._table["spans"])).reshape(-1, 2)

    def _numbers(self, column: Any) -> NDArray[numpy.int32]:
        found: NDArray[numpy.int32] = column.to_numpy()
        return found


class TokenWriter:
    """Writes the sequences of rows, row by row."""

    def __init__(self, path: Path, tokenizer: str) -> None:
        """Args:
        tokenizer: `tokenizer_digest` of the one that makes the ids.
        """
        import pyarrow

        numbers = pyarrow.list_(pyarrow.int32())
        columns = [("row", pyarrow.int32()), ("ids", numbers), ("spans", numbers)]
        self.file = ArrowWriter(path, pyarrow.schema(columns, {"tokenizer": tokenizer}))
        self._num_rows = 0

    def add(self, sequences: Iterable[Encoded]) -> None:
        """Append the next row's."""
        for ids, spans in sequences:
            flat = [place for span in spans for place in span]
            self.file.add({"row": self._num_rows, "ids": ids, "spans": flat})
        self._num_rows += 1


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
            for sequences in some:
                writer.add(sequences)
            on_rows(len(some))


def in_pieces(rows: Iterable[Any]) -> Iterator[list[Any]]:
    """Lists of so many rows as a process takes at once."""
    rows = iter(rows)
    while some := list(islice(rows, ROWS_AT_ONCE)):
        yield some


def _encode_all(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[list[Encoded]]:
    return [compact(encode(tokenizer, row)) for row in rows]


def compact(sequences: Sequence[Encoded]) -> list[Encoded]:
    """With arrays for ids: another process and Arrow take them much faster than lists."""
    import numpy

    return [Encoded(numpy.array(each.ids, numpy.int32), each.spans) for each in sequences]
