"""A table as text, for the terminal and for files."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from rich.markup import escape
from rich.table import Table


class Cells(NamedTuple):
    """Headings and rows."""

    headings: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """As a Markdown table; a `|` in a cell ends none."""
        lines = [self.headings, ["---"] * len(self.headings), *self.rows]
        escaped = ([cell.replace("|", r"\|") for cell in line] for line in lines)
        return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def shown(cells: Cells, right: Collection[int] = ()) -> Table:
    """As a table of the terminal.

    Args:
        right: columns of numbers.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for index, heading in enumerate(cells.headings):
        table.add_column(heading, justify="right" if index in right else "left", no_wrap=index in right)
    for row in cells.rows:
        table.add_row(*(escape(cell) for cell in row))
    return table
