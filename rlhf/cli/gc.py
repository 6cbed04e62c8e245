"""`python -m rlhf gc`: list what no run uses in a store, and remove it if the user agrees. Needs no torch."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.cli.command import ask, read
from rlhf.config import ConfigError
from rlhf.digests import MANIFEST
from rlhf.exit_codes import DONE
from rlhf.locks import HeldError
from rlhf.pipeline.store import Store
from rlhf.tracking.position import read_position

HELP = """python -m rlhf gc [store_dir=DIR] [runs_dir=DIR] [yes=true]

Show what no run of runs_dir uses in the store, with its size, and ask before removing it. Without a terminal
it cannot ask, and removes nothing. yes=true removes without asking. It does not know runs of other
directories, and removes what they use. A later run makes again what it needs.
"""
LEFTOVER_NAME = re.compile(r"\.(\w+)\.(checkpoints|last|part-.*|damaged-.*|replaced)")
LEFTOVER_REASONS = {
    "checkpoints": "checkpoints of a stage that did not end, and no run in runs_dir is at that stage",
    "damaged": "damaged, set aside",
    "last": "the last checkpoint of a stage that has ended, for a longer run",
    "part": "left by a run that was killed",
    "replaced": "left by a run that was killed",
}


class Unused(NamedTuple):
    """A directory in the store that no run uses."""

    path: Path
    stage: str
    key: str
    why: str
    size: int


def gc(arguments: Sequence[str], defaults: Mapping[str, Any]) -> int:
    """Show what is unused, and remove it if the user agrees."""
    known = {"store_dir": defaults["store_dir"], "runs_dir": defaults["runs_dir"], "yes": "false"}
    keys = read("gc", arguments, known, HELP)
    if keys is None:
        return DONE
    if keys["yes"] not in ("true", "false"):
        raise ConfigError(f"gc yes={keys['yes']}: true or false.")
    root, runs = Path(keys["store_dir"]), Path(keys["runs_dir"])
    for key, path in (("store_dir", root), ("runs_dir", runs)):
        if not path.is_dir():
            raise ConfigError(f"{key}={path}: there is no such directory.")
    store = Store(root)
    candidates = (
        each for each in unused_directories(root, used_keys(runs)) if not is_being_made(store, each)
    )
    directories = sorted(candidates, key=lambda each: -each.size)
    if not directories:
        print(f"{root}: runs in {runs} use everything in it.")
        return DONE
    for each in directories:
        print(f"{each.size / 1e6:10,.1f} MB  {each.path}  ({each.why})")
    total_mb = sum(each.size for each in directories) / 1e6
    print(f"{total_mb:10,.1f} MB in {len(directories)} directories")
    if keys["yes"] == "true" or ask(f"Remove them? Runs in other directories than {runs} may use them."):
        print(f"Removed {remove(store, directories, runs)} of {len(directories)}.")
    else:
        print("Nothing was removed.")
    return DONE


def used_keys(runs: Path) -> set[tuple[str, str]]:
    """Stage and key of each artifact that a run names, and of what a run was making when it ended.

    The key identifies an artifact, even after the run or the store was moved.

    Raises:
        ConfigError: a run cannot be read, so what it uses is not known.
    """
    keys: set[tuple[str, str]] = set()
    for path in runs.glob("*/summary.json"):
        try:
            stages = json.loads(path.read_bytes())["stages"].values()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: {error}. So it is not known what that run uses.") from None
        artifacts = [Path(stage["artifact"]) for stage in stages if stage["artifact"]]
        keys |= {(path.parent.name, path.name) for path in artifacts}
        position = read_position(path.parent)
        keys.add((position.get("stage", ""), position.get("key", "")))
    return keys


def unused_directories(root: Path, needed: Collection[tuple[str, str]]) -> Iterator[Unused]:
    """The store's directories that are not needed. Base models stay, because no run names them."""
    for path in root.glob("[!.]*/*"):
        if path.is_dir() and not path.is_symlink() and (why := why_unused(path, needed)) is not None:
            leftover = LEFTOVER_NAME.fullmatch(path.name)
            yield Unused(path, path.parent.name, leftover[1] if leftover else path.name, why, size(path))


def why_unused(path: Path, needed: Collection[tuple[str, str]]) -> str | None:
    """Why a directory of a store is not needed; None if it is."""
    stage, leftover = path.parent.name, LEFTOVER_NAME.fullmatch(path.name)
    if leftover is None:
        is_needed = stage == "base" or path.name.startswith(".") or (stage, path.name) in needed
        return None if is_needed else "no run names it"
    kind = leftover[2].partition("-")[0]
    if kind == "checkpoints" and (path.parent / leftover[1] / MANIFEST).is_file():
        return "checkpoints of a stage that has ended"  # killed right after it published the artifact
    return None if kind == "checkpoints" and (stage, leftover[1]) in needed else LEFTOVER_REASONS[kind]


def size(directory: Path) -> int:
    """Bytes of all files below a directory. Hard links count once."""
    files = [path.lstat() for path in directory.rglob("*") if path.is_file() and not path.is_symlink()]
    return sum({(each.st_dev, each.st_ino): each.st_size for each in files}.values())


def is_being_made(store: Store, each: Unused) -> bool:
    """Whether a run is writing this directory now."""
    lock = store.lock(each.stage, each.key)
    try:
        lock.acquire(timeout=0)
    except HeldError:
        return True
    lock.release()
    return False


def remove(store: Store, directories: Iterable[Unused], runs: Path) -> int:
    """Remove directories, except those that a run is writing, or began to use while the user was asked.

    Returns:
        The number of removed directories.
    """
    removed = 0
    for each in directories:
        lock = store.lock(each.stage, each.key)
        try:
            lock.acquire(timeout=0)
        except HeldError as held:
            print(f"{each.path} stays: a run is making it ({held}).")
            continue
        try:
            if why_unused(each.path, used_keys(runs)) is None:
                print(f"{each.path} stays: a run uses it now.")
            else:
                shutil.rmtree(each.path)
                removed += 1
        finally:
            lock.release()
    return removed
