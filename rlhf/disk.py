"""Files that cannot be written or read: the error names the file, whoever raised it."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TROUBLE = {
    errno.ENOSPC: "Make room, or choose another store_dir= or runs_dir=",
    errno.EDQUOT: "Make room within your quota, or choose another store_dir= or runs_dir=",
    errno.EROFS: "Choose another store_dir= or runs_dir=",
    errno.EACCES: "Give yourself the right to it, or choose another store_dir= or runs_dir=",
    errno.EPERM: "Give yourself the right to it, or choose another store_dir= or runs_dir=",
    errno.EIO: "Look whether the disk is sound (dmesg), or choose another store_dir= or runs_dir=",
    errno.ESTALE: "Mount the file system again, or choose another store_dir= or runs_dir=",
}
"""What a disk says when it does not do as it was told, and what the user can do."""

IN_A_TEXT = re.compile(r"\bos error (\d+)\b")
"""How libraries in Rust (safetensors, tokenizers) tell an error of the system, in classes of their own."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name a file or directory in errors of the system that name none: a failed write or fsync does not.

    Raises:
        OSError: with `filename`.
    """
    try:
        yield
    except OSError as error:
        if error.errno in TROUBLE and error.filename is None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise
    except Exception as error:  # of a class of the library's own; raised again, as it is or as the disk's
        found = IN_A_TEXT.search(str(error))
        if found is None or int(found[1]) not in TROUBLE:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


def in_words(error: OSError) -> str | None:
    """What happened, to which file, and what to do; None for an error that is not the disk's."""
    if error.errno not in TROUBLE:
        return None
    return (
        f"{error.filename or 'disk'}: {os.strerror(error.errno)}. Finished stages and earlier checkpoints "
        f"are kept. {TROUBLE[error.errno]}; then the same command goes on."
    )
