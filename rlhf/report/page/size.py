"""How large a page may get, and what is left out of it.

Sizes are bytes as they stand in the page: in JSON a `<` has six, in HTML four, and a Chinese character three.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Item = TypeVar("Item")

MOST_BYTES = 3_000_000
"""Of a page."""
LONGEST_TEXT = 4_000
"""Characters of a text; the rest is cut off."""
SMALLEST = 2**-6
"""The smallest limits that are tried, as a share of the usual ones."""


@dataclass(frozen=True)
class Limits:
    """How many bytes the parts of a page may have."""

    charts: int = 1_000_000
    """All charts, with their captions."""
    answers: int = 900_000
    """The answers, before and after."""
    rows: int = 250_000
    """The rows of a table, or the parts of a list."""
    characters: int = LONGEST_TEXT
    """Of a text that is not an answer."""

    def times(self, share: float) -> Limits:
        """A share of them."""
        return Limits(
            *(int(share * each) for each in (self.charts, self.answers, self.rows, self.characters))
        )


def fitting(make: Callable[[Limits], str], otherwise: Callable[[], str]) -> str:
    """A page with the largest limits with which it is small enough.

    Args:
        make: the page with given limits.
        otherwise: a page for what is too large with the smallest.
    """
    share = 1.0
    while share >= SMALLEST:
        text = make(Limits().times(share))
        if len(text.encode()) <= MOST_BYTES:
            return text
        share /= 2
    return otherwise()


def first_of(items: Iterable[Item], limit: int, size: Callable[[Item], int]) -> list[Item]:
    """The first items that together have no more than `limit` bytes."""
    found: list[Item] = []
    for item in items:
        limit -= size(item)
        if limit < 0:
            break
        found.append(item)
    return found


def embedded(data: Any) -> str:
    """JSON that can stand in a script element: nothing in it ends the element or a line."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def json_bytes(data: Any) -> int:
    """Of a value in the page's data, with the comma behind it."""
    return len(embedded(data).encode()) + 1


def html_bytes(texts: Sequence[str], each: int = 10) -> int:
    """Of texts in the page's elements, with `each` bytes of tags around one."""
    return sum(len(html.escape(text).encode()) + each for text in texts)


def clipped(text: str, most: int) -> str:
    """A text of at most so many characters; it says what was cut off."""
    return text if len(text) <= most else f"{text[:most]} ... ({len(text) - most:,} more characters)"
