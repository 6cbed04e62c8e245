"""Keys of artifacts: everything that decides a stage's result, from its knobs to files outside the store."""

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
from rlhf.pipeline.fields import Function, Mark, Rows, marked_fields
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


class RunContext(NamedTuple):
    """Properties of a run that decide the results of its stages."""

    model: str
    """Identity of the base model."""
    seed: int
    dtype: str
    vllm: VllmConfig | None
    """vLLM's settings; None if the model itself samples."""
    run: Path
    """The run's directory."""


def recipe_of(
    stage: Stage,
    chain: Mapping[str, Stage],
    artifacts: Mapping[str, Artifact],
    external: Mapping[str, str],
    context: RunContext,
) -> Recipe:
    """Everything that decides the artifact. Secrets are left out: a new password is no new model.

    Args:
        artifacts: finished ones, among them those that the stage reads.
        external: the stage's `external_digests`.
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
        recipe["rows"] = _preparation_recipe(made, chain["prepare"])
    if reads_base_model(stage):
        recipe["model"] = context.model
    if stage.random:
        recipe["seed"] = context.seed
        recipe["dtype"] = context.dtype
    if stage.samples and context.vllm is not None:
        recipe["generation"] = "vllm"  # no entry is local: the keys of older artifacts have none
        if stage.is_timed():
            recipe["vllm"] = context.vllm.model_dump()
    if isinstance(stage, TellsOfRuns):  # each run makes its own, and must not replace another's
        recipe["run"] = str(context.run.resolve())
    without_secrets: Recipe = redacted(recipe)
    return without_secrets


def _preparation_recipe(made: Mapping[str, SourceConfig], prepare: Stage) -> dict[str, Any]:
    """Everything that decides how rows of another stage are split and checked."""
    sources = {role: source.model_dump(mode="json") for role, source in made.items()}
    return {"knobs": knobs(prepare), "version": prepare.version, "sources": sources}


def knobs(stage: Stage) -> dict[str, Any]:
    """The knobs that decide the result, as plain JSON values. Paths of model directories and sources of rows
    are left out, because their content decides."""
    values = stage.model_dump(mode="json", exclude={"gates", *stage.unkeyed()})
    for key, value, marks in marked_fields(stage):
        *sections, name = key.split(".")
        place = values
        for section in sections:
            place = place[section]
        if {Mark.UNKEYED, Mark.MEMORY} & {*marks} or any(isinstance(each, Rows) for each in marks):
            place.pop(name, None)
        elif Mark.MODEL in marks and value is not None:
            place[name] = init_in_key(value)
    return values


def external_digests(
    stage: Stage, chain: Mapping[str, Stage], digest: DirectoryDigest = directory_digest
) -> dict[str, str]:
    """Digests of everything outside the store that decides the result: the rewards and the user's models that
    the stage reads, its code if that is the user's, and what the stage adds itself.

    Args:
        digest: computes the digest of a directory; by default it reads all files.
    """
    kind, digests, reads = type(stage), dict[str, str](), stage.reads()
    with in_user_keys(naming_keys(stage), stage.name):
        for source in reads.rewards.values():
            digests |= reward_digest(source, digest)
        for key, model in reads.models.items():
            name = digest_name(stage, key)
            digests |= init_digest(
                f"{stage.name}.{key}", model, digest, name=name, policies=stage.mount.policies
            )
        for key, value, marks in marked_fields(stage):
            is_function = any(isinstance(each, Function) for each in marks)
            if is_function and isinstance(value, str) and value.startswith("python:"):
                with in_user_keys({value: f"{stage.name}.{key}={value}"}):
                    imported_object(value)
                    digests |= imported_code(value)
        return digests | stage.external_digests(digest, chain) | own_code(kind.__module__, kind.__name__)


def digest_name(stage: Stage, key: str) -> str:
    """The name in `external_digests` of the digest of the model that this key names."""
    start = starts_from(stage)
    return "init" if start and key == start[0] else key


def digest_names(stage: Stage) -> Mapping[str, str]:
    """Value of a key that names a model -> the name of the model's digest in `external_digests`."""
    return {model: digest_name(stage, key) for key, model in stage.reads().models.items()}
