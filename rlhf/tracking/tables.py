"""Tables of text, for the terminal and for Markdown files."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from rich.markup import escape
from rich.table import Table


class Cells(NamedTuple):
    """A table's headings and rows."""

    headings: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """The table as Markdown. A `|` in a cell is escaped."""
        lines = [self.headings, ["---"] * len(self.headings), *self.rows]
        escaped = ([cell.replace("|", r"\|") for cell in line] for line in lines)
        return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def shown(cells: Cells, right: Collection[int] = ()) -> Table:
    """The table for a terminal.

    Args:
        right: indices of right-aligned columns, for numbers.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for index, heading in enumerate(cells.headings):
        table.add_column(heading, justify="right" if index in right else "left", no_wrap=index in right)
    for row in cells.rows:
        table.add_row(*(escape(cell) for cell in row))
    return table
