"""`python -m rlhf gc`: what of a store no run uses, and how large it is. Removes it if told to. No torch."""

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

Show what in the store no run in runs_dir uses, with its size, and ask before it is removed. Where nobody can
answer, nothing is removed, unless yes=true says so. Runs of other directories are not seen: what they use
is removed too. Whatever a later run needs again is made again.
"""
LEFT = re.compile(r"\.(\w+)\.(checkpoints|part-.*|damaged-.*|replaced)")
WORDS = {
    "checkpoints": "checkpoints of a stage that did not end, and no run in runs_dir is at that stage",
    "damaged": "damaged, set aside",
    "part": "left by a run that was killed",
    "replaced": "left by a run that was killed",
}


class Unused(NamedTuple):
    """A directory that no run uses."""

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
    every = (each for each in unused(root, used(runs)) if not is_being_made(store, each))
    found = sorted(every, key=lambda each: -each.size)
    if not found:
        print(f"{root}: runs in {runs} use everything in it.")
        return DONE
    for each in found:
        print(f"{each.size / 1e6:10,.1f} MB  {each.path}  ({each.why})")
    total = sum(each.size for each in found) / 1e6
    print(f"{total:10,.1f} MB in {len(found)} directories")
    if keys["yes"] == "true" or ask(f"Remove them? Only runs in {runs} were asked what they use."):
        print(f"Removed {remove(store, found, runs)} of {len(found)}.")
    else:
        print("Nothing was removed.")
    return DONE


def used(runs: Path) -> set[tuple[str, str]]:
    """Stage and key of each artifact that runs name, and of what a run was making when it ended.

    The key says what it is, wherever run and store were moved.

    Raises:
        ConfigError: a run cannot be read, so nobody knows what it uses.
    """
    found: set[tuple[str, str]] = set()
    for path in runs.glob("*/summary.json"):
        try:
            stages = json.loads(path.read_bytes())["stages"].values()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: {error}. So nobody knows what that run uses.") from None
        made = [Path(stage["artifact"]) for stage in stages if stage["artifact"]]
        found |= {(path.parent.name, path.name) for path in made}
        at = read_position(path.parent)
        found.add((at.get("stage", ""), at.get("key", "")))
    return found


def unused(root: Path, needed: Collection[tuple[str, str]]) -> Iterator[Unused]:
    """The directories of a store that are not needed. The base models stay: no run names them."""
    for path in root.glob("[!.]*/*"):
        if path.is_dir() and not path.is_symlink() and (why := why_unused(path, needed)) is not None:
            left = LEFT.fullmatch(path.name)
            yield Unused(path, path.parent.name, left[1] if left else path.name, why, size(path))


def why_unused(path: Path, needed: Collection[tuple[str, str]]) -> str | None:
    """Why a directory of a store is not needed; None if it is."""
    stage, left = path.parent.name, LEFT.fullmatch(path.name)
    if left is None:
        is_needed = stage == "base" or path.name.startswith(".") or (stage, path.name) in needed
        return None if is_needed else "no run names it"
    kind = left[2].partition("-")[0]
    if kind == "checkpoints" and (path.parent / left[1] / MANIFEST).is_file():
        return "checkpoints of a stage that has ended"  # killed right behind its publication
    return None if kind == "checkpoints" and (stage, left[1]) in needed else WORDS[kind]


def size(directory: Path) -> int:
    """Bytes of the files below; a file under several names counts once."""
    files = [path.lstat() for path in directory.rglob("*") if path.is_file() and not path.is_symlink()]
    return sum({(each.st_dev, each.st_ino): each.st_size for each in files}.values())


def is_being_made(store: Store, each: Unused) -> bool:
    """Whether a run works there just now."""
    lock = store.lock(each.stage, each.key)
    try:
        lock.acquire(timeout=0)
    except HeldError:
        return True
    lock.release()
    return False


def remove(store: Store, found: Iterable[Unused], runs: Path) -> int:
    """Remove directories, but none that a run is making just now, or has begun to use while the user was
    asked. Gives how many are gone."""
    number = 0
    for each in found:
        lock = store.lock(each.stage, each.key)
        try:
            lock.acquire(timeout=0)
        except HeldError as held:
            print(f"{each.path} stays: a run is making it ({held}).")
            continue
        try:
            if why_unused(each.path, used(runs)) is None:
                print(f"{each.path} stays: a run uses it now.")
            else:
                shutil.rmtree(each.path)
                number += 1
        finally:
            lock.release()
    return number
