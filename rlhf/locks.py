"""File locks that say who holds them."""

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
    """Another process holds the lock. The text says which one."""


class Lock:
    """A file lock. The kernel frees it when its holder dies. A file beside it says who took it last."""

    def __init__(self, path: Path) -> None:
        self._lock, self._note = FileLock(path), path.with_name(f"{path.name}.holder")

    def acquire(self, timeout: float = -1) -> None:
        """Take the lock. Wait at most `timeout` seconds; -1 waits for ever.

        Raises:
            HeldError: another process has it.
            OSError: the file cannot be opened.
        """
        try:
            self._lock.acquire(timeout=timeout)
        except Timeout:
            raise HeldError(self.holder()) from None
        me = psutil.Process()
        said = {"host": socket.gethostname(), "pid": me.pid, "started": me.create_time()}
        with suppress(OSError):  # a full disk: then nobody learns who holds it
            self._note.unlink(missing_ok=True)
            replace_text(self._note, json.dumps(said))

    @contextmanager
    def awaited(self, log: Callable[[str], None]) -> Iterator[None]:
        """Hold the lock while open. If another process has it, wait, and first call `log` with its
        description."""
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
        """Free it."""
        self._lock.release()

    def holder(self) -> str:
        """Who holds it, such as `pid 12 on host n1, started 2026-11-27 15:04:05`."""
        try:
            said = json.loads(self._note.read_bytes())
            host, pid, started = said["host"], int(said["pid"]), float(said["started"])
        except (OSError, ValueError, KeyError, TypeError):
            return "which one is not known"
        if host == socket.gethostname() and not lives(pid, started):
            return "which one is not known"  # the file is from an earlier holder, which was killed
        return f"pid {pid} on host {host}, started {datetime.fromtimestamp(started):%Y-%m-%d %H:%M:%S}"

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def lives(pid: int, started: float) -> bool:
    """Whether the process of that number on this host is still the one that began at that time."""
    try:
        return bool(abs(psutil.Process(pid).create_time() - started) < 1.0)
    except psutil.NoSuchProcess:
        return False
