"""How two runs differ in what can change a result: keys, rows, the base model, code, the seed."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

from rlhf.config import Complaint, ConfigError
from rlhf.digests import Recipe
from rlhf.models.base import base_identity
from rlhf.pipeline.defaults import references, value_text
from rlhf.pipeline.experiment import Experiment
from rlhf.pipeline.fields import Mark, Rows, marked_fields
from rlhf.pipeline.graph import inputs, named_sources, own_roles
from rlhf.pipeline.key import external_digests, knobs
from rlhf.pipeline.recipe import kind_of
from rlhf.pipeline.stage import Stage
from rlhf.pipeline.store import Store

GLOBAL_KEYS = ("model", "seed", "precision", "generation")
"""Keys outside the stages' sections that can change a result."""
MODEL_SETTINGS = ("chat_template", "attention", "trust_remote_code")
"""Keys of `model` that do not name the model."""
MISSING = object()
"""Value of a key that one config lacks."""

Path = tuple[str, ...]
"""The place of a key in a config."""


class Difference(NamedTuple):
    """One difference between two runs."""

    name: str
    """The key as the user types it."""
    group: str
    """The stage, or other section of the config, that it belongs to."""
    values: Mapping[Path, tuple[Any, Any]]
    """Key -> its values in the good and in the bad run. The first names the difference, the others repeat
    it, such as `generate.max_new_tokens` that of PPO. Empty if only files or code differ."""
    touches: frozenset[str]
    """The stages that it changes directly."""
    lost: Literal["", "good", "bad"] = ""
    """The run whose files or code are no longer there."""

    @property
    def words(self) -> str:
        """Both values."""
        if not self.values:
            return "other content, same name"
        pair = next(iter(self.values.values()))
        good, bad = ("-" if each is MISSING else value_text(self.name, each) for each in pair)
        return f"{good} -> {bad}"


@dataclass(frozen=True)
class Side:
    """One of the two runs."""

    name: Literal["good", "bad"]
    experiment: Experiment
    """As its config builds it now."""
    recipes: Mapping[str, Recipe]
    """Stage -> the recipe of the run's artifact, if the run has one."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The resolved config."""
        return self.experiment.resolved


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
    fixed = {evaluation, kind_of(evaluation), *judges}
    needed = [*dict.fromkeys((*good.experiment.needed(), *bad.experiment.needed()))]
    found = joined([*_of_keys(good, bad, needed, fixed)])
    return [*_with_lost(found, good, bad, store, needed, fixed)]


def _of_keys(good: Side, bad: Side, needed: Collection[str], fixed: Set[str]) -> Iterator[Difference]:
    for key in GLOBAL_KEYS:
        pair = good.config[key], bad.config[key]
        if key == "model":
            settings = [{name: each.get(name) for name in MODEL_SETTINGS} for each in pair]
            named = [{name: each[name] for name in each if name not in MODEL_SETTINGS} for each in pair]
            own = [name for name in MODEL_SETTINGS if settings[0][name] != settings[1][name]]
            everything = frozenset(needed) - fixed
            if named[0] != named[1]:
                names = dict.fromkeys((*named[0], *named[1]))
                pairs = {name: _pair(*pair, name) for name in names}
                values: dict[Path, tuple[Any, Any]] = {
                    (key, name): each for name, each in pairs.items() if each[0] != each[1]
                }
                yield Difference(key, key, values, everything)
            for name in own:
                yield Difference(f"model.{name}", key, {("model", name): _pair(*pair, name)}, everything)
        elif pair[0] != pair[1]:
            chain = good.experiment.stages
            touched = (n for n in needed if n not in chain or chain[n].random or chain[n].samples)
            yield Difference(key, key, {(key,): pair}, frozenset(touched) - fixed)
    instances = [side.config["instances"] or {} for side in (good, bad)]
    for name in dict.fromkeys(kind for each in needed for kind in (kind_of(each), each)):
        if name in fixed:
            continue
        place = ("instances", name) if name in instances[0] or name in instances[1] else (name,)
        sides = [_at(side.config, place) for side in (good, bad)]
        for at, pair in _leaves(sides[0], sides[1], _whole_keys(good, bad, name)):
            if can_matter(good, bad, name, at):
                key = ".".join((name, *at))
                yield Difference(
                    key, name, {(*place, *at): pair}, _touched(good, bad, name, at, needed) - fixed
                )


def _pair(good: Mapping[str, Any], bad: Mapping[str, Any], name: str) -> tuple[Any, Any]:
    return good.get(name, MISSING), bad.get(name, MISSING)


def _at(config: Mapping[str, Any], place: Path) -> Any:
    value: Any = config
    for name in place:
        value = value.get(name, MISSING) if isinstance(value, Mapping) else MISSING
    return value


def _leaves(good: Any, bad: Any, wholes: Collection[str], at: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Places at which two sections differ, with both values. Keys in `wholes`, and mappings with other keys,
    are compared as a whole."""
    if good == bad:
        return
    both = isinstance(good, Mapping) and isinstance(bad, Mapping)
    target = [each.get("_target_") for each in (good, bad)] if both else []
    is_open = both and (not at or good.keys() == bad.keys()) and ".".join(at) not in wholes
    if not is_open or len({*target}) > 1:
        yield at, (good, bad)
        return
    for name in dict.fromkeys((*good, *bad)):
        yield from _leaves(*_pair(good, bad, name), wholes, (*at, name))


def _whole_keys(good: Side, bad: Side, name: str) -> set[str]:
    stages = [side.experiment.stages[name] for side in (good, bad) if name in side.experiment.stages]
    return {each.key for stage in stages for each in marked_fields(stage)}


def can_matter(good: Side, bad: Side, name: str, at: Path) -> bool:
    """Whether a differing key can change its stage's result: not if it is in no artifact's key, or if both
    values mean the same."""
    stages = [side.experiment.stages[name] for side in (good, bad) if name in side.experiment.stages]
    if not at or len(stages) < 2:
        return True
    marked = [each for stage in stages for each in marked_fields(stage) if each.key == ".".join(at)]
    if len(marked) == len(stages):
        marks = [mark for each in marked for mark in each.marks]
        if Mark.MODEL in marks or any(isinstance(mark, Rows) for mark in marks):
            return [marked[0].value] != [marked[1].value]
        if Mark.UNKEYED in marks or Mark.MEMORY in marks:
            return False
    values = [_deepest(knobs(stage), at) for stage in stages]
    return values[:1] != values[1:]


def _deepest(values: Any, at: Path) -> Any:
    """The value at this place, or the value that contains it; None if there is neither."""
    for name in at:
        if not isinstance(values, Mapping):
            return values
        values = values.get(name)
    return values


def _touched(good: Side, bad: Side, name: str, at: Path, needed: Collection[str]) -> frozenset[str]:
    """The stages whose result a key changes, without those that read them."""
    chain = good.experiment.stages if name in good.experiment.stages else bad.experiment.stages
    mounted = {each for each in needed if each == name or (kind_of(each) == name and "@" in each)}
    key = ".".join((name, *at))
    roles = {role for role, entry in chain[name].mount.roles.items() if entry.key == key}
    readers = {each for each in needed if each in chain and own_roles_of(chain, each)}
    if name == "prepare":
        return frozenset(mounted | readers)
    if roles:
        sources = named_sources(chain)
        roles |= {role for role in sources.roles if sources.lender(role) in roles}
        mounted |= {"prepare", *(each for each in readers if roles & own_roles_of(chain, each))}
    return frozenset(mounted)


def own_roles_of(chain: Mapping[str, Stage], name: str) -> set[str]:
    """The roles whose rows a stage reads."""
    return {*own_roles(chain[name])}


def joined(found: list[Difference]) -> list[Difference]:
    """Keys that only repeat another key's value (`${ppo.init}`) belong to that key's difference."""
    known = references()
    of_key = {each.name: each for each in found}
    leading: dict[str, list[Difference]] = {each.name: [] for each in found}
    for each in found:
        name, other = each.name, known.get(each.name)
        while other in of_key and _same_values(of_key[other], each):
            name, other = other, known.get(other)
        leading[name].append(each)
    return [
        of_key[name]._replace(
            values={at: pair for each in _first(of_key[name], members) for at, pair in each.values.items()},
            touches=frozenset().union(*(_repeated(each, each.name == name) for each in members)),
        )
        for name, members in leading.items()
        if members
    ]  # fmt: skip


def _first(leader: Difference, members: Iterable[Difference]) -> list[Difference]:
    return [leader, *(each for each in members if each is not leader)]


def _repeated(each: Difference, is_leader: bool) -> frozenset[str]:
    """What a key touches. `prepare.response_tokens`, which repeats PPO's, leaves most rows as they are."""
    return each.touches if is_leader or each.group != "prepare" else frozenset(["prepare"])


def _same_values(one: Difference, other: Difference) -> bool:
    return next(iter(one.values.values())) == next(iter(other.values.values()))


def _with_lost(
    found: list[Difference],
    good: Side,
    bad: Side,
    store: Store,
    needed: Collection[str],
    fixed: Set[str],
) -> Iterator[Difference]:
    """The differences, and those of files and code under the same name. What cannot be put back is marked."""
    lost: dict[str, set[Literal["good", "bad"]]] = {}
    of_stages: dict[str, set[str]] = {}
    for side in (good, bad):
        for key, stage, before, now in _contents(side, store, needed):
            if before == now or (side is bad and kind_of(key.partition(".")[0]) in fixed):
                continue
            if kind_of(stage) in fixed or key.partition(".")[0] in fixed:
                raise ConfigError(
                    Complaint(
                        key,
                        "it judges, and has changed since the good run.",
                        "Put the earlier content back, or run the good run's command again.",
                    )
                )
            lost.setdefault(key, set()).add(side.name)
            changed = needed if key == "model" else (stage, *_readers(good, key, needed))
            of_stages.setdefault(key, set()).update(changed)
    by_name = {each.name: each for each in found}
    for key, sides in lost.items():
        if len(sides) > 1:
            raise ConfigError(
                Complaint(
                    key,
                    "its content has changed since both runs, so neither can be repeated.",
                    "Put one of the earlier contents back, or run both commands again.",
                )
            )
        (name,) = sides
        if key in by_name:
            by_name[key] = by_name[key]._replace(lost=name)
        else:
            stages = frozenset(of_stages[key]) - {*fixed}
            by_name[key] = Difference(key, key.partition(".")[0], {}, stages, lost=name)
    yield from by_name.values()


def _readers(side: Side, key: str, needed: Collection[str]) -> Iterator[str]:
    """The stages that read the rows which this key names."""
    chain = side.experiment.stages
    for name in needed:
        if name in chain and any(chain[name].mount.roles[role].key == key for role in own_roles(chain[name])):
            yield name


def _contents(
    side: Side, store: Store, needed: Collection[str]
) -> Iterator[tuple[str, str, str, str | None]]:
    """Key, stage, and the digests of what it names: in the run, and now (None if it is gone)."""
    settings, chain = side.experiment.settings, side.experiment.stages
    weights = any(chain[name].reads_weights for name in needed if name in chain)
    identify = partial(base_identity, settings.model, weights=weights, memory=store.digest_cache)
    model = next((each["model"] for each in side.recipes.values() if "model" in each), None)
    if model is not None:
        yield "model", "", model, _known(identify)
    for name, recipe in side.recipes.items():
        if name not in chain:
            continue
        read = partial(external_digests, chain[name], chain, store.directory_digest)
        now = _known(read) or {}
        for label, before in recipe["external"].items():
            key = _key_of(chain[name], label, needed)
            if key is not None:
                yield key, name, before, now.get(label)


def _known(read: Any) -> Any:
    """What `read` gives; None if its files are gone."""
    try:
        return read()
    except ConfigError:
        return None


def _key_of(stage: Stage, label: str, needed: Collection[str]) -> str | None:
    """The key that names what has this label in `external_digests`. None for rows that no stage reads."""
    if stage.name == "prepare":
        entry = stage.mount.roles.get(label)
        if entry is None or entry.key.partition(".")[0] not in needed:
            return None
        return entry.key
    for each in marked_fields(stage):
        if label in str(each.value) or (label == "init" and Mark.MODEL in each.marks):
            return f"{stage.name}.{each.key}"
    return f"{stage.name}.{label}"


def downstream(touched: Collection[str], chain: Mapping[str, Stage]) -> set[str]:
    """The stages that these differences change, directly or through what they read. Through `prepare` only
    directly: unchanged rows change no stage."""
    changed = {*touched}
    for name in chain:  # in order
        if {each for each in inputs(chain[name], chain) if each != "prepare"} & changed:
            changed.add(name)
    return changed
