"""Replaces `auto` in keys that name data, before anything is checked.

If no data are the user's, `auto` means the packaged demo (`demo.*`). If one source is the user's, no packaged
set is used unless the user names it: prompts are those of the user's rows, the rest is null.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

from rlhf.data.roles import ROLES
from rlhf.models.start import directory_of

AUTO = "auto"
NO_ROLE = ("compare.questions", "compare.corpus")
"""Keys that name data which `prepare` does not read."""


class Resolved(NamedTuple):
    """A config without `auto`."""

    config: dict[str, Any]
    own: list[str]
    """The keys that name the user's own data."""
    notes: list[str]
    """What was decided for the user's data, one line each."""


def without_auto(config: Mapping[str, Any]) -> Resolved:
    """The composed config with a value for every key that is `auto`."""
    found = copy.deepcopy(dict(config))
    keys = {name: role.key for name, role in ROLES.items()}
    own = [key for key in (*keys.values(), *NO_ROLE) if is_own(_get(found, key))]
    demo = {(keys | {"gold": "evaluate.gold"})[name]: value for name, value in found["demo"].items()}
    asked = [key for key in demo if _get(found, key) == AUTO]
    for key in asked:
        _set(found, key, _of_own(key, own) if own else demo[key])
    init = _get(found, "evaluate.init")
    has_own = directory_of(str(init)) is not None
    start = [*dict.fromkeys(["base", "init" if has_own else init, "ppo"])]
    policies = _get(found, "recipe.policies")
    named = ["init" if has_own and name == init else name for name in policies or start]
    of_recipe = [*dict.fromkeys(named)]
    if _get(found, "evaluate.policies") == AUTO:
        _set(found, "evaluate.policies", of_recipe)
        if policies and _get(found, "evaluate.subject") == AUTO:
            _set(found, "evaluate.subject", of_recipe[-1])
    if _get(found, "evaluate.subject") == AUTO:
        _set(found, "evaluate.subject", _subject(_get(found, "evaluate.policies"), start[:-1]))
    if _get(found, "compare.artifacts") == AUTO:
        _set(found, "compare.artifacts", [name for name in of_recipe if name not in ("base", "init")])
    notes = []
    if own and asked:
        taken = ", ".join(f"{key}={_get(found, key) or 'null'}" for key in asked)
        notes.append(
            f"Your own data: {taken}. No packaged set is used unless you name it, such as "
            "evaluate.retention=[samples:retention_sentences,samples:retention_questions]."
        )
    return Resolved(found, own, notes)


def is_own(source: Any) -> bool:
    """Whether a source, or one of a list, is the user's: no packaged set, and no other key's rows."""
    if isinstance(source, list):
        return any(map(is_own, source))
    if isinstance(source, Mapping):
        return source.get("samples") is None and source.get("stage") is None
    keys = [role.key for role in ROLES.values()]
    return source not in (None, AUTO, *keys) and not str(source).startswith(("samples:", "stage:"))


def _of_own(key: str, own: list[str]) -> str | None:
    """What `auto` means if some data are the user's: for prompts, the key of the rows that have them;
    `ppo.prompts` comes before all others."""
    if key not in ("ppo.prompts", "evaluate.prompts"):
        return None
    lenders = [role.key for role in ROLES.values() if role.lends_prompts and role.key in own]
    return "ppo.prompts" if "ppo.prompts" in lenders else next(iter(lenders), None)


def _subject(policies: Any, started: list[str]) -> str:
    """The policy that evaluate's gates are about, whatever the order of the list.

    Args:
        policies: as the user wrote them; if that is no list, it is told when they are checked.
        started: base, and what PPO started from.
    """
    named = policies if isinstance(policies, list) else []
    others = [name for name in named if name not in started]
    if not others:
        return next((name for name in reversed(started) if name in named), "ppo")
    return str(others[0]) if len(others) == 1 else "ppo"


def _get(config: Mapping[str, Any], key: str) -> Any:
    """A key's value; None if it is missing, which the check of its section reports."""
    found: Any = config
    for name in key.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _set(config: dict[str, Any], key: str, value: Any) -> None:
    """Set a key, and that of the stage's named instances which have no value of their own."""
    *sections, name = key.split(".")
    copies = [each for each in config if each.startswith(f"{sections[0]}@")]
    for each in (sections[0], *copies):
        place = config[each]
        for section in sections[1:]:
            place = place[section]
        if each not in copies or place[name] == AUTO:
            place[name] = value
