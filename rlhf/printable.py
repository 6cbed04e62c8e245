"""Text for people: control characters of data and answers made safe for a terminal; durations; quantities."""

from __future__ import annotations

import re

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Control characters except tab and newline, and characters that change the direction of writing."""


def printable(text: str) -> str:
    """The text with each control character written as in Python source: an escape becomes `\\x1b`."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def duration(seconds: float) -> str:
    """A rounded time: `350 ms`, `1.2 s`, `12 min`, `3.2 h`, `5.1 days`."""
    for unit, size, limit in (("ms", 1e-3, 0.9995), ("s", 1, 100), ("min", 60, 5400), ("h", 3600, 172_800)):
        if 0 < seconds < limit:
            return f"{_short(seconds / size)} {unit}"
    return f"{_short(seconds / 86_400)} days" if seconds else "0 s"


def quantity(count: float) -> str:
    """A rounded number: `850`, `32.8 thousand`, `1.2 million`, `70.6 billion`, `140 trillion`."""
    for word, size in ((" trillion", 1e12), (" billion", 1e9), (" million", 1e6), (" thousand", 1e3)):
        if count >= 0.9995 * size:  # three digits would round it up to `size`
            return f"{_short(count / size)}{word}"
    return _short(count)


def _short(value: float) -> str:
    """The value with three digits, or with all digits before the point."""
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"
