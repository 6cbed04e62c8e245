"""Signals: what trains finishes its step and saves first; everything else ends at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Ctrl-C; a scheduler's end; a scheduler's warning of it, and submitit's."""


class Stopped(KeyboardInterrupt):
    """The run was asked to end. What was finished, and the last checkpoint, are kept."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopSignals:
    """Turns signals into `Stopped`: at once, or once the current training step is saved."""

    def __init__(self) -> None:
        self.received: int | None = None
        """The signal that came while stopping was put off."""
        self._put_off = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle them while open."""
        before = {signum: signal.signal(signum, self._handle) for signum in STOPPING}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    @contextmanager
    def put_off(self) -> Iterator[None]:
        """While open, the first signal is only noted; whoever opened it looks at `received`."""
        self._put_off = True
        try:
            yield
        finally:
            self._put_off = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._put_off and self.received is None:
            self.received = signum
            return
        raise Stopped(signum)
