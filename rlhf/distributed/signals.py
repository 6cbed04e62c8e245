"""Signals: training finishes its step and saves it first; everything else ends at once.

Python calls signal handlers in the main thread, between two Python instructions. A rank that waits in a
collective executes none. So a second thread receives signals too: see `StopSignals.heard`.
"""

from __future__ import annotations

import math
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
"""Ctrl-C; a scheduler's order to end; a scheduler's and submitit's warning before that order."""


QUIET_SECONDS = 30.0
"""After a signal, a run of several ranks ends if no rank makes progress for this time. On a GPU the time is
longer, as nothing shows there that a pass goes on."""
FIRST_START_SECONDS, LONG_STEP = 180.0, 3.0
"""On a GPU: no less than this, in which NCCL joins the ranks of many hosts; nor than so many times the
longest step so far."""
AT_ONCE_SECONDS = 3.0
"""Time that Python has after a second signal to end by itself and report it."""
AGAIN_SECONDS = 0.1
"""Time between two signals from the thread to a main thread that has not reacted to the second signal."""
SAME_SECONDS = 1.0
"""The same signal again within this time is the same stop. A control group sends it to the launcher and to
the ranks, and the launcher passes it on to the ranks too."""
LOOK_SECONDS = 1.0
"""Time between two checks of the ranks' progress."""


class Stopped(KeyboardInterrupt):
    """The run was asked to end. What was finished, and the last checkpoint, are kept."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Heard:
    """The signals that came, without repetitions of the same stop."""

    def __init__(self) -> None:
        self.signums: list[int] = []
        self._when = 0.0

    def is_new(self, signum: int) -> bool:
        """Whether this signal, which comes now, is a new stop. If it is, remember it."""
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
        """The signal that came while stopping was deferred."""
        self.progress: Callable[[], object] | None = None
        """What all ranks have done so far: two results are equal only if no rank did anything in between.
        None for one rank, which waits for nobody."""
        self.on_gpu = False
        self.longest_step = 0.0
        """Seconds of the longest training step so far."""
        self._put_off = False
        self._handled = Heard()
        self._is_heard, self._is_second = False, False
        """Whether a thread hears signals, and whether it has heard a second one."""

    @property
    def quiet_seconds(self) -> float:
        """How long no rank makes progress in a run that is still at work."""
        if not self.on_gpu:
            return QUIET_SECONDS
        return max(QUIET_SECONDS, FIRST_START_SECONDS, LONG_STEP * self.longest_step)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle them while open."""
        with handled_by(self._handle):
            yield

    @contextmanager
    def heard(self, end: Callable[[int, bool], None]) -> Iterator[None]:
        """While open, a second thread receives signals too, because the main thread may wait in a collective.

        Args:
            end: ends this process, whatever its main thread does. It gets the signal, and the reason: true if
                it was a second signal and the main thread did not end within `AT_ONCE_SECONDS`; false if no
                rank made progress for `quiet_seconds` after the first signal.
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
            writer.shutdown(socket.SHUT_WR)  # the thread hears the end, also while a forked process holds it
            writer.close()
            thread.join()
            reader.close()

    def _hear(self, reader: socket.socket, end: Callable[[int, bool], None]) -> None:
        """Python's own handler in C writes each signal as one byte: its number."""
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
            elif time.monotonic() - moved >= self.quiet_seconds:
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
        """While open, the first signal is only noted. The caller must look at `received`.

        Raises:
            Stopped: a signal came after the last look.
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


@contextmanager
def handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """While open, this is called for the signals that stop a run. Python lets the main thread alone do this:
    a run in another one ends with its process."""
    is_main = threading.current_thread() is threading.main_thread()
    before = {signum: signal.signal(signum, handler) for signum in (STOPPING if is_main else ())}
    try:
        yield
    finally:
        for signum, earlier in before.items():
            signal.signal(signum, earlier)


def _next(reader: socket.socket) -> bytes:
    """The next signal that stops; empty at the end. Other signals may have a handler of a library."""
    while (signum := reader.recv(1)) and signum[0] not in STOPPING:
        pass
    return signum


@contextmanager
def uninterrupted() -> Iterator[None]:
    """While open, the first signal is deferred, if `StopSignals` handles it. To block signals in this thread
    is not enough: another thread receives them, and Python still calls the handler in the main one.

    Use it around imports: compiled code that builds classes turns what a handler raises into its own error
    (pydantic: a SchemaError). Use it around what must be done whole.

    Raises:
        Stopped: a signal came.
    """
    signals = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
    with signals.deferred() if isinstance(signals, StopSignals) else nullcontext():
        yield


def nobody_reads() -> None:
    """Discard further output to stdout. Otherwise Python reports a broken pipe at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def leave_exit_code(code: int | str | None) -> None:
    """Write down how this rank ended, for the scripts in launch/, because the launchers do not report it.

    torchrun always ends with 1 if a rank failed. srun ends with the highest code, which is 75 if one rank
    crashed and the others were then stopped. After this call no signal can change how this process ends.
    """
    if "RLHF_NOTES" in os.environ:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        _leave_note(f"rank{os.environ.get('RANK', os.environ.get('SLURM_PROCID', '0'))}", code or 0)


def leave_stop_seconds(seconds: float) -> None:
    """Note how long a stop takes, for launch/slurm.sbatch, which signals that long before the time limit."""
    if "RLHF_NOTES" in os.environ:
        _leave_note("stop_seconds", math.ceil(seconds))


def _leave_note(name: str, content: object) -> None:
    """Write to the directory where the scripts in launch/ look for what ranks tell them."""
    with suppress(OSError):  # the run goes on, or ended as it did, whether or not its launcher can be told
        (Path(os.environ["RLHF_NOTES"]) / name).write_text(f"{content}\n", encoding="utf-8")
