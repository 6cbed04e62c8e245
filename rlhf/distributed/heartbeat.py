"""Each rank writes every second where it is and what it did. So the others can name a rank that is missing.

What it did, its *progress*, is everything that a rank that hangs does not do: steps, micro-batches, tokens of
a response, finished collectives (rank 0 calls one every second while the others wait for its work), and bytes
that its main thread reads or writes. On a CPU the thread's seconds of computing count too. On a GPU they do
not, because a thread that waits for a GPU also uses the CPU.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from rlhf.disk import replace_text
from rlhf.distributed.compute import Compute

INTERVAL_SECONDS = 1.0
STALE_SECONDS = 5.0
"""A rank is missing if its last beat is this much older than the reader's own. The file system's clock
counts, because the clocks of the hosts may differ."""
BEFORE_NCCL = 0.9
"""Of `distributed.timeout`. On a GPU a rank that waits cannot be interrupted: after the whole time NCCL's
watchdog would abort the process, and nobody would say which rank is missing."""


class Heartbeat:
    """A thread that writes RUN_DIR/ranks/rankN.json during the run, if there are several ranks."""

    def __init__(self, directory: Path, compute: Compute, hung: Callable[[str], object]) -> None:
        """
        Args:
            hung: called once, by another thread, if the main thread has not moved for `compute.timeout` while
                it is `compute.limited`; on a GPU also if it has not for most of that, and a rank is missing.
                It gets the reason, as `explain` gives it.
        """
        self._directory, self._compute, self._hung = directory, compute, hung
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._beats, self._told = 0, False
        self._main = threading.main_thread()

    def __enter__(self) -> Heartbeat:
        if self._compute.world_size > 1:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def progress(self) -> list[str]:
        """The last report of each rank. Two results are equal if no rank did anything in between."""
        said = [""] * self._compute.world_size
        for rank in range(self._compute.world_size):
            with suppress(OSError):  # not there yet, or replaced on another host while NFS reads it
                said[rank] = self._file(rank).read_text(encoding="utf-8")
        return said

    def explain(self) -> str:
        """Which rank is missing, and the stage and step of that rank and of this one."""
        deadline = time.monotonic() + STALE_SECONDS + 2 * INTERVAL_SECONDS
        while not (silent := self._silent()) and time.monotonic() < deadline:  # it may just have died
            time.sleep(INTERVAL_SECONDS / 4)
        rank = self._compute.rank
        if silent:
            return f"{self.place}: rank {rank} waited for {', '.join(silent)} in vain."
        return (
            f"{self.place}: rank {rank} waited longer than distributed.timeout={self._compute.timeout:g} s, "
            f"all alive: {self.others()}. Where the steps differ one hangs; where not, see the network."
        )

    @property
    def place(self) -> str:
        """Where this rank is."""
        return f"{self._compute.position.get('stage')}, step {self._compute.position.get('step')}"

    def others(self) -> str:
        """Where the other ranks are, or where they were last seen."""
        said = [json.loads(text) if text else {} for text in self.progress()]
        silent = self._silent()
        found = []
        for rank, at in enumerate(said):
            if rank != self._compute.rank:
                missing = [words for words in silent if words.startswith(f"rank {rank} ")]
                found += missing or [f"rank {rank} (in {at.get('stage')}, step {at.get('step')})"]
        return ", ".join(found)

    def _is_missing(self) -> bool:
        """Whether a rank is silent; no, if that cannot be read now."""
        with suppress(OSError, ValueError):  # as in `progress`; the next beat looks again
            return bool(self._silent())
        return False

    def _silent(self) -> list[str]:
        """Ranks whose last sign of life is much older than this one's."""
        now = self._file(self._compute.rank).stat().st_mtime
        silent = []
        for rank in range(self._compute.world_size):
            file = self._file(rank)
            if not file.exists():
                silent.append(f"rank {rank} (never seen)")
            elif (age := now - file.stat().st_mtime) > STALE_SECONDS:
                at = json.loads(file.read_text(encoding="utf-8"))
                seen = f"last seen {age:.0f} s ago in {at.get('stage')}, step {at.get('step')}"
                silent.append(f"rank {rank} ({seen})")
        return silent

    def _file(self, rank: int) -> Path:
        return self._directory / f"rank{rank}.json"

    def _said(self) -> dict[str, Any]:
        said = {**self._compute.position, "bytes": bytes_moved(self._main)}
        said.pop("limited", None)
        if self._compute.device.type == "cpu":
            assert self._main.ident is not None
            said["cpu"] = int(time.clock_gettime(time.pthread_getcpuclockid(self._main.ident)))
        if said.pop("busy", False):
            self._beats += 1
        return said | {"beats": self._beats}

    def _beat(self) -> None:
        quiet, moves = 0, None
        while True:
            with suppress(OSError):  # a full disk, say: others hear nothing of this rank until it has room
                replace_text(self._file(self._compute.rank), json.dumps(self._said()))
            if self._over.wait(INTERVAL_SECONDS):
                return
            # beats count, not a clock: it would go on while somebody stops the whole run for a while
            at, limit = self._compute.position, self._compute.timeout
            is_limited = at.get("limited", False)
            by_nccl = not is_limited and self._compute.device.type == "cuda" and not at.get("busy")
            now = at.get("moves", 0) if is_limited or by_nccl else None
            quiet, moves = (0, now) if now is None or now != moves else (quiet + 1, moves)
            is_over = quiet * INTERVAL_SECONDS >= (BEFORE_NCCL * limit if by_nccl else limit)
            if is_over and not self._told and (is_limited or self._is_missing()):
                self._told = True
                threading.Thread(target=lambda: self._hung(self.explain()), daemon=True).start()


def bytes_moved(thread: threading.Thread) -> int:
    """Bytes that a thread of this process has read and written so far; 0 if the kernel does not say."""
    try:
        words = Path(f"/proc/self/task/{thread.native_id}/io").read_text(encoding="ascii").split()
    except OSError:
        return 0
    return int(words[1]) + int(words[3])  # rchar: N wchar: N ...
