"""What of a stage decides its result: its knobs, and what it reads from outside the store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.config import in_user_keys
from rlhf.data.prepared import role_digest
from rlhf.data.sources import SourceConfig
from rlhf.digests import DirectoryDigest, Recipe, directory_digest
from rlhf.generation.vllm import VllmConfig
from rlhf.models.start import init_digest, init_in_key
from rlhf.pipeline.abilities import Records, TellsOfRuns
from rlhf.pipeline.fields import Function, Mark, Rows, marked
from rlhf.pipeline.graph import (
    inputs,
    made_roles,
    naming_keys,
    own_roles,
    reads_base_model,
    roles_of,
    starts_from,
)
from rlhf.pipeline.stage import Stage
from rlhf.pipeline.store import Artifact
from rlhf.rewards.code import imported_code, imported_object, own_code
from rlhf.rewards.kinds import reward_digest
from rlhf.tracking.redaction import redacted


class Surroundings(NamedTuple):
    """What of a run decides the results of its stages."""

    model: str
    """Identity of the base model."""
    seed: int
    dtype: str
    vllm: VllmConfig | None
    """None: the model itself samples."""
    run: Path
    """The run's directory."""


def recipe_of(
    stage: Stage,
    chain: Mapping[str, Stage],
    artifacts: Mapping[str, Artifact],
    external: Mapping[str, str],
    around: Surroundings,
) -> Recipe:
    """Everything that decides the artifact. Secrets are left out: a new password is no new model.

    Args:
        artifacts: finished ones, with those that the stage reads.
        external: its `external_digests`.
    """
    made = made_roles(stage, chain)
    recipe: Recipe = {
        "stage": stage.name,
        "version": stage.version,
        "knobs": knobs(stage),
        "external": external,
        "inputs": {name: artifacts[name].key for name in inputs(stage, chain) if name != "prepare"},
    }
    if roles := [*own_roles(stage)]:  # the content of the prepared sets, not the key of `prepare`
        files = artifacts["prepare"].manifest.files
        known = roles_of(chain)
        recipe["data"] = {role: role_digest(role, known[role], files) for role in roles if role not in made}
    if isinstance(stage, Records):
        recipe["recorded"] = stage.recorded(artifacts, external)
    if made:
        recipe["rows"] = _preparing(made, chain["prepare"])
    if reads_base_model(stage):
        recipe["model"] = around.model
    if stage.random:
        recipe["seed"] = around.seed
        recipe["dtype"] = around.dtype
    if stage.samples and around.vllm is not None:
        recipe["generation"] = "vllm"  # without: local, as in artifacts from before there was a choice
        if stage.is_timed:
            recipe["vllm"] = around.vllm.model_dump()
    if isinstance(stage, TellsOfRuns):  # each run makes its own, and must not replace another's
        recipe["run"] = str(around.run.resolve())
    found: Recipe = redacted(recipe)
    return found


def _preparing(made: Mapping[str, SourceConfig], prepare: Stage) -> dict[str, Any]:
    """What decides how made rows are split and checked."""
    sources = {role: source.model_dump(mode="json") for role, source in made.items()}
    return {"knobs": knobs(prepare), "version": prepare.version, "sources": sources}


def knobs(stage: Stage) -> dict[str, Any]:
    """The knobs that decide the result, as plain JSON values. Of a model's directory and of a source of rows
    the content decides, not the place."""
    found = stage.model_dump(mode="json", exclude={"gates", *stage.unkeyed()})
    for key, value, marks in marked(stage):
        *sections, name = key.split(".")
        place = found
        for section in sections:
            place = place[section]
        if {Mark.UNKEYED, Mark.MEMORY} & {*marks} or any(isinstance(each, Rows) for each in marks):
            place.pop(name, None)
        elif Mark.MODEL in marks and value is not None:
            place[name] = init_in_key(value)
    return found


def external_digests(
    stage: Stage, chain: Mapping[str, Stage], digest: DirectoryDigest = directory_digest
) -> dict[str, str]:
    """Digests of what lies outside the store and decides the result: the rewards and the user's models that
    the stage reads, its code if that is the user's, and what it names itself.

    Args:
        digest: takes those of directories; by default everything is read.
    """
    kind, found, reads = type(stage), dict[str, str](), stage.reads()
    with in_user_keys(naming_keys(stage), stage.name):
        for source in reads.rewards.values():
            found |= reward_digest(source, digest)
        for key, model in reads.models.items():
            name = digest_name(stage, key)
            found |= init_digest(
                f"{stage.name}.{key}", model, digest, name=name, policies=stage.mount.policies
            )
        for key, value, marks in marked(stage):
            is_function = any(isinstance(each, Function) for each in marks)
            if is_function and isinstance(value, str) and value.startswith("python:"):
                with in_user_keys({value: f"{stage.name}.{key}={value}"}):
                    imported_object(value)
                    found |= imported_code(value)
        return found | stage.external_digests(digest, chain) | own_code(kind.__module__, kind.__name__)


def digest_name(stage: Stage, key: str) -> str:
    """What the digest of a model that this key names is called in `external_digests`."""
    start = starts_from(stage)
    return "init" if start and key == start[0] else key


def digest_names(stage: Stage) -> Mapping[str, str]:
    """Value of a key that names a model -> what the digest of that model is called."""
    return {model: digest_name(stage, key) for key, model in stage.reads().models.items()}
