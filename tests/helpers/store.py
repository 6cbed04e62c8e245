"""Artifacts of a few bytes. Processes that tests start import this alone: it needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf.digests import MANIFEST, Recipe, digest_of
from rlhf.pipeline.store import Artifact, Manifest, Store, recipe_key

RECIPE: Recipe = {
    "stage": "sft",
    "version": 1,
    "knobs": {"epochs": 2.0, "optim": {"lr": 3e-5, "eps": 1e-8}},
    "external": {},
    "inputs": {"prepare": "0123456789abcdef"},
    "data": {"sft": "d1"},
    "model": "m1",
    "seed": 0,
    "dtype": "float32",
}


def manifest(stage: str, key: str = "0", **changes: Any) -> Manifest:
    """Of an artifact that nobody made."""
    values: dict[str, Any] = {
        "stage": stage, "key": key, "recipe": {}, "config": {}, "metrics": {}, "seconds": 0.0, "created": "",
        "git_revision": None, "packages": {}, "hardware": "", "files": {},
    }  # fmt: skip
    return Manifest(**(values | changes))


def manifest_of(recipe: Recipe = RECIPE, **changes: Any) -> Manifest:
    said: dict[str, Any] = {
        "config": {"seed": 0}, "metrics": {"loss": 1.5}, "seconds": 2.0, "created": "2026-01-01",
    }  # fmt: skip
    return manifest(recipe["stage"], recipe_key(recipe), recipe=recipe, **(said | changes))


def publish(store: Store, recipe: Recipe = RECIPE, text: str = "weights", **changes: Any) -> Artifact:
    with store.lock(recipe["stage"], recipe_key(recipe)):
        scratch = store.scratch(recipe["stage"], recipe_key(recipe))
        (scratch / "part").mkdir()
        (scratch / "part" / "model.bin").write_text(text)
        return store.publish(scratch, manifest_of(recipe, **changes))


def sign(checkpoint: Path, manifest: dict[str, Any]) -> None:
    """Write a checkpoint's manifest with the digest that it should have."""
    manifest["digest"] = digest_of({key: value for key, value in manifest.items() if key != "digest"})
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
