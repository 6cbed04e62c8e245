"""Signals: what trains finishes its step and saves first; everything else ends at once.

Python calls signal handlers in the main thread, between two of its own instructions. A rank that waits in a
collective executes none, so a second thread hears signals too: see `StopSignals.heard`.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Ctrl-C; a scheduler's end; a scheduler's warning of it, and submitit's."""


QUIET_SECONDS = 30.0
"""After a signal, a run of several ranks ends when none of them has made progress for so long."""
AT_ONCE_SECONDS = 3.0
"""What a second signal leaves to Python, to end by itself and say so."""
AGAIN_SECONDS = 0.1
"""Between two words of the thread to a main thread that has not heard the second signal."""
SAME_SECONDS = 1.0
"""The same signal again within so long is the same stop: a control group gives it to the launcher and to its
ranks, to which the launcher passes it on."""
LOOK_SECONDS = 1.0
"""Between two looks at the ranks' progress."""


class Stopped(KeyboardInterrupt):
    """The run was asked to end. What was finished, and the last checkpoint, are kept."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Heard:
    """The signals that came, without those that are the same stop again."""

    def __init__(self) -> None:
        self.signums: list[int] = []
        self._when = 0.0

    def is_new(self, signum: int) -> bool:
        """Whether this signal, which comes now, is another stop than the last; it counts from now on."""
        now = time.monotonic()
        if self.signums and signum == self.signums[-1] and now - self._when < SAME_SECONDS:
            return False
        self.signums.append(signum)
        self._when = now
        return True


class StopSignals:
    """Turns signals into `Stopped`: at once, or once the current training step is saved."""

    def __init__(self) -> None:
        self.received: int | None = None
        """The signal that came while stopping was put off."""
        self.progress: Callable[[], object] | None = None
        """What all ranks have done so far, which is equal only while none does anything; None for one rank,
        which waits for nobody."""
        self._put_off = False
        self._handled = Heard()
        self._is_heard, self._is_second = False, False
        """Whether a thread hears signals, and whether it has heard a second one."""

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
    def heard(self, end: Callable[[int, bool], None]) -> Iterator[None]:
        """While open, hear signals in a thread of its own, for a main thread that waits in a collective.

        Args:
            end: ends this process, whatever its main thread does; given the signal, and whether it was a
                second one (after which the main thread had `AT_ONCE_SECONDS`), or else that no rank has made
                progress for `QUIET_SECONDS` since the first.
        """
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        thread = threading.Thread(target=self._hear, args=(reader, end), daemon=True)
        thread.start()
        self._is_heard = True
        try:
            yield
        finally:
            self._is_heard = False
            signal.set_wakeup_fd(before)
            writer.close()  # which the thread hears as the end
            thread.join()
            reader.close()

    def _hear(self, reader: socket.socket, end: Callable[[int, bool], None]) -> None:
        """Each signal is one byte, its number, written by Python's own handler in C."""
        first, heard = _next(reader), Heard()
        if not first:
            return
        heard.is_new(first[0])
        moved, seen = time.monotonic(), self.progress and self.progress()
        reader.settimeout(LOOK_SECONDS)
        while True:
            with suppress(TimeoutError):
                second = _next(reader)
                if not second or heard.is_new(second[0]):
                    break
            if self.progress is None:
                continue
            now = self.progress()
            if now != seen:
                moved, seen = time.monotonic(), now
            elif time.monotonic() - moved >= QUIET_SECONDS:
                end(first[0], False)
        main, deadline = threading.main_thread().ident, time.monotonic() + AT_ONCE_SECONDS
        assert main is not None
        self._is_second = bool(second)  # empty: the main thread has ended
        reader.settimeout(AGAIN_SECONDS)
        while second and time.monotonic() < deadline:
            # its handler waited for this judgement; again and again, for one that comes right before the main
            # thread waits for something does not wake it
            signal.pthread_kill(main, second[0])
            with suppress(TimeoutError):
                while _next(reader):
                    pass
                return
        if second:
            end(second[0], True)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While open, the first signal is only noted; whoever opened it looks at `received`.

        Raises:
            Stopped: a signal came, and nobody looked.
        """
        self._put_off = True
        try:
            yield
        finally:
            self._put_off = False
        if self.received is not None:  # behind the last look at it
            raise Stopped(self.received)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        is_first = not self._handled.signums
        is_new = self._handled.is_new(signum)
        if is_first:
            if self._put_off:
                self.received = signum
                return
        elif self._is_heard:  # the thread knows when it came; here it may have waited for a collective
            is_new, self._is_second = self._is_second, False  # once: the next would break what cleans up
        if is_new:
            raise Stopped(signum)


def _next(reader: socket.socket) -> bytes:
    """The next signal that stops; none at the end. A library may have a handler of its own for another."""
    while (signum := reader.recv(1)) and signum[0] not in STOPPING:
        pass
    return signum


@contextmanager
def uninterrupted() -> Iterator[None]:
    """While open, the first signal is put off if `StopSignals` handles it. Compiled code that builds classes
    makes an error of its own of what a handler raises (pydantic: a SchemaError), so imports are done in here.

    Raises:
        Stopped: a signal came.
    """
    signals = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
    with signals.deferred() if isinstance(signals, StopSignals) else nullcontext():
        yield


def nobody_reads() -> None:
    """Let what is still written to stdout go nowhere: Python would tell at its end that a pipe is broken."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def leave_exit_code(code: int | str | None) -> None:
    """Note how this rank ended, for the scripts in launch/, where the launcher does not tell.

    torchrun ends with 1 whatever its ranks ended with; srun with the highest code, which is 75 when one rank
    crashed and the others were then stopped. From here on no signal can change how this process ends.
    """
    directory = os.environ.get("RLHF_EXIT_CODES")
    if directory is None:
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    with suppress(OSError):  # the run ended as it did, whether or not its launcher can be told
        (Path(directory) / f"rank{rank}").write_text(f"{code or 0}\n", encoding="utf-8")
