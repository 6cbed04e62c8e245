"""Make text from data, templates, names and answers safe for a terminal: control characters become
visible."""

from __future__ import annotations

import re

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Control characters except tab and newline, and characters that change the direction of writing."""


def printable(text: str) -> str:
    """The text with each control character written as in Python source: an escape becomes `\\x1b`."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
