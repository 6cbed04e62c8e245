"""Tables in Arrow files, which the system maps into memory: a process has in its own memory only what it
touches.

The files are Arrow streams, as the `datasets` library keeps them: `Dataset.from_file(path)` opens one. They
are written by pyarrow alone, because `datasets` adds fingerprints that depend on paths and times. So equal
rows give equal bytes.
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
"""Rows that are read or written together."""
PIECE_ITEMS = 1 << 23
"""Characters or token ids after which a piece ends before that: rows can be long."""

BUFFER_BYTES = 2**20
"""That are written together."""


class ArrowWriter:
    """Writes rows one after the other; in memory are those of one piece."""

    def __init__(self, path: Path, schema: pyarrow.Schema) -> None:
        """The columns whose values have a length must hold texts, bytes or lists."""
        import pyarrow

        self._schema = schema
        # by itself Arrow writes each buffer of each column apart, and each padding
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


def mapped(path: Path) -> pyarrow.Table:
    """The table in a file. Its columns lie in the file until they are read."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
        return stream.read_all()


def picked(
    table: pyarrow.Table, places: NDArray[numpy.integer[Any]], items: NDArray[numpy.integer[Any]]
) -> Iterator[pyarrow.RecordBatch]:
    """The rows at these places, which ascend, in the pieces that `ArrowWriter.add` would write.

    Args:
        items: of each of the rows, as `PIECE_ITEMS` counts them.
    """
    import numpy
    import pyarrow

    batches = table.to_batches()
    starts = numpy.cumsum([0, *(len(batch) for batch in batches)])
    ends = items.cumsum(dtype=numpy.int64)
    begin = 0
    while begin < len(places):
        before = ends[begin - 1] if begin else 0
        full = int(numpy.searchsorted(ends, before + PIECE_ITEMS)) + 1
        some = places[begin : min(begin + PIECE_ROWS, full)]
        begin += len(some)
        found = []
        first, last = numpy.searchsorted(starts, some[[0, -1]], side="right") - 1
        bounds = numpy.searchsorted(some, starts[first : last + 2])
        for number, (low, high) in enumerate(pairwise(bounds), first):
            if low < high:
                found.append(batches[number].take(pyarrow.array(some[low:high] - starts[number])))
        yield found[0] if len(found) == 1 else pyarrow.concat_batches(found)


def values(column: pyarrow.ChunkedArray, picked: Sequence[int]) -> Iterator[Any]:
    """A column's values at these places, in their order, as Python's values."""
    for start in range(0, len(picked), PIECE_ROWS):
        some = picked[start : start + PIECE_ROWS]
        if isinstance(some, range) and some.step == 1:
            yield from column.slice(some.start, len(some)).to_pylist()
        else:  # one by one, as `take` copies the whole column first
            for place in some:
                yield column[place].as_py()
