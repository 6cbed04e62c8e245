"""A table as text, for the terminal and for files."""

from __future__ import annotations

from typing import NamedTuple


class Cells(NamedTuple):
    """Headings and rows."""

    headings: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """As a Markdown table; a `|` in a cell ends none."""
        lines = [self.headings, ["---"] * len(self.headings), *self.rows]
        escaped = ([cell.replace("|", r"\|") for cell in line] for line in lines)
        return "\n".join(f"| {' | '.join(line)} |" for line in escaped)
