"""What all commands of `python -m rlhf COMMAND [key=value ...]` have in common."""

from __future__ import annotations

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


def ask(question: str) -> bool:
    """Whether the user says yes; never where nobody can answer."""
    if not sys.stdin.isatty():
        return False
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
