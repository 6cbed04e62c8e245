"""The size limits of a page, and what is left out of it.

Sizes are bytes in the page: a `<` has six in JSON and four in HTML, a Chinese character has three.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Item = TypeVar("Item")

MAX_PAGE_BYTES = 3_000_000
"""Largest page, in bytes."""
MAX_TEXT_CHARS = 4_000
"""Most characters of a text; the rest is cut off."""
MIN_LIMIT_SHARE = 2**-6
"""Smallest limits that are tried, as a share of the default limits."""


@dataclass(frozen=True)
class Limits:
    """Most bytes of each part of a page."""

    charts: int = 1_000_000
    """All charts, with their captions."""
    answers: int = 900_000
    """All answers."""
    rows: int = 250_000
    """The rows of a table, or the items of a list."""
    characters: int = MAX_TEXT_CHARS
    """Most characters of a text that is not an answer."""

    def times(self, share: float) -> Limits:
        """These limits times a share."""
        return Limits(
            *(int(share * each) for each in (self.charts, self.answers, self.rows, self.characters))
        )


def fitting(make: Callable[[Limits], str], otherwise: Callable[[], str]) -> str:
    """The page with the largest limits for which it is small enough.

    Args:
        make: makes the page with given limits.
        otherwise: makes the page that replaces one that is too large even with the smallest limits.
    """
    share = 1.0
    while share >= MIN_LIMIT_SHARE:
        text = make(Limits().times(share))
        if len(text.encode()) <= MAX_PAGE_BYTES:
            return text
        share /= 2
    return otherwise()


def first_of(items: Iterable[Item], limit: int, size: Callable[[Item], int]) -> list[Item]:
    """The first items that together have no more than `limit` bytes."""
    kept: list[Item] = []
    for item in items:
        limit -= size(item)
        if limit < 0:
            break
        kept.append(item)
    return kept


def embedded(data: Any) -> str:
    """JSON for a script element: nothing in it ends the element or a line."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def json_bytes(data: Any) -> int:
    """Bytes of a value in the page's data, with the comma behind it."""
    return len(embedded(data).encode()) + 1


def html_bytes(texts: Sequence[str], each: int = 10) -> int:
    """Bytes of texts in the page's elements.

    Args:
        each: bytes of the tags around one text.
    """
    return sum(len(html.escape(text).encode()) + each for text in texts)


def clipped(text: str, most: int) -> str:
    """The first `most` characters of a text, and a note on how many were cut off."""
    return text if len(text) <= most else f"{text[:most]} ... ({len(text) - most:,} more characters)"
