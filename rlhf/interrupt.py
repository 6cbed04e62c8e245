"""Signals: what trains finishes its step and saves first; everything else ends at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
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
        if self._put_off and self.received is None:
            self.received = signum
            return
        raise Stopped(signum)


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
