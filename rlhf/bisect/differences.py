"""How two runs differ in what can change a result: keys, rows, the base model, code, the seed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

from rlhf.config import Complaint, ConfigError
from rlhf.digests import Recipe
from rlhf.models.base import base_identity
from rlhf.pipeline.defaults import references, value_text
from rlhf.pipeline.experiment import Experiment
from rlhf.pipeline.fields import Mark, Rows, marked_fields
from rlhf.pipeline.graph import inputs, named_sources, own_roles, roles_of
from rlhf.pipeline.key import external_digests, knobs
from rlhf.pipeline.recipe import kind_of
from rlhf.pipeline.stage import Stage
from rlhf.pipeline.store import Store

Place = tuple[str, ...]
"""A key of a config, part by part."""
NAMING_MODEL = ("kind", "id", "revision", "path")
"""Keys of `model` that together name the model, and so are one difference."""
GLOBAL_KEYS = ("seed", "precision", "generation")
"""Keys outside the sections of the model and the stages that can change a result."""
MISSING = object()
"""Value of a key that one config lacks."""


class Difference(NamedTuple):
    """One difference between two runs."""

    name: str
    """The key as the user types it."""
    group: str
    """The stage, or other section of the config, that it belongs to."""
    values: Mapping[Place, tuple[Any, Any]]
    """Key -> its values in the good and in the bad run. Also keys that only repeat another key's value, such
    as `generate.max_new_tokens` that of PPO. Empty if only files or code differ."""
    touches: frozenset[str]
    """The stages that it changes directly."""
    lost: Literal["", "good", "bad"] = ""
    """The run whose files or code are no longer there."""

    @property
    def words(self) -> str:
        """Both values."""
        if not self.values:
            return "other content, same name"
        place, pair = next(iter(self.values.items()))
        missing = f"that of {kind_of(place[1])}" if place[0] == "instances" else "-"
        good, bad = (missing if each is MISSING else value_text(self.name, each) for each in pair)
        return f"{good} -> {bad}"


@dataclass(frozen=True)
class Side:
    """One of the two runs."""

    name: Literal["good", "bad"]
    experiment: Experiment
    """As its config builds it now."""
    recipes: Mapping[str, Recipe]
    """Stage -> the recipe of the run's artifact, if the run has one."""


def with_differences(config: Mapping[str, Any], differences: Iterable[Difference]) -> dict[str, Any]:
    """The good run's config with the bad run's values of these differences."""
    changed = copy.deepcopy(dict(config))
    for each in differences:
        for (*sections, name), (_, value) in each.values.items():
            place = changed
            for section in sections:
                place = place[section]
            if value is MISSING:
                del place[name]
            else:
                place[name] = copy.deepcopy(value)
    return changed


def differences(
    good: Side, bad: Side, store: Store, evaluation: str, judges: Collection[str]
) -> list[Difference]:
    """All differences that can change what is evaluated, in the order of the chain. How the runs are
    evaluated and judged is none.

    Args:
        evaluation: the stage that compares policies.
        judges: reward models that judge.

    Raises:
        ConfigError: files or code that both runs used, or that judge, are no longer there.
    """
    needed = {*good.experiment.needed(), *bad.experiment.needed()}
    fixed = {evaluation, kind_of(evaluation), *judges}
    found = with_lost(joined(of_keys(good, bad, needed, fixed)), (good, bad), store, needed, fixed)
    return [each for each in found if each.lost or not same_rows(good, bad, each.name)]


def of_keys(good: Side, bad: Side, needed: Set[str], fixed: Set[str]) -> Iterator[Difference]:
    """Keys with other values."""
    configs = good.experiment.resolved, bad.experiment.resolved
    all_stages = frozenset(needed - fixed)
    models = [each.experiment.settings.model.model_dump(mode="json") for each in (good, bad)]
    differing: dict[Place, Any] = {("model", name): _pair(models[0], models[1], name) for name in models[0]}
    differing |= {(name,): _pair(configs[0], configs[1], name) for name in GLOBAL_KEYS}
    differing = {place: pair for place, pair in differing.items() if pair[0] != pair[1]}
    naming = {place: pair for place, pair in differing.items() if place[-1] in NAMING_MODEL}
    if naming:
        yield Difference("model", "model", naming, all_stages)
    for place in [each for each in differing if each not in naming]:
        yield Difference(".".join(place), place[0], {place: differing[place]}, all_stages)
    readers = readers_of((good, bad), needed - fixed)
    in_order = [*good.experiment.stages, *bad.experiment.stages]
    names = (name for each in in_order if each in needed - fixed for name in (kind_of(each), each))
    sections = dict.fromkeys(names)
    for section in sections:
        stages = [
            each.experiment.stages[section] for each in (good, bad) if section in each.experiment.stages
        ]
        at = ("instances", section) if "@" in section else (section,)
        fields = {each.key: each for stage in stages for each in marked_fields(stage)}
        for key, pair in _leaves(_at(configs[0], at), _at(configs[1], at), fields):
            if len(stages) < 2 or can_matter(stages[0], stages[1], ".".join(key)):
                name = ".".join((section, *key))
                touched = {each for each in needed if section in (each, kind_of(each))}
                if (field := fields.get(".".join(key))) is not None and has_rows(field.marks):
                    touched |= {"prepare", *readers.get(name, ())}
                touches = all_stages if section == "prepare" else frozenset(touched)
                yield Difference(name, section, {(*at, *key): pair}, touches)
    for name, stages_of_role in readers.items():
        section, *rest = name.split(".")
        if section in sections:
            continue  # it is compared above
        place = ("instances", section, *rest) if "@" in section else (section, *rest)
        pair = _at(configs[0], place), _at(configs[1], place)
        if pair[0] != pair[1]:
            yield Difference(name, section, {place: pair}, frozenset({"prepare", *stages_of_role}))


def same_rows(good: Side, bad: Side, name: str) -> bool:
    """Whether a key named the same rows in both runs, perhaps in another file."""
    digests = [side.recipes.get("prepare", Recipe()).get("external", {}) for side in (good, bad)]
    entries = {role: each for side in (good, bad) for role, each in roles_of(side.experiment.stages).items()}
    roles = [role for role, each in entries.items() if each.key == name]
    read = [[own.get(role) for role in roles] for own in digests]
    return bool(roles) and None not in read[0] and read[0] == read[1]


def readers_of(sides: Iterable[Side], names: Set[str]) -> dict[str, set[str]]:
    """Key of rows, such as `reward.pairs` -> those of these stages that read the rows, also by another key:
    `dpo.data=null` reads `reward.pairs`, and `ppo.prompts=sft.data` the prompts of `sft.data`."""
    found: dict[str, set[str]] = {}
    for chain in (side.experiment.stages for side in sides):
        sources = named_sources(chain)
        for name in (each for each in chain if each in names):
            for own in own_roles(chain[name]):
                role: str | None = own
                while role is not None:
                    found.setdefault(sources.roles[role].key, set()).add(name)
                    role = sources.lender(role)
    return found


def _pair(good: Mapping[str, Any], bad: Mapping[str, Any], name: str) -> tuple[Any, Any]:
    return good.get(name, MISSING), bad.get(name, MISSING)


def _at(config: Mapping[str, Any], place: Place) -> Any:
    value: Any = config
    for name in place:
        value = value.get(name, MISSING)
    return value


def _leaves(good: Any, bad: Any, whole: Collection[str], at: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Places at which two sections differ, with both values. Keys in `whole`, and mappings with other keys,
    are compared as a whole."""
    if good == bad:
        return
    is_open = isinstance(good, Mapping) and isinstance(bad, Mapping) and ".".join(at) not in whole
    is_open = (
        is_open and (not at or good.keys() == bad.keys()) and good.get("_target_") == bad.get("_target_")
    )
    if not is_open:
        yield at, (good, bad)
        return
    for name in {**good, **bad}:
        yield from _leaves(*_pair(good, bad, name), whole, (*at, name))


def has_rows(marks: Iterable[Any]) -> bool:
    """Whether a field with these marks names rows."""
    return any(isinstance(mark, Rows) for mark in marks)


def can_matter(good: Stage, bad: Stage, key: str) -> bool:
    """Whether a differing key can change a stage's result: not if it is in no artifact's key, or if both
    values mean the same."""
    marked = [each for stage in (good, bad) for each in marked_fields(stage) if each.key == key]
    if len(marked) > 1 and (Mark.MODEL in marked[0].marks or has_rows(marked[0].marks)):
        return bool(marked[0].value != marked[1].value)
    return bool(_deepest(knobs(good), key) != _deepest(knobs(bad), key))  # None if it is in no key


def _deepest(values: Any, key: str) -> Any:
    for name in key.split("."):
        values = values.get(name) if isinstance(values, Mapping) else values
    return values


def joined(found: Iterable[Difference]) -> list[Difference]:
    """Keys that only repeat another key's value (`${ppo.init}`) are one difference with it."""
    known, together = references(), dict[tuple[str, str], list[Difference]]()
    for each in found:
        pair = repr(next(iter(each.values.values())))
        together.setdefault((known.get(each.name, each.name), pair), []).append(each)
    result = []
    for (name, _), members in together.items():
        first = next((each for each in members if each.name == name), members[0])
        others = [each for each in members if each is not first]
        # prepare.response_tokens, which repeats PPO's, leaves most rows as they are
        repeated = (each.touches if each.group != "prepare" else {"prepare"} for each in others)
        values = dict(first.values) | {at: pair for each in others for at, pair in each.values.items()}
        result.append(first._replace(values=values, touches=first.touches.union(*repeated)))
    return result


def with_lost(
    found: Iterable[Difference], sides: Iterable[Side], store: Store, needed: Set[str], fixed: Set[str]
) -> list[Difference]:
    """The differences; those whose files or code are gone are marked. Files and code that have changed under
    the same name are differences too.

    Raises:
        ConfigError: files or code that both runs used, or that judge, are no longer there.
    """
    lost: dict[str, Side] = {}
    stages: dict[str, set[str]] = {}
    for side in sides:
        for key, stage in gone(side, store, needed, fixed):
            judges = stage in fixed or key.partition(".")[0] in fixed
            if judges and side.name == "bad":
                continue
            if judges or lost.setdefault(key, side) is not side:
                used_by = "the good run, and it judges" if judges else "both runs"
                raise ConfigError(
                    Complaint(
                        key, f"its content is no longer that of {used_by}.",
                        "Put the earlier content back (relative paths begin in this directory), or run the "
                        "commands of both runs again.",
                    )
                )  # fmt: skip
            touched = {stage, key.partition(".")[0], *readers_of([side], needed - fixed).get(key, ())}
            stages.setdefault(key, set()).update(needed if key == "model" else touched & needed)
    by_name = {each.name: each for each in found}
    for key, side in lost.items():
        new = Difference(key, key.partition(".")[0], {}, frozenset(stages[key] - fixed))
        by_name[key] = by_name.get(key, new)._replace(lost=side.name)
    return [*by_name.values()]


def gone(side: Side, store: Store, needed: Set[str], fixed: Set[str]) -> Iterator[tuple[str, str]]:
    """The keys whose files or code are not those that the run used, each with its stage."""
    settings, chain = side.experiment.settings, side.experiment.stages
    weights = any(chain[name].reads_weights for name in side.recipes)
    identify = partial(base_identity, settings.model, weights=weights, memory=store.digest_cache)
    models = {each["model"] for each in side.recipes.values() if "model" in each}
    if models and models != {_unless_gone(identify)}:
        yield "model", "prepare"
    for name, recipe in side.recipes.items():
        if name == "prepare":  # one by one: a file that is missing says nothing of the others
            sources = named_sources(chain)
            keys = {*readers_of([side], needed - fixed)}
            roles = (
                role
                for role, entry in sources.roles.items()
                if entry.key in keys or entry.key.partition(".")[0] in needed
            )
            digests = {each: partial(sources.content_digest, each) for each in roles}
            now = {each: _unless_gone(read) for each, read in digests.items() if each not in sources.makers()}
            before = {label: digest for label, digest in recipe["external"].items() if label in now}
        else:
            now = _unless_gone(partial(external_digests, chain[name], chain, store.directory_digest)) or {}
            before = recipe["external"]
        yield from ((key_of(chain[name], label), name) for label in before if now.get(label) != before[label])


def _unless_gone(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except ConfigError:
        return None


def key_of(stage: Stage, label: str) -> str:
    """The key that names what has this label in `external_digests`."""
    if stage.name == "prepare" and label in stage.mount.roles:
        return stage.mount.roles[label].key
    for each in marked_fields(stage):
        if label in str(each.value) or (label == "init" and Mark.MODEL in each.marks):
            return f"{stage.name}.{each.key}"
    return f"{stage.name}.{label}"


def downstream(touched: Collection[str], chain: Mapping[str, Stage]) -> set[str]:
    """The stages that these differences change, directly or through what they read. Through `prepare` only
    directly: rows that stay the same change no stage."""
    changed = {*touched}
    for name in chain:  # each after those that it reads
        if {*inputs(chain[name], chain)} & (changed - {"prepare"}):
            changed.add(name)
    return changed
