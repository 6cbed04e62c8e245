"""Which stage reads which: the order of the chain, and where a model or rows come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf.config import ConfigError, did_you_mean
from rlhf.data.preparation import Sources
from rlhf.data.roles import Roles
from rlhf.data.schema import PairRow
from rlhf.data.sources import SourceConfig
from rlhf.models.base import BaseModelFiles
from rlhf.models.start import directory_of, inputs_of
from rlhf.pipeline.fields import peft_of
from rlhf.pipeline.recipe import kind_of
from rlhf.pipeline.stage import Stage
from rlhf.rewards.kinds import RewardMix, keyed_parts, stage_of
from rlhf.tracking.redaction import redacted


def inputs(stage: Stage, chain: Mapping[str, Stage]) -> tuple[str, ...]:
    """The stages whose artifacts a stage reads."""
    reads = stage.reads()
    found = (
        *(("prepare",) if reads.roles else ()),
        *(name for model in reads.models.values() for name in inputs_of(model)),
        *(name for _, name in reads.policies),
        *row_makers(stage, chain),
        *scoring_stages(stage),
        *reads.stages,
    )
    return tuple(dict.fromkeys(found))


def scoring_stages(stage: Stage) -> Iterator[str]:
    """The inputs that make its scores: reward stages, and `generate` if it measures how to normalise them."""
    yield from filter(None, (stage_of(part.source) for _, part in keyed_parts(stage.reads().rewards)))
    if kind_of(stage.name) != "generate" and any(normalized_rewards(stage)):
        yield "generate"


def row_makers(stage: Stage, chain: Mapping[str, Stage]) -> tuple[str, ...]:
    """The stages whose rows a stage reads: see rlhf/pipeline/made_rows.py."""
    named = {role: named_source(chain, role) for role in own_roles(stage)}
    return tuple(dict.fromkeys(Sources(roles_of(chain), named).makers().values()))


def own_roles(stage: Stage) -> Iterator[str]:
    """The roles that a stage reads, by their names in `Mount.roles`."""
    return map(stage.mount.own_role, stage.reads().roles)


def preference_roles(stage: Stage) -> Iterator[str]:
    """The roles of the pairs that a stage learns from."""
    yield from (role for role in own_roles(stage) if PairRow in stage.mount.roles[role].row_types)


def normalized_rewards(stage: Stage) -> Iterator[tuple[str, RewardMix]]:
    """The rewards whose parts are normalised as `generate` measured them."""
    for key, source in stage.reads().rewards.items():
        if not isinstance(source, str) and source.normalize:
            yield key, source


def starts_from(stage: Stage) -> tuple[str, str] | None:
    """The key that names the model which a stage trains or samples from, without the stage's name, and its
    value (a stage, `base` or a directory); None if no key names one."""
    return next(iter(stage.reads().models.items()), None)


def init_directory(stage: Stage) -> Path | None:
    """The directory of the user's own model if a stage trains one, instead of the base or a stage's model."""
    start = starts_from(stage)
    return directory_of(start[1]) if start and peft_of(stage) is not None else None


def reads_base_model(stage: Stage) -> bool:
    """Whether the base model itself (not only a stage's output) decides the result."""
    reads = stage.reads()
    return reads.base or "base" in reads.models.values()


def root_of(key: str, init: str, chain: Mapping[str, Stage]) -> tuple[str, str]:
    """Where the training of a model began, over any number of stages: the key that says so, and `base` or a
    directory.

    Args:
        key: the key whose value is `init`: a stage that makes a policy, `base` or a directory.
    """
    while directory_of(init) is None and init in chain:
        name, start = init, starts_from(chain[init])
        key, init = (f"{name}.{start[0]}", start[1]) if start else (key, "base")
    return key, init


def sampled_models(stage: Stage, chain: Mapping[str, Stage]) -> Iterator[tuple[str, str]]:
    """The models that a stage samples from: a key, and where their training began (`base` or a directory)."""
    yield from (root_of(key, model, chain) for key, model in stage.reads().sampled)


def with_ancestors(name: str, chain: Mapping[str, Stage]) -> set[str]:
    """The names of a stage and of all stages that it is made from; empty if there is no such stage."""
    if name not in chain:
        return set()
    return {name}.union(*(with_ancestors(other, chain) for other in inputs(chain[name], chain)))


def naming_keys(stage: Stage, base: BaseModelFiles | None = None) -> dict[str, str]:
    """Directories and sources that a stage reads -> the settings that name them (`rlhf.config.in_user_keys`).

    Args:
        base: the base model's files, once they are known.
    """
    words: dict[str, str] = {}
    for key, part in keyed_parts(stage.reads().rewards):
        if ":" in part.source:  # a source without a colon may be an ordinary word in a message
            source = redacted(part.source)
            words.setdefault(source, f"{key}={source}")
            words.setdefault(part.source.removeprefix("model:"), f"{key}={source}")
    if (directory := init_directory(stage)) is not None:
        words[str(directory)] = f"{stage.name}.init={directory}"
    if base is not None:
        words.setdefault(str(base.directory), base.config.user_key)
    return words


def in_order(stages: Mapping[str, Stage]) -> dict[str, Stage]:
    """The stages, each after those that it reads, otherwise in the order of the config.

    Raises:
        ConfigError: a stage reads one that does not exist, or one that is made from it.
    """
    ordered: dict[str, Stage] = {}

    def visit(name: str, readers: tuple[str, ...]) -> None:
        if name in readers:
            circle = " reads ".join((*readers[readers.index(name) :], name))
            if readers[-1] == name:
                raise ConfigError(f"{name} reads itself, so it can never run. Let it read another stage.")
            raise ConfigError(
                f"{circle}: they read each other, so none can run first. Let one of them read another stage."
            )
        if name in ordered:
            return
        if name not in stages:
            add = (
                f"`{name}: {{}}` to `instances`"
                if "@" in name
                else f"`- stages@{name}: {name}` to the defaults"
            )
            raise ConfigError(
                f"{readers[-1]}: it reads {name}, and there is no such stage.{did_you_mean(name, stages)} "
                f"Add {add}, or let it read another stage."
            )
        for other in inputs(stages[name], stages):
            visit(other, (*readers, name))
        ordered[name] = stages[name]

    for name in stages:
        visit(name, ())
    return ordered


def made_roles(stage: Stage, chain: Mapping[str, Stage]) -> dict[str, SourceConfig]:
    """The roles of a stage whose rows another stage makes -> their source."""
    sources = named_sources(chain)
    known = sources.makers()
    made: dict[str, Any] = {name: sources.named[name] for name in own_roles(stage) if name in known}
    return made


def roles_of(chain: Mapping[str, Stage]) -> Roles:
    """The roles of the config to which these stages belong."""
    return next(iter(chain.values())).mount.roles


def named_sources(chain: Mapping[str, Stage]) -> Sources:
    """The source that each role's key names in the stages' configs.

    Raises:
        ConfigError: no stage has a role's key.
    """
    roles = roles_of(chain)
    return Sources(roles, {role: named_source(chain, role) for role in roles})


def named_source(chain: Mapping[str, Stage], role: str) -> Any:
    """The source that the key of one role names.

    Raises:
        ConfigError: no stage has the key.
    """
    key = roles_of(chain)[role].key
    section, *names = key.split(".")
    try:
        value: Any = chain[section]
        for name in names:
            value = dict(value)[name]
    except KeyError:
        raise ConfigError(
            f"{key}: the role {role} is read from there, and there is no such key. Add it to the stage, or "
            "change the role's key."
        ) from None
    return value
