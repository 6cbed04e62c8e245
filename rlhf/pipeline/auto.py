"""Replaces `auto` in keys that name data, before anything is checked.

Without data of the user's own, `auto` means the packaged demo (`demo.*`). As soon as one source is the user's
own, no packaged set is used unless the user names it: `auto` then means the prompts of the user's rows where
prompts are needed, and null elsewhere.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from itertools import islice
from typing import Any, NamedTuple

from rlhf.config import ConfigError, validated
from rlhf.data.roles import ROLES, Roles
from rlhf.data.sources import SourceConfig
from rlhf.models.start import directory_of, parse_model
from rlhf.pipeline.recipe import BEST_OF_N, kind_of

AUTO = "auto"
KEYS_WITHOUT_ROLE = ("compare.questions", "compare.corpus", "evaluate.corpus")
"""Keys that name data which `prepare` does not read."""


JUDGE = "reward@judge"
"""The second reward model, which judges the policies that learned from the first one."""
MIN_JUDGE_PAIRS = 1000
"""Fewest pairs of a source from which a share is set aside for the judge."""


class Resolved(NamedTuple):
    """A config without `auto`."""

    config: dict[str, Any]
    own: list[str]
    """The keys that name the user's own data."""
    notes: list[str]
    """Decisions for the user's data, one line each."""


def without_auto(config: Mapping[str, Any], roles: Roles, makers: Collection[str]) -> Resolved:
    """The composed config with a value for every key that is `auto`.

    Args:
        makers: names of the stages that make a policy.
    """
    resolved = copy.deepcopy(dict(config))
    keys = {name: role.key for name, role in roles.items()}
    own = [key for key in (*keys.values(), *KEYS_WITHOUT_ROLE) if is_own(_get(resolved, key), roles)]
    demo = {(keys | {"gold": "evaluate.gold"})[name]: value for name, value in resolved["demo"].items()}
    auto_keys = [key for key in demo if _get(resolved, key) == AUTO]
    for key in auto_keys:
        _set(resolved, key, _from_own_data(key, own, roles) if own else demo[key])
    for name in [name for name in resolved if kind_of(name) == "evaluate"]:
        _decide_policies(resolved[name], _get(resolved, "recipe.policies"), makers)
        if resolved[name].get("judge") == AUTO:
            resolved[name]["judge"] = None
    if _get(resolved, "compare.artifacts") == AUTO:
        init = str(_get(resolved, "evaluate.init"))
        compared = _compared_policies(init, _get(resolved, "recipe.policies"), makers)
        _set(
            resolved,
            "compare.artifacts",
            [name for name in compared if name not in ("base", "init", BEST_OF_N)],
        )
    notes = []
    if own and auto_keys:
        values = ", ".join(f"{key}={_get(resolved, key) or 'null'}" for key in auto_keys)
        notes.append(
            f"As you gave data of your own, auto became: {values}. No packaged set is used unless you name "
            "it, such as evaluate.retention=[samples:retention_sentences,samples:retention_questions]."
        )
    return Resolved(resolved, own, notes)


def with_judge(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
    """The config with `reward@judge` if `evaluate.judge=auto` means it, and the notes that the run prints."""
    key = next((each for each in ("reward.pairs", "dpo.data") if is_own(_get(config, each), ROLES)), None)
    has_gold = _get(config, "evaluate.gold") not in (None, AUTO)
    if (
        key is None
        or has_gold
        or _get(config, "evaluate.judge") != AUTO
        or not _has_enough_pairs(config, key)
    ):
        return config, []
    judged = copy.deepcopy(dict(config))
    judged["evaluate"]["judge"] = JUDGE.replace("reward", "learned")
    instances = judged["instances"] or {}
    # no gate on its accuracy, because the verdict judges that
    own = {"pairs": _get(config, key), "gates": {"accuracy_over_baseline": None}}
    judged["instances"] = instances | {JUDGE: own | instances.get(JUDGE, {})}
    share = _get(config, "prepare.judge_fraction")
    return judged, [
        f"No gold score is known, so {JUDGE} judges: it learns from {share:.0%} of the prompts of {key}, and "
        "nothing else does. evaluate.judge=null leaves it out."
    ]


def _has_enough_pairs(config: Mapping[str, Any], key: str) -> bool:
    """Whether a source has enough pairs for a judge. A source on the Hub counts as enough, because its rows
    may not be downloaded yet."""
    try:
        source = validated(SourceConfig, _get(config, key), key)
        rows = (
            MIN_JUDGE_PAIRS if source.hub is not None else len([*islice(source.unread(key), MIN_JUDGE_PAIRS)])
        )
    except ConfigError:  # the stage that reads the rows reports it
        return False
    return min(rows, source.limit or rows) >= MIN_JUDGE_PAIRS


def is_own(source: Any, roles: Roles) -> bool:
    """Whether a source, or one of a list, is the user's own: no packaged set, no rows of a stage or another
    key."""
    if isinstance(source, list):
        return any(is_own(each, roles) for each in source)
    if isinstance(source, Mapping):
        return source.get("samples") is None and source.get("stage") is None
    keys = [role.key for role in roles.values()]
    return source not in (None, AUTO, *keys) and not str(source).startswith(("samples:", "stage:"))


def _from_own_data(key: str, own: list[str], roles: Roles) -> str | None:
    """What `auto` means if some data are the user's own: for prompts, the key of rows that have prompts,
    `ppo.prompts` first; else None."""
    if key not in ("ppo.prompts", "evaluate.prompts"):
        return None
    lenders = [role.key for role in roles.values() if role.lends_prompts and role.key in own]
    return "ppo.prompts" if "ppo.prompts" in lenders else next(iter(lenders), None)


def _decide_policies(
    evaluate: dict[str, Any], recipe_policies: list[str] | None, makers: Collection[str]
) -> None:
    """Set the policies that a section of `evaluate` compares, and the one that its gates are about."""
    compared = _compared_policies(str(evaluate.get("init")), recipe_policies, makers)
    if evaluate.get("policies") == AUTO:
        evaluate["policies"] = compared
        if recipe_policies and evaluate.get("subject") == AUTO:
            evaluate["subject"] = compared[-1]
    if evaluate.get("subject") == AUTO:
        start_names = _compared_policies(str(evaluate.get("init")), None, makers)[:-1]
        evaluate["subject"] = _gate_subject(evaluate.get("policies"), start_names, compared)


def _compared_policies(init: str, recipe_policies: list[str] | None, makers: Collection[str]) -> list[str]:
    """The recipe's policies; without a recipe base, the start and PPO. A directory is called `init`.

    Args:
        init: the start: `base`, a stage or a directory.
    """
    has_own = directory_of(parse_model(init, makers)) is not None
    names = recipe_policies or ["base", init, "ppo"]
    return [*dict.fromkeys("init" if has_own and name == init else name for name in names)]


def _gate_subject(policies: Any, start_names: list[str], recipe_policies: list[str]) -> str:
    """The policy that evaluate's gates are about, whatever the order of the list.

    Args:
        policies: as the user wrote them; the check of the section reports it if that is no list.
        start_names: base, and the start.
        recipe_policies: the policies that the recipe compares.
    """
    named = policies if isinstance(policies, list) else []
    models = [name for name in named if "+" not in name and "/" not in name]  # asked the question alone
    others = [name for name in models if name not in (*start_names, BEST_OF_N)]
    if not others:
        if BEST_OF_N in named:
            return BEST_OF_N
        return next((name for name in reversed(start_names) if name in named), "ppo")
    known = [name for name in ("ppo", *reversed(recipe_policies)) if name in others]
    return str(others[0]) if len(others) == 1 else next(iter(known), "ppo")


def _get(config: Mapping[str, Any], key: str) -> Any:
    """A key's value; None if it is missing: the check of its section reports that."""
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _set(config: dict[str, Any], key: str, value: Any) -> None:
    """Set a key, and the same key of the stage's named instances if it is `auto` there."""
    *sections, name = key.split(".")
    copies = [each for each in config if each.startswith(f"{sections[0]}@")]
    for each in (sections[0], *copies):
        place = config[each]
        for section in sections[1:]:
            place = place[section]
        if each not in copies or place[name] == AUTO:
            place[name] = value
