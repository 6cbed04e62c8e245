"""Artifacts of a few bytes."""

from __future__ import annotations

from typing import Any

from rlhf.digests import Recipe
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


def manifest_of(recipe: Recipe = RECIPE, **changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "stage": recipe["stage"], "key": recipe_key(recipe), "recipe": recipe, "config": {"seed": 0},
        "metrics": {"loss": 1.5}, "seconds": 2.0, "created": "2026-01-01", "git_revision": None,
        "packages": {}, "hardware": "", "files": {},
    }  # fmt: skip
    return Manifest(**(values | changes))


def publish(store: Store, recipe: Recipe = RECIPE, text: str = "weights", **changes: Any) -> Artifact:
    with store.lock(recipe["stage"], recipe_key(recipe)):
        scratch = store.scratch(recipe["stage"], recipe_key(recipe))
        (scratch / "part").mkdir()
        (scratch / "part" / "model.bin").write_text(text)
        return store.publish(scratch, manifest_of(recipe, **changes))
