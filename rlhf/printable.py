"""Text that a terminal shows instead of obeying: of data, templates, names and generated answers."""

from __future__ import annotations

import re

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Control characters but tab and newline, and those that change the direction of writing."""


def printable(text: str) -> str:
    """The same text, each control character written as Python would: an escape is `\\x1b`."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
