"""Removes secrets from text: values of secret environment variables and keys, and credentials in URLs.

This happens in two places. Config and recipes are redacted before they are written, which keeps their
structure. Everything that goes to stdout or stderr is redacted too: tracebacks, output of libraries and of
the user's code.
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

FILE_WIDTH = 10_000
"""Width of output that is no terminal, in characters: wide enough to fold no line."""
PLACEHOLDER = "<redacted>"
ENVIRONMENT_NAME = re.compile("KEY|TOKEN|SECRET|PASSWORD|(?:CREDS?|PAT|PASS|PASSWD|_PWD)$", re.I)
MIN_SECRET_CHARACTERS, MIN_NUMBER_CHARACTERS = 6, 8
"""Fewest characters of a secret in the environment; a number needs more. TOKENIZERS_PARALLELISM=false and
MAX_TOKENS=8192 are not secrets, and redacting their values would redact half of every file."""

KEY_NAME = re.compile(
    r"(?:^|[_.-])(?:password|passwd|passphrase|pwd|pass|pat|secret|cred|creds|credentials?|token)$"
    r"|[_-]key$|(?:api|access|private|secret)key$|(?-i:[A-Z](?:KEY|TOKEN|SECRET|PASSWORD|PASS|PAT|CREDS?)$)"
    r"|(?-i:[a-z](?:Token|Secret|Password)$)",
    re.I,
)
"""Matches the end of a key whose value is a secret. Plurals (max_tokens) are numbers, not secrets."""
PUBLIC_TOKEN_NAME = re.compile(r"(?:^|[_.-])(?:pad|eos|bos|unk|sep|cls|mask|per)_?token$", re.I)
USER_INFO = re.compile(r"(?<=://)[^\s/?#]+(?=@)")
"""user:password in a URL; or only the user, which is often the token."""
ASSIGNMENT = re.compile(r"(?:([?&])|(?<![\w.-]))([\w.-]+\\?)=")
"""`name=` in a URL's query or on a command line. A name starts at the start of a word. Trying every letter
would take quadratic time for long words without `=`."""
VALUE = re.compile(r"""("[^"]*"|'[^']*'|[^\s&#,'"}\]]+)""")
"""The value after `name=`."""
FIELD = re.compile(
    r"""(?<![\w.-])([\w.-]*(?:key|token|secret|password|passwd|passphrase|pwd|pass|pat|creds?|credentials?))"""
    r"""(\\*["']\s*:\s*|:[ \t]+)"""
    r"""(\\+"(?:(?!\\+").)*\\+"|"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^\s,;'"}\]\\]+)""",
    re.I,
)
"""`"name": "value"` in JSON, also inside a string; `name: value` in a header."""
LIKELY_SECRET = re.compile(r"\S*[\d_~+/=]|\S{20}")
"""Matches a likely secret after `password:`. In prose, words without digits and marks follow."""
CONSTANTS = ("null", "None", "true", "false", "True", "False")
AUTHORIZATION = re.compile(
    r"""(\bAuthorization["']?\s*[:=]\s*["']?[\w-]+\s+|\bBearer\s+(?=\S*[\d_~+/=]|\S{20}))[\w.~+/=-]{6,}""",
    re.I,
)
"""The value of an Authorization header. In prose, words without digits and marks follow "bearer"."""
HARMLESS_QUERY = re.compile(
    r"^(?:a|b|n|v|x|y|page|limit|offset|size|count|seed|top_?[kpn]|temperature|max_?\w*|min_?\w*|model|name|split"
    r"|subset|config|revision|version|api[-_]version|format|lang(?:uage)?|locale|mode|type|kind|task|stage|run|step"
    r"|sort|order|timeout|date|time|id|x-amz-(?:date|expires|algorithm|signedheaders))$",
    re.I,
)
"""Names in a URL's query whose value is shown. All others are redacted: ?code= and ?pw= are secrets."""


def redacted(value: Any) -> Any:
    """A config value or text with every secret replaced, also in the keys of mappings."""
    return _redacted(value, _environment_secrets())


def _redacted(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, str):
        return _redacted_text(value, secrets)
    if isinstance(value, Mapping):
        return {
            _redacted(key, secrets): PLACEHOLDER
            if is_secret_name(str(key)) and item is not None
            else _redacted(item, secrets)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_redacted(item, secrets) for item in value]
    return value


def redacted_text(text: str) -> str:
    """A text with every secret replaced."""
    return _redacted_text(text, _environment_secrets())


def _redacted_text(text: str, secrets: list[str]) -> str:
    text = USER_INFO.sub(PLACEHOLDER, _without(secrets, text))
    text = FIELD.sub(_without_field, AUTHORIZATION.sub(rf"\1{PLACEHOLDER}", text))
    return _without_values(text)


def without_environment_secrets(text: str) -> str:
    """The text with the values of secret environment variables replaced."""
    return _without(_environment_secrets(), text)


def _without(secrets: list[str], text: str) -> str:
    for secret in secrets:
        text = text.replace(secret, PLACEHOLDER)
    return text


def is_secret_name(key: str) -> bool:
    """Whether this name is of a secret value. Paths and `model:DIR` are not."""
    is_place = ":" in key or "/" in key
    return not is_place and KEY_NAME.search(key) is not None and PUBLIC_TOKEN_NAME.search(key) is None


def _without_field(found: re.Match[str]) -> str:
    name, colon, value = found.groups()
    is_prose = colon.startswith(":") and name.isalpha() and not LIKELY_SECRET.match(value)
    if not is_secret_name(name) or value in CONSTANTS or is_prose:
        return found[0]
    quotes = re.match(r"""\\*["']""", value)
    mark = quotes[0] if quotes else ""
    return f"{name}{colon}{mark}{PLACEHOLDER}{mark}"


def _without_values(text: str) -> str:
    """The text with values of secret names replaced, also in `a=token=v`."""
    parts, end = [], 0
    for found in ASSIGNMENT.finditer(text):
        word = found[2].removesuffix("\\")  # Hydra wants `=` in a value escaped
        is_unknown = bool(found[1]) and not HARMLESS_QUERY.match(word)
        if found.start() < end or not (is_secret_name(word) or is_unknown):
            continue
        if value := VALUE.match(text, found.end()):
            parts += [text[end : found.end()], PLACEHOLDER]
            end = value.end()
    return "".join([*parts, text[end:]])


def _environment_secrets() -> list[str]:
    """Secret values of the environment, in all forms that a text may have. The longest comes first, because
    one may be part of another."""
    forms: set[str] = set()
    for name, value in os.environ.items():
        if ENVIRONMENT_NAME.search(name) and not _is_path(value):
            for secret in (value, *value.splitlines()):  # a private key has several lines
                min_characters = MIN_NUMBER_CHARACTERS if _is_number(secret) else MIN_SECRET_CHARACTERS
                if len(secret.strip()) >= min_characters:
                    forms |= {secret, repr(secret)[1:-1], json.dumps(secret)[1:-1], quote(secret, safe="")}
    return sorted(forms, key=len, reverse=True)


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
    except (OSError, ValueError):  # too long for a path
        return False


class RedactingConsole(Console):
    """A rich console that removes secrets before it folds lines: `RedactingStream` would not find a secret
    that is cut in two. Control characters become visible.

    If the output is no terminal, no line is folded, tables are as wide as needed, and each line begins with
    the time of day.
    """

    has_times = True
    """Whether lines begin with the time if the output is no terminal. A report needs no times."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if not self.is_terminal:
            self.width = FILE_WIDTH

    def print(self, *objects: Any, **options: Any) -> None:
        """Print like rich. Put the time before a single text, unless it begins with an empty line."""
        if self.has_times and not self.is_terminal and len(objects) == 1 and isinstance(objects[0], str):
            (text,) = objects
            if text and not text.startswith("\n"):
                objects = (f"{datetime.now():%H:%M:%S} {text}",)
        super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        """Called when the output was closed. rich would end the process here."""
        raise BrokenPipeError

    def render_str(self, text: str, **options: Any) -> Text:
        """Render a string or a table's cell like rich, without secrets."""
        return super().render_str(printable(redacted_text(text)), **options)


class RedactingStream:
    """A text stream that removes secrets. A character that the encoding lacks becomes a question mark."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text without secrets."""
        encoding = self._stream.encoding or "utf-8"
        self._stream.write(redacted_text(text).encode(encoding, "replace").decode(encoding))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each line without secrets."""
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
