"""Tables in Arrow files that are mapped into memory: a process loads only the parts that it reads.

The files are Arrow streams, like those of the `datasets` library: `Dataset.from_file(path)` opens one. Only
pyarrow writes them, because `datasets` adds fingerprints that depend on paths and times. So equal rows give
equal bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import numpy
    import pyarrow
    from numpy.typing import NDArray

PIECE_ROWS = 1000
"""Most rows that are read or written at once."""
PIECE_ITEMS = 1 << 23
"""Characters or token ids after which a piece ends early, because rows can be long."""

BUFFER_BYTES = 2**20
"""Bytes written at once."""


class ArrowWriter:
    """Writes rows one after the other. The rows of one piece are in memory."""

    def __init__(self, path: Path, schema: pyarrow.Schema) -> None:
        """Each column holds texts, bytes, lists, or values without a length."""
        import pyarrow

        self._schema = schema
        # without the buffer, Arrow writes each column and each padding separately
        self._file = pyarrow.BufferedOutputStream(pyarrow.OSFile(str(path), "wb"), BUFFER_BYTES)
        self._stream = pyarrow.ipc.new_stream(self._file, schema)
        self._columns: dict[str, list[Any]] = {name: [] for name in schema.names}
        self._items = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._flush()
        self._stream.close()
        self._file.close()

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row."""
        for name, values in self._columns.items():
            values.append(row[name])
            self._items += len(row[name]) if hasattr(row[name], "__len__") else 1
        if len(next(iter(self._columns.values()))) == PIECE_ROWS or self._items >= PIECE_ITEMS:
            self._flush()

    def add_batch(self, batch: pyarrow.RecordBatch) -> None:
        """Append rows as one piece."""
        self._flush()
        self._stream.write_batch(batch)

    def _flush(self) -> None:
        import pyarrow

        if any(self._columns.values()):
            self._stream.write_batch(pyarrow.RecordBatch.from_pydict(self._columns, self._schema))
        self._columns = {name: [] for name in self._schema.names}
        self._items = 0


def map_table(path: Path) -> pyarrow.Table:
    """The table in a file. Its columns stay in the file until they are read."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
        return stream.read_all()


def pick_batches(
    table: pyarrow.Table, places: NDArray[numpy.integer[Any]], items: NDArray[numpy.integer[Any]]
) -> Iterator[pyarrow.RecordBatch]:
    """The rows at these ascending places, in the pieces that `ArrowWriter.add` would write.

    Args:
        items: characters or token ids of each of these rows, as `PIECE_ITEMS` counts them.
    """
    import numpy
    import pyarrow

    batches = table.to_batches()
    starts = numpy.cumsum([0, *(len(batch) for batch in batches)])
    ends = items.cumsum(dtype=numpy.int64)
    begin = 0
    while begin < len(places):
        items_before = ends[begin - 1] if begin else 0
        full = int(numpy.searchsorted(ends, items_before + PIECE_ITEMS)) + 1
        piece_places = places[begin : min(begin + PIECE_ROWS, full)]
        begin += len(piece_places)
        parts = []
        first, last = numpy.searchsorted(starts, piece_places[[0, -1]], side="right") - 1
        bounds = numpy.searchsorted(piece_places, starts[first : last + 2])
        for number, (low, high) in enumerate(pairwise(bounds), first):
            if low < high:
                parts.append(batches[number].take(pyarrow.array(piece_places[low:high] - starts[number])))
        yield parts[0] if len(parts) == 1 else pyarrow.concat_batches(parts)


def column_values(column: pyarrow.ChunkedArray, places: Sequence[int]) -> Iterator[Any]:
    """A column's values at these places, in this order, as Python values."""
    for start in range(0, len(places), PIECE_ROWS):
        chunk = places[start : start + PIECE_ROWS]
        if isinstance(chunk, range) and chunk.step == 1:
            yield from column.slice(chunk.start, len(chunk)).to_pylist()
        else:  # one by one, because `take` first copies the full column
            for place in chunk:
                yield column[place].as_py()
