"""Signals that stop a run. Training first finishes and saves its step; everything else ends at once.

Python calls signal handlers in the main thread, between two Python instructions. A rank that waits in a
collective executes none. So a second thread receives signals too: see `StopSignals.watchdog`.
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

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Signals of Ctrl-C; of a scheduler that ends the job; of a scheduler or submitit that warns before that."""


QUIET_SECONDS = 30.0
"""After a signal, a run of several ranks ends if no rank makes progress for this many seconds. On a GPU the
time is longer, because a running pass shows no progress there."""
FIRST_START_SECONDS, LONGEST_STEP_FACTOR = 180.0, 3.0
"""Lower bounds of that time on a GPU: the seconds in which NCCL connects the ranks of many hosts, and a
multiple of the longest step so far."""
SECOND_SIGNAL_SECONDS = 3.0
"""Seconds that Python has after a second signal to end by itself."""
RESEND_SECONDS = 0.1
"""Seconds after which the watchdog signals a main thread again that did not react to the second signal."""
REPETITION_SECONDS = 1.0
"""Seconds within which the same signal is a repetition. A control group signals the launcher and the ranks,
and the launcher passes the signal on to the ranks."""
CHECK_SECONDS = 1.0
"""Seconds between two checks of the ranks' progress."""


class Stopped(KeyboardInterrupt):
    """A signal stops the run. Finished stages and the last checkpoint are kept."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class ReceivedSignals:
    """The received signals, without repetitions."""

    def __init__(self) -> None:
        self.signums: list[int] = []
        self._when = 0.0

    def is_new(self, signum: int) -> bool:
        """Whether a signal that arrives now is no repetition. Remembers a new one."""
        now = time.monotonic()
        if self.signums and signum == self.signums[-1] and now - self._when < REPETITION_SECONDS:
            return False
        self.signums.append(signum)
        self._when = now
        return True


class StopSignals:
    """Raises `Stopped` on a signal: at once, or when the current training step is saved."""

    def __init__(self) -> None:
        self.received: int | None = None
        """The signal that arrived in `deferred`."""
        self.progress: Callable[[], object] | None = None
        """Gives the progress of all ranks: two results are equal only if no rank made progress in between.
        None for a single rank, which waits for no other."""
        self.on_gpu = False
        self.longest_step = 0.0
        """Seconds of the longest training step so far."""
        self._is_deferred = False
        self._received_signals = ReceivedSignals()
        self._has_watchdog, self._is_second = False, False
        """Whether the watchdog runs, and whether it has received a second signal."""

    @property
    def quiet_seconds(self) -> float:
        """Seconds that ranks may make no progress before the run counts as hung."""
        if not self.on_gpu:
            return QUIET_SECONDS
        return max(QUIET_SECONDS, FIRST_START_SECONDS, LONGEST_STEP_FACTOR * self.longest_step)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle stop signals while open."""
        with handled_by(self._handle):
            yield

    @contextmanager
    def watchdog(self, end: Callable[[int, bool], None]) -> Iterator[None]:
        """While open, a second thread receives signals too, because the main thread may wait in a collective.

        Args:
            end: ends this process, whatever its main thread does. It gets the signal and the reason. True:
                the main thread did not end within `SECOND_SIGNAL_SECONDS` after a second signal. False: no
                rank made progress for `quiet_seconds` after the first signal.
        """
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        thread = threading.Thread(target=self._watch, args=(reader, end), daemon=True)
        thread.start()
        self._has_watchdog = True
        try:
            yield
        finally:
            self._has_watchdog = False
            signal.set_wakeup_fd(before)
            writer.shutdown(socket.SHUT_WR)  # an end of file, also while a forked process holds the socket
            writer.close()
            thread.join()
            reader.close()

    def _watch(self, reader: socket.socket, end: Callable[[int, bool], None]) -> None:
        """Watch the socket, to which Python's C handler writes the number of each signal as one byte."""
        first, received = _next(reader), ReceivedSignals()
        if not first:
            return
        received.is_new(first[0])
        progress_time, last_progress = time.monotonic(), self.progress and self.progress()
        reader.settimeout(CHECK_SECONDS)
        while True:
            with suppress(TimeoutError):
                second = _next(reader)
                if not second or received.is_new(second[0]):
                    break
            if self.progress is None:
                continue
            now = self.progress()
            if now != last_progress:
                progress_time, last_progress = time.monotonic(), now
            elif time.monotonic() - progress_time >= self.quiet_seconds:
                end(first[0], False)
        main, deadline = threading.main_thread().ident, time.monotonic() + SECOND_SIGNAL_SECONDS
        assert main is not None
        self._is_second = bool(second)  # empty: the main thread closed the socket
        reader.settimeout(RESEND_SECONDS)
        while second and time.monotonic() < deadline:
            # again, because the handler raises only with `_is_second`; repeatedly, because a signal right
            # before the main thread begins to wait does not wake it
            signal.pthread_kill(main, second[0])
            with suppress(TimeoutError):
                while _next(reader):
                    pass
                return
        if second:
            end(second[0], True)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While open, the first signal is only stored. The caller must check `received`.

        Raises:
            Stopped: a signal arrived after the caller's last check.
        """
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False
        if self.received is not None:  # arrived after the caller's last check
            raise Stopped(self.received)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        is_first = not self._received_signals.signums
        is_new = self._received_signals.is_new(signum)
        if is_first:
            if self._is_deferred:
                self.received = signum
                return
        elif self._has_watchdog:  # it knows when the signal came; here a collective may have delayed it
            is_new, self._is_second = self._is_second, False  # once: another would interrupt the cleanup
        if is_new:
            raise Stopped(signum)


@contextmanager
def handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """While open, `handler` handles the stop signals. Python allows this only in the main thread: in another
    thread nothing changes, and a run there ends with its process."""
    is_main = threading.current_thread() is threading.main_thread()
    before = {signum: signal.signal(signum, handler) for signum in (STOP_SIGNALS if is_main else ())}
    try:
        yield
    finally:
        for signum, earlier in before.items():
            signal.signal(signum, earlier)


def _next(reader: socket.socket) -> bytes:
    """The next stop signal; empty at the end. Skips other signals, which a library may handle."""
    while (signum := reader.recv(1)) and signum[0] not in STOP_SIGNALS:
        pass
    return signum


@contextmanager
def uninterrupted() -> Iterator[None]:
    """While open, the first signal is deferred, if `StopSignals` handles it. Blocking signals in this thread
    is not enough: another thread receives them, and Python still calls the handler in the main thread.

    Use it around imports: compiled code that builds classes turns the handler's exception into its own error
    (pydantic: SchemaError). Use it around work that must not be interrupted.

    Raises:
        Stopped: a signal arrived.
    """
    signals = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
    with signals.deferred() if isinstance(signals, StopSignals) else nullcontext():
        yield


def discard_stdout() -> None:
    """Discard further output to stdout. Otherwise Python reports a broken pipe when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def leave_exit_code(code: int | str | None) -> None:
    """Write this rank's exit code for the scripts in launch/, because launchers do not report it.

    torchrun always ends with 1 if a rank failed. srun ends with the highest code, which is 75 if one rank
    crashed and the others were then stopped. After this call no signal can change the code.
    """
    if "RLHF_NOTES" in os.environ:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        _leave_note(f"rank{os.environ.get('RANK', os.environ.get('SLURM_PROCID', '0'))}", code or 0)


def leave_stop_seconds(seconds: float) -> None:
    """Write how long a stop takes, for launch/slurm.sbatch: it signals this long before the time limit."""
    if "RLHF_NOTES" in os.environ:
        _leave_note("stop_seconds", math.ceil(seconds))


def _leave_note(name: str, content: object) -> None:
    """Write a note to the directory that the scripts in launch/ read."""
    with suppress(OSError):  # a missing note must not change the run or its exit code
        (Path(os.environ["RLHF_NOTES"]) / name).write_text(f"{content}\n", encoding="utf-8")
