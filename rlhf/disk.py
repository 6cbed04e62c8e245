"""Errors of reading and writing files: every error names its file, also errors of libraries."""

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

DISK_ERROR_ADVICE = {
    errno.ENOSPC: "Make room, or choose another store_dir= or runs_dir=",
    errno.EDQUOT: "Make room within your quota, or choose another store_dir= or runs_dir=",
    errno.EROFS: "Choose another store_dir= or runs_dir=",
    errno.EACCES: "Give yourself the right to it, or choose another store_dir= or runs_dir=",
    errno.EPERM: "Give yourself the right to it, or choose another store_dir= or runs_dir=",
    errno.EIO: "Look whether the disk is sound (dmesg), or choose another store_dir= or runs_dir=",
    errno.ESTALE: "Mount the file system again, or choose another store_dir= or runs_dir=",
}
"""Error number of a failed disk operation -> advice to the user."""

OS_ERROR_NUMBER = re.compile(r"\bos error (\d+)\b")
"""Finds the error number in errors of Rust libraries (safetensors, tokenizers), which have classes of their
own."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """While open, add the name of a file or directory to system errors without one, such as those of fsync.

    Raises:
        OSError: with `filename`.
    """
    try:
        yield
    except OSError as error:
        if error.errno in DISK_ERROR_ADVICE and error.filename is None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise
    except Exception as error:  # a library's own class; raised again, as it is or as OSError
        match = OS_ERROR_NUMBER.search(str(error))
        if match is None or int(match[1]) not in DISK_ERROR_ADVICE:
            raise
        raise OSError(int(match[1]), os.strerror(int(match[1])), str(path)) from error


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """Open a regular file for reading. Never waits: opening a named pipe would wait for a writer.

    Raises:
        OSError: the file cannot be read, or is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    with os.fdopen(descriptor, "rb") as file:
        yield file


def content_of(path: Path) -> bytes:
    """Like `Path.read_bytes`, but only for regular files.

    Raises:
        OSError: see `opened`.
    """
    with opened(path) as file:
        return file.read()


def replace_text(path: Path, text: str) -> None:
    """Replace a file atomically: a reader finds the old text or the new one, never a part.

    Raises:
        OSError: with `filename`.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}")
    try:
        with naming(path):
            temporary.write_text(text, encoding="utf-8")
            temporary.rename(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def disk_error_message(error: OSError) -> str | None:
    """Message with the file, the error and what to do; None if the disk is not the cause."""
    if error.errno not in DISK_ERROR_ADVICE:
        return None
    return (
        f"{error.filename or 'disk'}: {os.strerror(error.errno)}. Finished stages and earlier checkpoints "
        f"are kept. {DISK_ERROR_ADVICE[error.errno]}; then the same command continues."
    )
