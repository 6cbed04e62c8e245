"""Recipes, and named instances: one stage several times in a chain, such as `dpo@2`."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import PositiveInt

from rlhf.config import ConfigError, Strict, did_you_mean
from rlhf.data.roles import Roles

if TYPE_CHECKING:
    from rlhf.pipeline.stage import Stage

Keys = Mapping[str, Any]
INSTANCE_NAME = re.compile(r"(\w+)@(\w+)")
"""STAGE@LABEL."""
AT_SUBSTITUTE = "-at-"
"""Stands for `@` in keys of the command line, which Hydra could not read."""
BEST_OF_N = "best_of_n"
"""An entry of `evaluate.policies` that no stage makes: of several answers of PPO's start, the one with the
highest reward."""
FIRST_ROUND = re.compile(r"@1\b")


class RecipeConfig(Strict):
    """`recipe.*`: what `stage=all` means. `recipe=NAME` chooses one of conf/recipe/."""

    stages: list[str] | None
    """The stages that `stage=all` runs, with all stages that they read; null: the chain that the help
    names."""
    policies: list[str] | None
    """What `evaluate.policies=auto` compares, and `compare.artifacts=auto` without base; null: base, what PPO
    started from, and PPO."""
    rounds: PositiveInt
    """Number of rounds. Names with {round} are repeated for each round after the first; {before} is the
    number of the round before it."""
    sources: dict[str, str]
    """Keys of data that the recipe makes itself, and their sources. Any other source is refused, because the
    stage that makes the rows would not run."""


def kind_of(name: str) -> str:
    """The stage that a named instance runs: `dpo` of `dpo@2`; any other name is its own."""
    return name.partition("@")[0]


def last_evaluation(stages: Mapping[str, Mapping[str, Any]]) -> tuple[str, dict[str, float]]:
    """The last stage of a run that compared policies, and its metrics without its name.

    Args:
        stages: of the run's summary.

    Returns:
        `evaluate` and no metrics if no stage compared any.
    """
    for name, entry in reversed([*stages.items()]):
        if kind_of(name) == "evaluate" and entry.get("metrics"):
            return name, {
                metric.removeprefix(f"{name}/"): value for metric, value in entry["metrics"].items()
            }
    return "evaluate", {}


def hydra_argument(argument: str) -> str:
    """A command line argument such as `dpo@2.epochs=3` in a form that Hydra can read; any other is
    unchanged."""
    named = re.match(rf"\+{{0,2}}(?:instances\.)?{INSTANCE_NAME.pattern}\.([^=]+=)", argument)
    if named is None:
        return argument
    kind, label, key = named.groups()
    return f"++instances.{kind}{AT_SUBSTITUTE}{label}.{key}{argument[named.end() :]}"


def as_typed(text: str) -> str:
    """A text with its keys as the user typed them: the inverse of `hydra_argument`."""
    return re.sub(rf"\+\+instances\.(\w+){AT_SUBSTITUTE}", r"\1@", text)


def with_instances(config: Keys) -> dict[str, Any]:
    """The composed config with a section for every named instance: that of its stage, with its own keys. In
    the recipe, names with {round} are repeated for each round after the first.

    Raises:
        ConfigError: a name has the wrong form, or names no stage.
    """
    expanded = dict(config)
    rounds = config["recipe"]["rounds"]
    if not isinstance(rounds, int):  # the check of the section reports it
        return expanded
    lists = {key: config["recipe"][key] for key in ("stages", "policies")}
    expanded["recipe"] = config["recipe"] | {
        key: [*_each_round(names, rounds)] if isinstance(names, list) else names
        for key, names in lists.items()
    }
    expanded["instances"] = instances = _instances(config["instances"] or {}, rounds)
    for name, own in instances.items():
        _check_name(name, config)
        if not isinstance(own, dict):
            raise ConfigError(f"instances.{name}={own!r}: it must be a mapping of keys of {kind_of(name)}.")
        expanded[name] = _merged(config[kind_of(name)], own)
        gates = expanded[name].get("gates")
        if isinstance(gates, dict):
            _check_gates(name, gates, config[kind_of(name)]["gates"])
    return expanded


def with_own_roles(
    known: Roles, instances: Mapping[str, Keys], classes: Mapping[str, type[Stage]]
) -> tuple[Roles, dict[str, dict[str, str]]]:
    """The roles, and further ones for stages with sources of their own: named instances, and stages whose
    class is derived from that of another one.

    Args:
        classes: the classes of sections that are no named instances.

    Returns:
        All roles; and stage -> role -> the name of its own role.
    """
    own_roles: dict[str, dict[str, str]] = {name: {} for name in instances}
    all_roles = dict(known)
    for role, entry in known.items():
        section, _, key = entry.key.partition(".")
        own = [name for name, keys in instances.items() if section == kind_of(name) and _has_key(keys, key)]
        if section in classes:
            own += [name for name, kind in classes.items() if is_derived(kind, classes[section])]
        for name in own:
            roles = own_roles.setdefault(name, {})
            roles[role] = f"{role}@{name.partition('@')[2] or name}"
            all_roles[roles[role]] = replace(entry, key=f"{name}.{key}", metrics=())
    return all_roles, own_roles


def is_derived(kind: type[Stage], other: type[Stage]) -> bool:
    """Whether a stage's class is derived from that of another one."""
    return kind is not other and issubclass(kind, other)


def check_typed_instances(config: Keys, needed: Sequence[str]) -> None:
    """Refuse keys of the command line for an instance that does not run: its name is probably a typo.

    Args:
        config: as it was composed.

    Raises:
        ConfigError: it names the instances that there are.
    """
    rounds = config["recipe"]["rounds"]
    written = {name: own for name, own in (config["instances"] or {}).items() if AT_SUBSTITUTE not in name}
    known = _instances(written, rounds)
    for name in config["instances"] or {}:
        typed = name.replace(AT_SUBSTITUTE, "@")
        if AT_SUBSTITUTE in name and typed not in known and typed not in needed:
            there = f" There are: {', '.join(known)}." if known else ""
            raise ConfigError(
                f"{typed}: no stage of this run is called so, or reads it."
                f"{did_you_mean(typed, known)}{there} To run it, name it: stage={typed}."
            )


def check_recipe_sources(config: Keys, needed: Sequence[str]) -> None:
    """Refuse a source of the user's own in place of one that the recipe makes.

    Args:
        config: as it was composed.
        needed: the stages that run.

    Raises:
        ConfigError: it names both.
    """
    for key, source in config["recipe"]["sources"].items():
        section, _, name = key.partition(".")
        if name not in config.get(section, {}):
            raise ConfigError(f"recipe.sources: {key}: there is no such key. Write STAGE.KEY.")
        value = config[section][name]
        if section in needed and value != source:
            own = "null" if value is None else value
            raise ConfigError(
                f"{key}={own}: this recipe= makes these rows itself, by {key}={source}, and what makes them "
                f"would not run. Set {key}={source}, behind an experiment that sets it too; or leave recipe= "
                "out, to learn from rows that are there."
            )


def _instances(written: Mapping[str, Any], rounds: int) -> dict[str, Any]:
    """Instance -> its own keys. Keys of the command line override those of files."""
    instances: dict[str, Any] = {}
    for name, own in sorted(written.items(), key=lambda item: AT_SUBSTITUTE in item[0]):
        for number in range(2, rounds + 1) if "{round}" in name else (1,):
            instance = _in_round(name.replace(AT_SUBSTITUTE, "@"), number)
            instances[instance] = _merged(instances.get(instance, {}), _in_round(own, number))
    return instances


def _check_name(name: str, config: Keys) -> None:
    if INSTANCE_NAME.fullmatch(name) is None:
        raise ConfigError(
            f"instances.{name}: write STAGE@LABEL, such as dpo@2; a label has letters, digits and _. "
            "Rename it."
        )
    section = config.get(kind_of(name))
    if not (isinstance(section, dict) and "_target_" in section):
        stages = [key for key, value in config.items() if isinstance(value, dict) and "_target_" in value]
        near = did_you_mean(kind_of(name), stages)
        raise ConfigError(f"{name}: there is no stage {kind_of(name)}.{near} Known: {', '.join(stages)}.")


def _check_gates(name: str, gates: Keys, known: Keys) -> None:
    for gate, bound in gates.items():
        if gate not in known and isinstance(bound, dict) and "advice" not in bound:  # a typo, not a new gate
            raise ConfigError(f"{name}.gates.{gate}: there is no such gate.{did_you_mean(gate, known)}")


def _each_round(names: Sequence[Any], rounds: int) -> Iterator[Any]:
    for number in range(1, rounds + 1):
        for name in names:
            if ("{round}" in str(name)) == (number > 1):
                yield _in_round(name, number)


def _in_round(value: Any, number: int) -> Any:
    """The value, with this round's numbers filled into its texts."""
    if isinstance(value, dict):
        return {key: _in_round(each, number) for key, each in value.items()}
    if isinstance(value, list):
        return [_in_round(each, number) for each in value]
    if not isinstance(value, str) or not ("{round}" in value or "{before}" in value):
        return value
    text = value.replace("{round}", str(number)).replace("{before}", str(number - 1))
    return FIRST_ROUND.sub("", text)


def _merged(below: Any, above: Any) -> Any:
    """Merge mappings key by key; of other values take `above`."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return copy.deepcopy(above)
    return copy.deepcopy(below) | {key: _merged(below.get(key), value) for key, value in above.items()}


def _has_key(own: Any, key: str) -> bool:
    name, _, rest = key.partition(".")
    return isinstance(own, dict) and name in own and (not rest or _has_key(own[name], rest))
