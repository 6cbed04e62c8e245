"""Where a run is, in a file that `python -m rlhf status` reads: position.json in the run's directory."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from rlhf.disk import replace_text

NAME = "position.json"
EVERY_SECONDS = 1.0


def read_position(directory: Path) -> dict[str, Any]:
    """What a run said last of where it is; empty if it said nothing."""
    try:
        found = json.loads((directory / NAME).read_bytes())
    except (OSError, ValueError):  # not there; or replaced on another host while NFS reads it
        return {}
    return found if isinstance(found, dict) else {}


class Position:
    """The file, written by rank 0 at most once a second. A run that cannot write it goes on without."""

    def __init__(self, directory: Path, *, writes: bool) -> None:
        self._path, self._writes, self._written = directory / NAME, writes, 0.0
        self._said: dict[str, Any] = {
            "host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time(),
        }  # fmt: skip

    @contextmanager
    def end(self) -> Iterator[None]:
        """Say how the run ended, if it did not reach its end: a process that is gone is not always dead."""
        try:
            yield
        except BaseException as error:
            self.tell(ended="stopped" if isinstance(error, KeyboardInterrupt) else "failed", now=True)
            raise

    def tell(self, *, now: bool = False, **said: Any) -> None:
        """Say more; `now` writes it at once."""
        self._said |= said
        if self._writes and (now or time.monotonic() - self._written >= EVERY_SECONDS):
            self._written = time.monotonic()
            with suppress(OSError):  # a full disk: what the run itself writes will say so
                replace_text(self._path, json.dumps(self._said | {"time": time.time()}))
