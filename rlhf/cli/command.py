"""What all commands of `python -m rlhf COMMAND [key=value ...]` have in common."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence

from rlhf.config import ConfigError, did_you_mean


def read(
    command: str, arguments: Sequence[str], known: Mapping[str, str], help_text: str
) -> dict[str, str] | None:
    """The values of `key=value ...`, with defaults for those that are not given.

    Args:
        known: key -> its default.

    Returns:
        None if the help was asked for: it is printed.

    Raises:
        ConfigError: a word that means nothing here.
    """
    if {"-h", "--help"} & {*arguments}:
        print(help_text, end="")
        return None
    found = dict(known)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key not in known or not equals or not value:
            near = did_you_mean(key, known)
            takes = " ".join(f"{name}=..." for name in known)
            raise ConfigError(f"{command} {argument}: it takes {takes}.{near}")
        found[key] = value
    return found


KEYED = re.compile(r"[a-z_]+=")


def read_words(
    command: str, arguments: Sequence[str], known: Mapping[str, str], help_text: str
) -> tuple[list[str], dict[str, str]] | None:
    """Like `read`, for a command that also takes words without a key, such as names of files.

    Returns:
        The words in their order, and the values of the keys.
    """
    words = [each for each in arguments if not (KEYED.match(each) or each.startswith("-"))]
    keys = read(command, [each for each in arguments if each not in words], known, help_text)
    return None if keys is None else (words, keys)


def ask(question: str) -> bool:
    """Whether the user says yes; never where nobody can answer."""
    if not sys.stdin.isatty():
        return False
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
