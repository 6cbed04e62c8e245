"""Replaces `auto` in keys that name data, before anything is checked.

If no data are the user's, `auto` means the packaged demo (`demo.*`). If one source is the user's, no packaged
set is used unless the user names it: prompts are those of the user's rows, the rest is null.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from itertools import islice
from typing import Any, NamedTuple

from rlhf.config import ConfigError, validated
from rlhf.data.roles import ROLES, Roles
from rlhf.data.sources import SourceConfig
from rlhf.models.start import as_model, directory_of
from rlhf.pipeline.recipe import BEST_OF_N, kind_of

AUTO = "auto"
NO_ROLE = ("compare.questions", "compare.corpus")
"""Keys that name data which `prepare` does not read."""


JUDGE = "reward@judge"
"""The second reward model, which judges what learned from the first."""
ENOUGH = 1000
"""Pairs of which a share may be set aside for it."""


class Resolved(NamedTuple):
    """A config without `auto`."""

    config: dict[str, Any]
    own: list[str]
    """The keys that name the user's own data."""
    notes: list[str]
    """What was decided for the user's data, one line each."""


def without_auto(config: Mapping[str, Any], roles: Roles, makers: Collection[str]) -> Resolved:
    """The composed config with a value for every key that is `auto`.

    Args:
        makers: names of the stages that make a policy.
    """
    found = copy.deepcopy(dict(config))
    keys = {name: role.key for name, role in roles.items()}
    own = [key for key in (*keys.values(), *NO_ROLE) if is_own(_get(found, key), roles)]
    demo = {(keys | {"gold": "evaluate.gold"})[name]: value for name, value in found["demo"].items()}
    asked = [key for key in demo if _get(found, key) == AUTO]
    for key in asked:
        _set(found, key, _of_own(key, own, roles) if own else demo[key])
    for name in [name for name in found if kind_of(name) == "evaluate"]:
        _decide_policies(found[name], _get(found, "recipe.policies"), makers)
        if found[name].get("judge") == AUTO:
            found[name]["judge"] = None
    if _get(found, "compare.artifacts") == AUTO:
        init = str(_get(found, "evaluate.init"))
        compared = _compared(init, _get(found, "recipe.policies"), makers)
        _set(
            found, "compare.artifacts", [name for name in compared if name not in ("base", "init", BEST_OF_N)]
        )
    notes = []
    if own and asked:
        taken = ", ".join(f"{key}={_get(found, key) or 'null'}" for key in asked)
        notes.append(
            f"Your own data: {taken}. No packaged set is used unless you name it, such as "
            "evaluate.retention=[samples:retention_sentences,samples:retention_questions]."
        )
    return Resolved(found, own, notes)


def with_judge(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
    """The config with `reward@judge`, where `evaluate.judge=auto` means it; and what the run says of it."""
    key = next((each for each in ("reward.pairs", "dpo.data") if is_own(_get(config, each), ROLES)), None)
    has_gold = _get(config, "evaluate.gold") not in (None, AUTO)
    if key is None or has_gold or _get(config, "evaluate.judge") != AUTO or not _has_enough(config, key):
        return config, []
    found = copy.deepcopy(dict(config))
    found["evaluate"]["judge"] = JUDGE.replace("reward", "learned")
    instances = found["instances"] or {}
    own = {"pairs": _get(config, key), "gates": {"accuracy_over_baseline": None}}  # the verdict looks at it
    found["instances"] = instances | {JUDGE: own | instances.get(JUDGE, {})}
    share = _get(config, "prepare.judge_fraction")
    return found, [
        f"No gold score is known, so {JUDGE} judges: it learns from {share:.0%} of the prompts of {key}, and "
        "nothing else does. evaluate.judge=null leaves it out."
    ]


def _has_enough(config: Mapping[str, Any], key: str) -> bool:
    """Whether a source of pairs has rows for a judge. Those of the Hub, which may not be here yet, are taken
    to be enough."""
    try:
        source = validated(SourceConfig, _get(config, key), key)
        rows = ENOUGH if source.hub is not None else len([*islice(source.unread(key), ENOUGH)])
    except ConfigError:  # whatever reads the rows says so
        return False
    return min(rows, source.limit or rows) >= ENOUGH


def is_own(source: Any, roles: Roles) -> bool:
    """Whether a source, or one of a list, is the user's: no packaged set, and no other key's rows."""
    if isinstance(source, list):
        return any(is_own(each, roles) for each in source)
    if isinstance(source, Mapping):
        return source.get("samples") is None and source.get("stage") is None
    keys = [role.key for role in roles.values()]
    return source not in (None, AUTO, *keys) and not str(source).startswith(("samples:", "stage:"))


def _of_own(key: str, own: list[str], roles: Roles) -> str | None:
    """What `auto` means if some data are the user's: for prompts, the key of the rows that have them;
    `ppo.prompts` comes before all others."""
    if key not in ("ppo.prompts", "evaluate.prompts"):
        return None
    lenders = [role.key for role in roles.values() if role.lends_prompts and role.key in own]
    return "ppo.prompts" if "ppo.prompts" in lenders else next(iter(lenders), None)


def _decide_policies(evaluate: dict[str, Any], of_recipe: list[str] | None, makers: Collection[str]) -> None:
    """What a section of `evaluate` compares, and which of them its gates are about."""
    compared = _compared(str(evaluate.get("init")), of_recipe, makers)
    if evaluate.get("policies") == AUTO:
        evaluate["policies"] = compared
        if of_recipe and evaluate.get("subject") == AUTO:
            evaluate["subject"] = compared[-1]
    if evaluate.get("subject") == AUTO:
        started = _compared(str(evaluate.get("init")), None, makers)[:-1]
        evaluate["subject"] = _subject(evaluate.get("policies"), started, compared)


def _compared(init: str, of_recipe: list[str] | None, makers: Collection[str]) -> list[str]:
    """Base, the start and PPO; or the recipe's policies. A directory is called `init`.

    Args:
        init: the start.
    """
    has_own = directory_of(as_model(init, makers)) is not None
    names = of_recipe or ["base", init, "ppo"]
    return [*dict.fromkeys("init" if has_own and name == init else name for name in names)]


def _subject(policies: Any, started: list[str], of_recipe: list[str]) -> str:
    """The policy that evaluate's gates are about, whatever the order of the list.

    Args:
        policies: as the user wrote them; if that is no list, it is told when they are checked.
        started: base, and the start.
        of_recipe: what the recipe compares.
    """
    named = policies if isinstance(policies, list) else []
    others = [name for name in named if name not in (*started, BEST_OF_N)]
    if not others:
        if BEST_OF_N in named:
            return BEST_OF_N
        return next((name for name in reversed(started) if name in named), "ppo")
    known = [name for name in ("ppo", *reversed(of_recipe)) if name in others]
    return str(others[0]) if len(others) == 1 else next(iter(known), "ppo")


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
