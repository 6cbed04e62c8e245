"""sha256 of values, files and directories, a memory of these digests, and flushing to disk; without torch."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf.disk import naming, opened, replace_text

MANIFEST = "manifest.json"


SETTLED_NANOSECONDS = 2_000_000_000
"""The digest of a file that changed less than this ago is not remembered: it may change again and keep its
time, because some file systems store times in steps of two seconds."""


Recipe = dict[str, Any]


def digest_of(value: Any) -> str:
    """sha256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


_digests_read: dict[tuple[int, ...], str] = {}
"""Device and `_state` of the files that this process has read -> their digests."""


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes. Each process reads a file once, and again only after it changed."""
    with naming(path), opened(path) as file:
        status = os.fstat(file.fileno())
        state = (status.st_dev, *_state(status))
        if state in _digests_read:
            return _digests_read[state]
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        after = os.fstat(file.fileno())
    if _state(after) == _state(status) and _is_settled(after):
        _digests_read[state] = digest
    return digest


def _state(status: os.stat_result) -> tuple[int, ...]:
    """Changes when a file is written. No program can set ctime, so not even a copied mtime hides it."""
    return (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _is_settled(status: os.stat_result) -> bool:
    return time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > SETTLED_NANOSECONDS


def file_digests(
    directory: Path, names: Iterable[str], memory: Path, *, read: bool = False
) -> dict[str, str]:
    """The sha256 of some files of a directory. An unchanged file that `memory` knows is not read again.

    A bit that flips on the disk changes neither the size nor the times of a file. Only reading finds it.

    Args:
        memory: a JSON file. It is created or updated, if it can be written.
        read: read every file that this process has not read yet, even if `memory` knows it.
    """
    try:
        before = json.loads(memory.read_bytes())
    except (OSError, ValueError):  # none, half of one, or another user's
        before = {}
    known: dict[str, Any] = before if isinstance(before, dict) else {}

    def recall(name: str) -> tuple[str, dict[str, Any] | None]:
        status = (directory / name).stat()  # before it is read: what is written meanwhile is not remembered
        state, remembered = [*_state(status)], known.get(name)
        if not read and isinstance(remembered, dict) and remembered.get("state") == state:
            digest = str(remembered.get("sha256"))
        else:
            digest = file_digest(directory / name)
        return digest, {"state": state, "sha256": digest} if _is_settled(status) else None

    names = [*names]
    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter to other threads
        found = dict(zip(names, pool.map(recall, names), strict=True))
    now = {name: entry for name, (_, entry) in found.items() if entry is not None}
    if now != before:
        _write_memory(memory, now)
    return {name: digest for name, (digest, _) in found.items()}


def _write_memory(memory: Path, content: Mapping[str, Any]) -> None:
    with suppress(OSError):  # a store of others', or a full one: then the files are read again next time
        memory.parent.mkdir(exist_ok=True)
        replace_text(memory, json.dumps(content))


def directory_digest(directory: Path, memory: Path | None = None, *, read: bool = False) -> str:
    """sha256 over the names and bytes of all files below a directory.

    Args:
        memory: see `file_digests`; None reads every file that this process has not read yet.
        read: see `file_digests`.
    """
    names = sorted(files_below(directory), key=Path)
    if memory is None:
        return digest_of([[name, file_digest(directory / name)] for name in names])
    digests = file_digests(directory, names, memory, read=read)
    return digest_of([[name, digests[name]] for name in names])


DirectoryDigest = Callable[[Path], str]
"""Digest of a user's directory. `Store.directory_digest` is one that remembers."""


def weights_digest(directory: Path) -> str:
    """sha256 over the weights and the config of a saved model. Equal models have equal digests."""
    files = [directory / "config.json", *sorted(directory.glob("*.safetensors"))]
    return digest_of([[path.name, file_digest(path)] for path in files])


def leads_out(directory: Path, names: Iterable[str]) -> str | None:
    """The first of these names, or of the links in the directory, that points outside it or at itself; None
    if none does."""
    root = directory.resolve()

    def is_inside(name: str) -> bool:
        try:
            (root / name).stat()
        except OSError as error:
            if error.errno == errno.ELOOP:
                return False
        return Path(os.path.realpath(root / name)).is_relative_to(root)

    links = [str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_symlink()]
    return next((name for name in (*names, *links) if not is_inside(name)), None)


def files_below(directory: Path) -> Iterator[str]:
    return (str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def flush(path: Path) -> None:
    """Make sure that what was written to a file or a directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets")
