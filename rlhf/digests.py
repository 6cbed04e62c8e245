"""sha256 of values, files and directories, a cache of file digests, flushing, hard links. Needs no torch."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf.disk import naming, opened, replace_text

MANIFEST = "manifest.json"
NO_LINK_ERRORS = (errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV)
"""Errors of `link` if the file system has no hard links, or allows no more of them to this file."""

SETTLED_NANOSECONDS = 2_000_000_000
"""The digest of a file is not cached if the file changed less than this ago. Some file systems store times in
steps of two seconds, so the file could change again and keep its time."""


Recipe = dict[str, Any]


def digest_of(value: Any) -> str:
    """sha256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


_digests_read: dict[tuple[int, ...], str] = {}
"""Device and `_state` of a file that this process has read -> its digest."""


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes. A process reads a file again only after it changed."""
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
    """Values that change when a file is written. A copied mtime hides nothing: no program can set ctime."""
    return (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _is_settled(status: os.stat_result) -> bool:
    return time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > SETTLED_NANOSECONDS


def file_digests(
    directory: Path, names: Iterable[str], memory: Path, *, read: bool = False
) -> dict[str, str]:
    """sha256 of these files of a directory. An unchanged file with a digest in `memory` is not read again.

    A flipped bit on the disk changes neither the size nor the times of a file. Only reading finds it.

    Args:
        memory: a JSON file that caches digests. It is written if possible.
        read: read every file that this process has not read yet, even if `memory` has its digest.
    """
    try:
        cached = json.loads(memory.read_bytes())
    except (OSError, ValueError):  # no file, half a file, or no permission
        cached = {}
    known: dict[str, Any] = cached if isinstance(cached, dict) else {}

    def recall(name: str) -> tuple[str, dict[str, Any] | None]:
        status = (directory / name).stat()  # before reading: a change in between must not be cached
        state, remembered = [*_state(status)], known.get(name)
        if not read and isinstance(remembered, dict) and remembered.get("state") == state:
            digest = str(remembered.get("sha256"))
        else:
            digest = file_digest(directory / name)
        return digest, {"state": state, "sha256": digest} if _is_settled(status) else None

    names = [*names]
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        recalled = dict(zip(names, pool.map(recall, names), strict=True))
    entries = {name: entry for name, (_, entry) in recalled.items() if entry is not None}
    if entries != cached:
        _write_memory(memory, entries)
    return {name: digest for name, (digest, _) in recalled.items()}


def _write_memory(memory: Path, content: Mapping[str, Any]) -> None:
    with suppress(OSError):  # a read-only store or a full disk: the files are read again next time
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
"""A function for the digest of a user's directory. `Store.directory_digest` is one with a cache."""


def weights_digest(directory: Path) -> str:
    """sha256 over the weights and the config of a saved model. Equal models have equal digests."""
    files = [directory / "config.json", *sorted(directory.glob("*.safetensors"))]
    return digest_of([[path.name, file_digest(path)] for path in files])


def first_outside(directory: Path, names: Iterable[str]) -> str | None:
    """The first of these names, or of the directory's links, that leads out of the directory or to itself.
    None if none does."""
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
    """Flush a written file or directory to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_or_copy(source: Path | str, target: Path | str) -> None:
    """Make a hard link to a file; a copy if the file system makes no link."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in NO_LINK_ERRORS:
            raise
        shutil.copyfile(source, target)
        flush(Path(target))


PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets")
