"""Files that cannot be written or read: the error names the file, whoever raised it."""

from __future__ import annotations

import errno
import io
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

TROUBLE = {
    errno.ENOSPC: "Make room, or choose another store_dir= or runs_dir=",
    errno.EDQUOT: "Make room within your quota, or choose another store_dir= or runs_dir=",
    errno.EROFS: "Choose another store_dir= or runs_dir=",
    errno.EACCES: "Give yourself the right to it, or choose another store_dir= or runs_dir=",
    errno.EPERM: "Give yourself the right to it, or choose another store_dir= or runs_dir=",
    errno.EIO: "Look whether the disk is sound (dmesg), or choose another store_dir= or runs_dir=",
    errno.ESTALE: "Mount the file system again, or choose another store_dir= or runs_dir=",
}
"""Error number of a failed disk operation -> what the user can do."""

IN_A_TEXT = re.compile(r"\bos error (\d+)\b")
"""Libraries in Rust (safetensors, tokenizers) have their own error classes, with the number in the text."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the name of a file or directory to system errors without one, such as those of write and fsync.

    Raises:
        OSError: with `filename`.
    """
    try:
        yield
    except OSError as error:
        if error.errno in TROUBLE and error.filename is None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise
    except Exception as error:  # a library's own class; raised again, as it is or as an OSError
        found = IN_A_TEXT.search(str(error))
        if found is None or int(found[1]) not in TROUBLE:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """A file to read. To open a named pipe would wait for somebody who writes into it.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    with os.fdopen(descriptor, "rb") as file:
        yield file


def content_of(path: Path) -> bytes:
    """Like `Path.read_bytes`, of regular files.

    Raises:
        OSError: see `opened`.
    """
    with opened(path) as file:
        return file.read()


def replace_text(path: Path, text: str) -> None:
    """Replace a file at once: a reader finds the old text or the new one, never a part of it.

    Raises:
        OSError: with `filename`.
    """
    beside = path.with_name(f".{path.name}.{uuid4().hex[:8]}")
    try:
        with naming(path):
            beside.write_text(text, encoding="utf-8")
            beside.rename(path)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def in_words(error: OSError) -> str | None:
    """What happened to which file, and what to do; None if the disk is not the cause."""
    if error.errno not in TROUBLE:
        return None
    return (
        f"{error.filename or 'disk'}: {os.strerror(error.errno)}. Finished stages and earlier checkpoints "
        f"are kept. {TROUBLE[error.errno]}; then the same command continues."
    )
