"""Writes the position of a run to position.json in its directory, which `python -m rlhf status` reads."""

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

from rlhf.config import ConfigError
from rlhf.disk import disk_error_message, replace_text
from rlhf.tracking.redaction import redacted

FILE_NAME = "position.json"
WRITE_SECONDS = 1.0


def read_position(directory: Path) -> dict[str, Any]:
    """The last position that a run wrote; empty if there is none."""
    try:
        values = json.loads((directory / FILE_NAME).read_bytes())
    except (OSError, ValueError):  # no such file, or replaced on another host while NFS reads it
        return {}
    return values if isinstance(values, dict) else {}


class Position:
    """The position file. Rank 0 writes it at most once a second. A run that cannot write it continues."""

    def __init__(self, directory: Path, *, writes: bool) -> None:
        self._path, self._writes, self._written = directory / FILE_NAME, writes, 0.0
        self._values: dict[str, Any] = {
            "host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time(),
        }  # fmt: skip

    @contextmanager
    def end(self) -> Iterator[None]:
        """If an error or a signal ends the block, write `ended`, and the error's first line. So a stopped or
        failed run is not taken for a dead process."""
        try:
            yield
        except KeyboardInterrupt:
            self.update(ended="stopped", now=True)
            raise
        except BaseException as error:
            self.update(ended="failed", error=first_line(error), now=True)
            raise

    def update(self, *, now: bool = False, **values: Any) -> None:
        """Update these values. `now` writes the file at once."""
        self._values |= values
        if self._writes and (now or time.monotonic() - self._written >= WRITE_SECONDS):
            self._written = time.monotonic()
            with suppress(OSError):  # a full disk: the run's own writes will report it
                replace_text(self._path, json.dumps(self._values | {"time": time.time()}))


def first_line(error: BaseException) -> str:
    """The first line of an error, as the run shows it."""
    text = disk_error_message(error) if isinstance(error, OSError) else None
    if text is None:
        text = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
    line: str = redacted(text.partition("\n")[0])
    return line
