"""Why a stage runs: how it differs from the most similar artifact, in the user's own keys."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.data.prepared import PreparedData, role_digest
from rlhf.data.roles import Roles
from rlhf.disk import content_of

DIGEST = re.compile("[0-9a-f]{16,64}")


class Change(NamedTuple):
    """One part of a recipe that differs."""

    name: str
    """Its place in the recipe: `knobs.optim.lr`."""
    before: Any
    """None if it was not there."""
    after: Any


def changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[Change]:
    """What differs between two recipes."""
    for name in sorted({*old, *new}):
        before, after, key = old.get(name), new.get(name), f"{prefix}{name}"
        if isinstance(before, dict) and isinstance(after, dict):
            yield from changes(before, after, f"{key}.")
        elif before != after:
            yield Change(key, before, after)


def in_words(stage: str, differences: Sequence[Change] | None, store: Path, roles: Roles) -> str:
    """Changes in words, with the keys that the user types, and without digests.

    Args:
        differences: None if there is nothing to compare with.
        store: the store in which numbers of rows are looked up.
        roles: the roles of the config.
    """
    if differences is None:
        return "none was made before"
    return "; ".join(_in_words(stage, each, store, roles) for each in differences)


def _in_words(stage: str, change: Change, store: Path, roles: Roles) -> str:
    part, _, name = change.name.partition(".")
    if part == "knobs":
        return f"{stage}.{name}: {_typed(change.before)} -> {_typed(change.after)}"
    if not (_is_digest(change.before) or _is_digest(change.after)):
        return f"{change.name}: {_typed(change.before)} -> {_typed(change.after)}"
    key = roles[name].key if name in roles else name
    match part:
        case "data":
            before, after = (
                _num_rows(name, digest, store, roles) for digest in (change.before, change.after)
            )
            counts = "" if None in (before, after) else f", {before} -> {after}"
            return f"{key}: other rows{counts}"
        case "inputs":
            return f"made from another {name} ({change.before} -> {change.after})"
        case "model":
            return "model: another base model"
        case _:
            return f"{key or part}: other content"


def _num_rows(role: str, digest: str | None, store: Path, roles: Roles) -> int | None:
    """Number of rows in a role's prepared data with this digest; None if the store has no such data."""
    for path in (store / "prepare").glob("[!.]*/manifest.json") if digest else ():
        # skip an artifact that is being replaced, is damaged, or has no such role
        with suppress(OSError, ValueError, KeyError):
            if role_digest(role, roles[role], json.loads(content_of(path))["files"]) == digest:
                data = PreparedData(path.parent, roles=roles)
                return sum(data.size(role, split).rows for split in roles[role].splits)
    return None


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and DIGEST.fullmatch(value) is not None


def _typed(value: object) -> str:
    return "null" if value is None else str(value)
