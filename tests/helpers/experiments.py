"""The config as the command line composes it, and the experiment and stages that it builds."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

import hydra
from omegaconf import OmegaConf

from rlhf.config import validated
from rlhf.pipeline.experiment import Experiment, build_experiment
from rlhf.pipeline.stage import Stage

AnyStage = TypeVar("AnyStage", bound=Stage)


def compose(*overrides: str, resolve: bool = True) -> dict[str, Any]:
    """What a run's config.yaml holds; unresolved, with what `${...}` says instead of its value."""
    with hydra.initialize_config_module("rlhf.conf", version_base="1.3"):
        node = hydra.compose("config", overrides=list(overrides))
    found = OmegaConf.to_container(node, resolve=resolve, throw_on_missing=True)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


@cache
def _defaults(stage: str) -> dict[str, Any]:
    found: dict[str, Any] = compose()[stage]
    return {key: value for key, value in found.items() if key != "_target_"}


def build(*overrides: str) -> Experiment:
    """The experiment of these overrides."""
    return build_experiment(compose(*overrides))


def build_stage(kind: type[AnyStage], *overrides: str) -> AnyStage:
    """One of its stages."""
    found = build(*overrides).stages[kind.name]
    assert isinstance(found, kind)
    return found


def stage_with(kind: type[AnyStage], **changes: Any) -> AnyStage:
    """A stage with its defaults but for these, checked by itself."""
    return validated(kind, _defaults(kind.name) | changes, kind.name)
