"""What must not be written down: secrets of the environment, values that are called one, credentials in URLs.

Two nets. Config and recipes are redacted before they are written, so that their structure survives. And all
that goes to stdout or stderr is redacted on its way, whoever wrote it: a traceback, a library, a user's code.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import quote

from rich.console import Console
from rich.text import Text

from rlhf.printable import printable

UNFOLDED = 10_000
"""Columns where no terminal folds a line."""
PLACEHOLDER = "<redacted>"
ENVIRONMENT_NAME = re.compile("KEY|TOKEN|SECRET|PASSWORD|(?:CREDS?|PAT|PASS|PASSWD|_PWD)$", re.I)
SHORTEST, SHORTEST_NUMBER = 6, 8
"""Characters of an environment's value. TOKENIZERS_PARALLELISM=false and MAX_TOKENS=8192 are no secrets, and
blanking them would blank half of every file."""

KEY_NAME = re.compile(
    r"(?:^|[_.-])(?:password|passwd|passphrase|pwd|pass|pat|secret|cred|creds|credentials?|token)$"
    r"|[_-]key$|(?:api|access|private|secret)key$|(?-i:[A-Z](?:KEY|TOKEN|SECRET|PASSWORD|PASS|PAT|CREDS?)$)"
    r"|(?-i:[a-z](?:Token|Secret|Password)$)",
    re.I,
)
"""The end of a key that says its value is a secret. Plurals (max_tokens) count something."""
NO_SECRET = re.compile(r"(?:^|[_.-])(?:pad|eos|bos|unk|sep|cls|mask|per)_?token$", re.I)
USER_INFO = re.compile(r"(?<=://)[^\s/?#]+(?=@)")
"""user:password of a URL. Without a password too: the user is often the token."""
ASSIGNMENT = re.compile(r"(?:([?&])|(?<![\w.-]))([\w.-]+\\?)=")
"""`name=` of a URL's query, or of a command line. A name begins where a word does: tried at each letter, long
words without `=` took time by the square of their length."""
VALUE = re.compile(r"""("[^"]*"|'[^']*'|[^\s&#,'"}\]]+)""")
"""What may follow."""
FIELD = re.compile(
    r"""(?<![\w.-])([\w.-]*(?:key|token|secret|password|passwd|passphrase|pwd|pass|pat|creds?|credentials?))"""
    r"""(\\*["']\s*:\s*|:[ \t]+)"""
    r"""(\\+"(?:(?!\\+").)*\\+"|"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^\s,;'"}\]\\]+)""",
    re.I,
)
"""`"name": "value"` of JSON, also within a string; `name: value` of a header."""
PROBABLE = re.compile(r"\S*[\d_~+/=]|\S{20}")
"""Prose has other words behind `password:`, without digits or marks."""
EMPTY = ("null", "None", "true", "false", "True", "False")
AUTHORIZATION = re.compile(
    r"""(\bAuthorization["']?\s*[:=]\s*["']?[\w-]+\s+|\bBearer\s+(?=\S*[\d_~+/=]|\S{20}))[\w.~+/=-]{6,}""",
    re.I,
)
"""A header's value. Prose has words behind "bearer", not digits or marks."""
QUERY_NAME = re.compile(r"^(?:key|sig|auth)$|signature$", re.I)
"""Further names of secrets, in a URL's query only."""


def redacted(value: Any) -> Any:
    """The same config value, or text, with every secret in it replaced; keys of mappings too."""
    if isinstance(value, str):
        return redacted_text(value)
    if isinstance(value, Mapping):
        return {
            redacted(key): PLACEHOLDER if says_secret(str(key)) and item is not None else redacted(item)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [redacted(item) for item in value]
    return value


def redacted_text(text: str) -> str:
    """A text without secrets."""
    text = USER_INFO.sub(PLACEHOLDER, without_environment(text))
    text = FIELD.sub(_without_field, AUTHORIZATION.sub(rf"\1{PLACEHOLDER}", text))
    return _without_values(text)


def without_environment(text: str) -> str:
    """A text without the values of variables of the environment whose names say that they are secret."""
    for secret in _environment_secrets():
        text = text.replace(secret, PLACEHOLDER)
    return text


def says_secret(key: str) -> bool:
    """Whether a key's own name says that its value is a secret; a place (`model:DIR`, a path) is no name."""
    is_place = ":" in key or "/" in key
    return not is_place and KEY_NAME.search(key) is not None and NO_SECRET.search(key) is None


def _without_field(found: re.Match[str]) -> str:
    name, colon, value = found.groups()
    is_prose = colon.startswith(":") and name.isalpha() and not PROBABLE.match(value)
    if not says_secret(name) or value in EMPTY or is_prose:
        return found[0]
    quotes = re.match(r"""\\*["']""", value)
    mark = quotes[0] if quotes else ""
    return f"{name}{colon}{mark}{PLACEHOLDER}{mark}"


def _without_values(text: str) -> str:
    """Without what is assigned to a secret's name; `a=token=v` too."""
    parts, end = [], 0
    for found in ASSIGNMENT.finditer(text):
        word = found[2].removesuffix("\\")  # Hydra wants `=` in a value escaped
        if found.start() < end or not (says_secret(word) or (found[1] and QUERY_NAME.search(word))):
            continue
        if value := VALUE.match(text, found.end()):
            parts += [text[end : found.end()], PLACEHOLDER]
            end = value.end()
    return "".join([*parts, text[end:]])


def _environment_secrets() -> list[str]:
    """Every form in which they may stand in a text, the longest first: one may be a part of another."""
    found: set[str] = set()
    for name, value in os.environ.items():
        if ENVIRONMENT_NAME.search(name) and not _is_path(value):
            for secret in (value, *value.splitlines()):  # a private key has several lines
                shortest = SHORTEST_NUMBER if _is_number(secret) else SHORTEST
                if len(secret.strip()) >= shortest:
                    found |= {secret, repr(secret)[1:-1], json.dumps(secret)[1:-1], quote(secret, safe="")}
    return sorted(found, key=len, reverse=True)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_path(text: str) -> bool:
    """Such as SSH_KEY_FILE=/home/me/.ssh/id: where a secret is, is none."""
    try:
        return text.startswith(("/", "./")) and Path(text).exists()
    except (OSError, ValueError):  # too long to be one
        return False


class RedactingConsole(Console):
    """Takes secrets out before a line is folded, which could tear one apart and hide it from the stream.
    Control characters are shown instead of being sent to the terminal.

    Off a terminal nothing is folded, tables take the width they need, and each line carries the time of day.
    """

    has_times = True
    """Whether lines off a terminal carry the time; a report that is read later needs none."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if not self.is_terminal:
            self.width = UNFOLDED

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich does; a single text that is not set apart by an empty line gets the time before it."""
        if self.has_times and not self.is_terminal and len(objects) == 1 and isinstance(objects[0], str):
            (text,) = objects
            if text and not text.startswith("\n"):
                objects = (f"{datetime.now():%H:%M:%S} {text}",)
        super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        """Nobody reads any more; rich would end the process itself."""
        raise BrokenPipeError

    def render_str(self, text: str, **options: Any) -> Text:
        """A string, or a table's cell, as rich renders it."""
        return super().render_str(printable(redacted_text(text)), **options)


class RedactingStream:
    """A text stream that leaves secrets out of what it passes on; a question mark stands for a character that
    the terminal does not have."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Pass on the text without secrets."""
        encoding = self._stream.encoding or "utf-8"
        self._stream.write(redacted_text(text).encode(encoding, "replace").decode(encoding))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Pass on each one without secrets."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def redacted_output() -> Iterator[None]:
    """While open, no secret of a known kind goes to stdout or stderr, whoever writes it. Also a decorator."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (RedactingStream(stream) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
