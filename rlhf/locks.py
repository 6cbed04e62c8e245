"""File locks that name their holder."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType

import psutil
from filelock import FileLock, Timeout

from rlhf.disk import replace_text


class HeldError(TimeoutError):
    """Another process holds the lock. The text names it."""


class Lock:
    """A file lock. The kernel frees it when its holder dies. PATH.holder says which process took it last."""

    def __init__(self, path: Path) -> None:
        self._lock, self._note = FileLock(path), path.with_name(f"{path.name}.holder")

    def acquire(self, timeout: float = -1) -> None:
        """Take the lock. Wait at most `timeout` seconds; -1 waits forever.

        Raises:
            HeldError: another process has it.
            OSError: the lock file cannot be opened.
        """
        try:
            self._lock.acquire(timeout=timeout)
        except Timeout:
            raise HeldError(self.holder()) from None
        me = psutil.Process()
        note = {"host": socket.gethostname(), "pid": me.pid, "started": me.create_time()}
        with suppress(OSError):  # a full disk: then the holder is unknown to others
            self._note.unlink(missing_ok=True)
            replace_text(self._note, json.dumps(note))

    @contextmanager
    def awaited(self, log: Callable[[str], None]) -> Iterator[None]:
        """Hold the lock while open. If another process has it, call `log` with its description, then wait."""
        try:
            self.acquire(timeout=0)
        except HeldError as held:
            log(str(held))
            self.acquire()
        try:
            yield
        finally:
            self.release()

    def release(self) -> None:
        """Free the lock."""
        self._lock.release()

    def holder(self) -> str:
        """The process that holds the lock, such as `pid 12 on host n1, started 2026-11-27 15:04:05`."""
        try:
            note = json.loads(self._note.read_bytes())
            host, pid, started = note["host"], int(note["pid"]), float(note["started"])
        except (OSError, ValueError, KeyError, TypeError):
            return "which one is not known"
        if host == socket.gethostname() and not is_alive(pid, started):
            return "which one is not known"  # the file is from an earlier holder, which was killed
        return f"pid {pid} on host {host}, started {datetime.fromtimestamp(started):%Y-%m-%d %H:%M:%S}"

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def is_alive(pid: int, started: float) -> bool:
    """Whether this process of this host still runs. A later one with its number has another start time."""
    try:
        return bool(abs(psutil.Process(pid).create_time() - started) < 1.0)
    except psutil.NoSuchProcess:
        return False
