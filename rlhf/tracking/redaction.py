"""What must not be written down: secrets from the environment, values whose name says so, credentials in
URLs.

It happens in two places. Config and recipes are redacted before they are written, which keeps their
structure. Everything that goes to stdout or stderr is redacted too: tracebacks, output of libraries and of a
user's code.
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
"""Width of the output if it is not a terminal: no line is folded."""
PLACEHOLDER = "<redacted>"
ENVIRONMENT_NAME = re.compile("KEY|TOKEN|SECRET|PASSWORD|(?:CREDS?|PAT|PASS|PASSWD|_PWD)$", re.I)
SHORTEST, SHORTEST_NUMBER = 6, 8
"""A value in the environment that is shorter is not a secret. TOKENIZERS_PARALLELISM=false and
MAX_TOKENS=8192 are not secrets, and redacting their values would redact half of every file."""

KEY_NAME = re.compile(
    r"(?:^|[_.-])(?:password|passwd|passphrase|pwd|pass|pat|secret|cred|creds|credentials?|token)$"
    r"|[_-]key$|(?:api|access|private|secret)key$|(?-i:[A-Z](?:KEY|TOKEN|SECRET|PASSWORD|PASS|PAT|CREDS?)$)"
    r"|(?-i:[a-z](?:Token|Secret|Password)$)",
    re.I,
)
"""Ends of keys whose value is a secret. Plurals (max_tokens) are numbers, not secrets."""
NO_SECRET = re.compile(r"(?:^|[_.-])(?:pad|eos|bos|unk|sep|cls|mask|per)_?token$", re.I)
USER_INFO = re.compile(r"(?<=://)[^\s/?#]+(?=@)")
"""user:password in a URL, or the user alone, who is often the token."""
ASSIGNMENT = re.compile(r"(?:([?&])|(?<![\w.-]))([\w.-]+\\?)=")
"""`name=` in a URL's query or on a command line. A name starts at the start of a word. Trying every letter
would take quadratic time for long words without `=`."""
VALUE = re.compile(r"""("[^"]*"|'[^']*'|[^\s&#,'"}\]]+)""")
"""The value after it."""
FIELD = re.compile(
    r"""(?<![\w.-])([\w.-]*(?:key|token|secret|password|passwd|passphrase|pwd|pass|pat|creds?|credentials?))"""
    r"""(\\*["']\s*:\s*|:[ \t]+)"""
    r"""(\\+"(?:(?!\\+").)*\\+"|"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^\s,;'"}\]\\]+)""",
    re.I,
)
"""`"name": "value"` in JSON, also inside a string; `name: value` in a header."""
PROBABLE = re.compile(r"\S*[\d_~+/=]|\S{20}")
"""What looks like a secret after `password:`. In prose, words follow that have no digits or marks."""
EMPTY = ("null", "None", "true", "false", "True", "False")
AUTHORIZATION = re.compile(
    r"""(\bAuthorization["']?\s*[:=]\s*["']?[\w-]+\s+|\bBearer\s+(?=\S*[\d_~+/=]|\S{20}))[\w.~+/=-]{6,}""",
    re.I,
)
"""The value of a header. In prose, words without digits or marks follow "bearer"."""
HARMLESS_QUERY = re.compile(
    r"^(?:a|b|n|v|x|y|page|limit|offset|size|count|seed|top_?[kpn]|temperature|max_?\w*|min_?\w*|model|name|split"
    r"|subset|config|revision|version|api[-_]version|format|lang(?:uage)?|locale|mode|type|kind|task|stage|run|step"
    r"|sort|order|timeout|date|time|id|x-amz-(?:date|expires|algorithm|signedheaders))$",
    re.I,
)
"""Names in a URL's query whose value is shown. What others mean nobody knows: ?code= and ?pw= are secrets."""


def redacted(value: Any) -> Any:
    """The config value or text with every secret replaced, also in the keys of mappings."""
    return _redacted(value, _environment_secrets())


def _redacted(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, str):
        return _redacted_text(value, secrets)
    if isinstance(value, Mapping):
        return {
            _redacted(key, secrets): PLACEHOLDER
            if says_secret(str(key)) and item is not None
            else _redacted(item, secrets)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_redacted(item, secrets) for item in value]
    return value


def redacted_text(text: str) -> str:
    """A text without secrets."""
    return _redacted_text(text, _environment_secrets())


def _redacted_text(text: str, secrets: list[str]) -> str:
    text = USER_INFO.sub(PLACEHOLDER, _without(secrets, text))
    text = FIELD.sub(_without_field, AUTHORIZATION.sub(rf"\1{PLACEHOLDER}", text))
    return _without_values(text)


def without_environment(text: str) -> str:
    """The text without the values of environment variables whose names say that they are secret."""
    return _without(_environment_secrets(), text)


def _without(secrets: list[str], text: str) -> str:
    for secret in secrets:
        text = text.replace(secret, PLACEHOLDER)
    return text


def says_secret(key: str) -> bool:
    """Whether a key's name says that its value is a secret. Paths and `model:DIR` are not such names."""
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
    """The text without values assigned to the name of a secret, also in `a=token=v`."""
    parts, end = [], 0
    for found in ASSIGNMENT.finditer(text):
        word = found[2].removesuffix("\\")  # Hydra wants `=` in a value escaped
        is_unknown = bool(found[1]) and not HARMLESS_QUERY.match(word)
        if found.start() < end or not (says_secret(word) or is_unknown):
            continue
        if value := VALUE.match(text, found.end()):
            parts += [text[end : found.end()], PLACEHOLDER]
            end = value.end()
    return "".join([*parts, text[end:]])


def _environment_secrets() -> list[str]:
    """All forms of these secrets in a text. The longest comes first, because one may be part of another."""
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
    """Whether the value is a path, such as SSH_KEY_FILE=/home/me/.ssh/id. The path of a secret is not a
    secret."""
    try:
        return text.startswith(("/", "./")) and Path(text).exists()
    except (OSError, ValueError):  # too long to be one
        return False


class RedactingConsole(Console):
    """Removes secrets before a line is folded: the second filter would not find one that is cut in two.
    Control characters become visible.

    If the output is not a terminal, nothing is folded, tables are as wide as needed, and each line begins
    with the time of day.
    """

    has_times = True
    """Whether lines begin with the time if the output is not a terminal. A report needs no times."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if not self.is_terminal:
            self.width = UNFOLDED

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich does, with the time before a single text that does not begin with an empty line."""
        if self.has_times and not self.is_terminal and len(objects) == 1 and isinstance(objects[0], str):
            (text,) = objects
            if text and not text.startswith("\n"):
                objects = (f"{datetime.now():%H:%M:%S} {text}",)
        super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        """Nobody reads the output any more. rich would end the process here."""
        raise BrokenPipeError

    def render_str(self, text: str, **options: Any) -> Text:
        """A string, or a table's cell, as rich renders it."""
        return super().render_str(printable(redacted_text(text)), **options)


class RedactingStream:
    """A text stream that removes secrets. A character that the terminal does not have becomes a question
    mark."""

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
    """While open, no secret of a known kind goes to stdout or stderr. It also works as a decorator."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (RedactingStream(stream) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
