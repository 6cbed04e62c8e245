"""`python -m rlhf verify`: whether a store holds what was written, read byte by byte; without torch.

Exit codes: 0 all is as it was written, 2 there is no such store, 3 something is damaged.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf.config import ConfigError
from rlhf.pipeline.store import MANIFEST, Store, digest_of, file_digest, leads_out
from rlhf.printable import printable

SOUND, MISUSED, DAMAGED = 0, 2, 3
CHECKPOINT_FORMAT = 3
HELP = """python -m rlhf verify [store_dir=DIR]

Read every artifact and checkpoint in a store and compare it with its manifest; one line for each that is
damaged. Nothing is changed: the next command that needs what is damaged sets it aside and makes it anew.
Exit codes: 0 all is as it was written, 2 there is no such store, 3 something is damaged.
"""


def verify(arguments: Sequence[str], *, store_dir: str) -> int:
    """Check a whole store, `store_dir` unless the arguments name another, and say what is damaged.

    Returns:
        The exit code.
    """
    if {"-h", "--help"} & {*arguments}:
        print(HELP, end="")
        return SOUND
    root = Path(store_dir)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key != "store_dir" or not equals or not value:
            print(f"Error: verify {argument}: only store_dir=DIR has a meaning here.", file=sys.stderr)
            return MISUSED
        root = Path(value)
    if not root.is_dir():
        print(f"Error: store_dir={root}: there is no such directory.", file=sys.stderr)
        return MISUSED
    number, bad = 0, 0
    for complaint in complaints(root):
        number += 1
        if complaint is not None:
            bad += 1
            print(printable(complaint), flush=True)
    kept = len(list(root.glob("[!.]*/*damaged-*")) + list(root.glob("[!.]*/.*.checkpoints/damaged-*")))
    aside = f" {kept} were set aside earlier (*damaged-*)." if kept else ""
    told = f"{bad} damaged" if bad else "all as they were written"
    print(f"{number} artifacts and checkpoints in {root}: {told}.{aside}")
    return DAMAGED if bad else SOUND


def complaints(root: Path) -> Iterator[str | None]:
    """What is wrong with each artifact and checkpoint of a store; None where nothing is."""
    store = Store(root)
    for path in sorted(root.glob("[!.]*/[!.]*")):
        if path.is_dir():
            yield _complaint(store, path)
    for path in sorted(root.glob("[!.]*/.*.checkpoints/step-*")):
        _, complaint = verified(path)
        yield f"{path} is damaged: {complaint}" if complaint else None


def _complaint(store: Store, path: Path) -> str | None:
    try:
        found = store.find(path.parent.name, path.name)
        if found is not None:
            store.verify(found, read=True)
    except ConfigError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename or path} cannot be read: {error.strerror}"
    return None


def verified(checkpoint: Path) -> tuple[dict[str, Any] | None, str]:
    """The manifest of a checkpoint whose files are what was written; else None and what is wrong."""
    try:
        manifest: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_bytes())
        if manifest["format"] != CHECKPOINT_FORMAT:
            return None, f"written in format {manifest['format']}, this version reads {CHECKPOINT_FORMAT}"
        if (
            digest_of({key: value for key, value in manifest.items() if key != "digest"})
            != manifest["digest"]
        ):
            return None, f"{MANIFEST} is not what was written"
        if manifest["name"] != checkpoint.name:
            return None, f"{MANIFEST} belongs to {manifest['name']}"
        outside = leads_out(checkpoint, manifest["files"])
        if outside is not None:
            return None, f"{outside} leads out of its directory"
        for name, digest in manifest["files"].items():
            if file_digest(checkpoint / name) != digest:
                return None, f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"{type(error).__name__}: {error}"
    return manifest, ""
