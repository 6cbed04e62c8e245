"""The config as the command line composes it, and the experiment and stages that it builds."""

from __future__ import annotations

import re
from collections.abc import Collection
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf

import rlhf.conf
from rlhf.config import validated
from rlhf.data.mount import Mount
from rlhf.pipeline.experiment import Experiment, build_experiment
from rlhf.pipeline.stage import Stage

AnyStage = TypeVar("AnyStage", bound=Stage)


GROUPS = frozenset(path.name for path in Path(rlhf.conf.__path__[0]).iterdir() if path.is_dir())


def compose(*overrides: str, resolve: bool = True) -> dict[str, Any]:
    """What a run's config.yaml holds; unresolved, with what `${...}` says instead of its value."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    files = [str(each.input_line) for each in parsed if not _is_plain(each)]
    node = deepcopy(_composed(tuple(files)))
    for each in filter(_is_plain, parsed):
        OmegaConf.update(node, each.key_or_group, each.value(), merge=True)
    found = OmegaConf.to_container(node, resolve=resolve, throw_on_missing=True)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def _is_plain(override: Override) -> bool:
    """Whether it sets a value, and chooses no file."""
    first = re.split("[./]", override.key_or_group)[0]
    return override.type == OverrideType.CHANGE and first != "hydra" and override.key_or_group not in GROUPS


@cache  # Hydra reads thirty files, which took a third of the time of many a test
def _composed(chosen: tuple[str, ...]) -> DictConfig:
    with hydra.initialize_config_module("rlhf.conf", version_base="1.3"):
        return hydra.compose("config", overrides=list(chosen))


@cache
def _defaults(stage: str) -> dict[str, Any]:
    found: dict[str, Any] = compose()[stage]
    return {key: value for key, value in found.items() if key != "_target_"}


@cache
def _policies() -> Collection[str]:
    """The packaged stages that make a policy."""
    return build().stages["sft"].mount.policies


def build(*overrides: str) -> Experiment:
    """The experiment of these overrides."""
    return build_experiment(compose(*overrides))


def build_stage(kind: type[AnyStage], *overrides: str) -> AnyStage:
    """One of its stages."""
    return next(stage for stage in build(*overrides).stages.values() if type(stage) is kind)


def stage_with(kind: type[AnyStage], **changes: Any) -> AnyStage:
    """A stage with its defaults but for these, checked by itself."""
    name = kind.__module__.rpartition(".")[2]  # of a packaged one
    return validated(kind, _defaults(name) | changes, name, Mount(name, policies=_policies()))
