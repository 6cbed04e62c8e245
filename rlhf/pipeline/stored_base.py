"""The base model in the store, if its files must be made: converted to safetensors, or drawn at random."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from rlhf.digests import Recipe
from rlhf.disk import naming
from rlhf.pipeline.manifest import make_manifest
from rlhf.pipeline.store import Artifact, DamagedError, Store, recipe_key


def stored_base(
    store: Store, content: list[str], write: Callable[[Path], None], log: Callable[[str], None]
) -> Artifact:
    """The base model's artifact, made if the store has none. Only rank 0 calls it.

    Args:
        content: everything that decides the files; the first item is what the user calls the model.
        write: makes the files in a directory.
        log: prints a line.
    """
    recipe: Recipe = {"stage": "base", "version": 2, "content": content}
    key = recipe_key(recipe)
    with suppress(DamagedError):
        if artifact := store.find("base", key):
            return artifact
    waits = f"base waits: another run is making {key} ({{}})"
    with store.lock("base", key).awaited(lambda holder: log(waits.format(holder))):
        if damage := store.set_aside("base", key):
            log(f"base: {damage}")
        if artifact := store.find("base", key):  # another run may just have made it
            return artifact
        log(f"base model={content[0]}: making it, once")
        start, scratch = time.monotonic(), store.scratch("base", key)
        with naming(scratch):
            write(scratch)
        manifest = make_manifest(
            "base", recipe, scratch, config={}, metrics={}, seconds=time.monotonic() - start, num_ranks=1,
            input_digests={},
        )  # fmt: skip
        return store.publish(scratch, manifest)
