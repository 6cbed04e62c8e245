"""`python -m rlhf verify`: read a whole store and compare it with its manifests. Needs no torch.

Exit codes: 0 nothing is damaged, 2 there is no such store, 3 something is damaged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.cli.command import read
from rlhf.config import ConfigError
from rlhf.exit_codes import DONE, GATE_FAILED
from rlhf.pipeline.store import Store
from rlhf.printable import printable
from rlhf.training.checkpoint import verify_checkpoint

HELP = """python -m rlhf verify [store_dir=DIR]

Read every artifact and checkpoint in a store and compare it with its manifest; one line for each that is
damaged. Nothing is changed: the next command that needs what is damaged sets it aside and rebuilds it.
Exit codes: 0 all is as it was written, 2 there is no such store, 3 something is damaged.
"""


def verify(arguments: Sequence[str], defaults: Mapping[str, Any]) -> int:
    """Check a whole store, and print what is damaged.

    Returns:
        The exit code.

    Raises:
        ConfigError: there is no such store.
    """
    keys = read("verify", arguments, {"store_dir": defaults["store_dir"]}, HELP)
    if keys is None:
        return DONE
    root = Path(keys["store_dir"])
    if not root.is_dir():
        raise ConfigError(f"store_dir={root}: there is no such directory.")
    num_checked, num_damaged = 0, 0
    for complaint in complaints(root):
        num_checked += 1
        if complaint is not None:
            num_damaged += 1
            print(printable(complaint), flush=True)
    num_aside = len(list(root.glob("[!.]*/*damaged-*")) + list(root.glob("[!.]*/.*.checkpoints/damaged-*")))
    aside_note = f" {num_aside} were set aside earlier (*damaged-*)." if num_aside else ""
    outcome = f"{num_damaged} damaged" if num_damaged else "all as they were written"
    print(f"{num_checked} artifacts and checkpoints in {root}: {outcome}.{aside_note}")
    return GATE_FAILED if num_damaged else DONE


def complaints(root: Path) -> Iterator[str | None]:
    """One complaint per artifact and checkpoint of a store; None if it is not damaged."""
    store = Store(root)
    for path in sorted(root.glob("[!.]*/[!.]*")):
        if path.is_dir():
            yield _complaint(store, path)
    for path in sorted([*root.glob("[!.]*/.*.checkpoints/step-*"), *root.glob("[!.]*/.*.last/step-*")]):
        _, complaint = verify_checkpoint(path)
        yield f"{path} is damaged: {complaint}" if complaint else None


def _complaint(store: Store, path: Path) -> str | None:
    try:
        artifact = store.find(path.parent.name, path.name)
        if artifact is not None:
            store.verify(artifact, read=True)
    except ConfigError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename or path} cannot be read: {error.strerror}"
    return None
