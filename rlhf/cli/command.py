"""Argument parsing shared by all commands of `python -m rlhf COMMAND [key=value ...]`."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence

from rlhf.config import ConfigError, did_you_mean


def read(
    command: str, arguments: Sequence[str], known: Mapping[str, str], help_text: str
) -> dict[str, str] | None:
    """Parse `key=value ...`; missing keys get their defaults.

    Args:
        known: key -> its default.

    Returns:
        The values of all keys; None if the user asked for help, which is then printed.

    Raises:
        ConfigError: an argument is no `key=value` with a known key.
    """
    if {"-h", "--help"} & {*arguments}:
        print(help_text, end="")
        return None
    values = dict(known)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key in known and equals and not value:
            raise ConfigError(f"{command} {argument}: the value is missing. Write it after the sign.")
        if key not in known or not equals:
            near = did_you_mean(key, known)
            usage = " ".join(f"{name}=VALUE" for name in known)
            raise ConfigError(f"{command} {argument}: it takes {usage}.{near}")
        values[key] = value
    return values


KEYED = re.compile(r"[a-z_]+=")


def read_words(
    command: str, arguments: Sequence[str], known: Mapping[str, str], help_text: str
) -> tuple[list[str], dict[str, str]] | None:
    """Like `read`, for a command that also takes words without a key, such as file names.

    Returns:
        The words in order, and the values of the keys; None after printing the help.
    """
    words = [each for each in arguments if not (KEYED.match(each) or each.startswith("-"))]
    keys = read(command, [each for each in arguments if each not in words], known, help_text)
    return None if keys is None else (words, keys)


def ask(question: str) -> bool:
    """Whether the user answers yes. Without a terminal: False."""
    if not sys.stdin.isatty():
        return False
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
