"""Each rank writes its position and progress every second, so that others can name a missing rank.

*Progress* is everything that a rank cannot do while it hangs: steps, micro-batches, tokens of a response,
finished collectives (rank 0 calls one every second while the others wait for its work), and bytes that its
main thread reads or writes. On a CPU the thread's CPU seconds count too. On a GPU they do not, because a
thread that waits for a GPU also uses the CPU.
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
"""A rank is missing if its last beat is this much older than the reader's own. Compares file times, because
the clocks of the hosts may differ."""
NCCL_TIMEOUT_SHARE = 0.9
"""Share of `distributed.timeout` after which a waiting rank on a GPU is taken for hung. A wait in NCCL cannot
be interrupted: after the full time NCCL's watchdog aborts the process, without naming the missing rank."""


class Heartbeat:
    """A thread that writes RUN_DIR/ranks/rankN.json during the run, if there are several ranks."""

    def __init__(self, directory: Path, compute: Compute, on_hang: Callable[[str], object]) -> None:
        """
        Args:
            on_hang: called once, by another thread, with the reason from `explain`. It is called if the main
                thread made no progress for `compute.timeout` within `compute.limited`. On a GPU it is also
                called after `NCCL_TIMEOUT_SHARE` of that time without progress, if a rank is missing.
        """
        self._directory, self._compute, self._on_hang = directory, compute, on_hang
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._beats, self._has_reported = 0, False
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
        """The last report of each rank. Two results are equal if no rank made progress in between."""
        reports = [""] * self._compute.world_size
        for rank in range(self._compute.world_size):
            with suppress(OSError):  # no file yet, or replaced on another host while NFS reads it
                reports[rank] = self._file(rank).read_text(encoding="utf-8")
        return reports

    def explain(self) -> str:
        """Names the missing rank, with the stage and step of that rank and of this one."""
        deadline = time.monotonic() + STALE_SECONDS + 2 * INTERVAL_SECONDS
        while not (missing_ranks := self._missing()) and time.monotonic() < deadline:  # it may just have died
            time.sleep(INTERVAL_SECONDS / 4)
        rank = self._compute.rank
        if missing_ranks:
            return f"{self.place}: rank {rank} waited for {', '.join(missing_ranks)} in vain."
        return (
            f"{self.place}: rank {rank} waited longer than distributed.timeout={self._compute.timeout:g} s, "
            f"all alive: {self.others()}. Where the steps differ one hangs; where not, see the network."
        )

    @property
    def place(self) -> str:
        """Stage and step of this rank, in words."""
        return f"{self._compute.position.get('stage')}, step {self._compute.position.get('step')}"

    def others(self) -> str:
        """Stage and step of the other ranks; for a missing rank, when and where it was last seen."""
        positions = [json.loads(text) if text else {} for text in self.progress()]
        missing_ranks = self._missing()
        described = []
        for rank, at in enumerate(positions):
            if rank != self._compute.rank:
                last_seen = [words for words in missing_ranks if words.startswith(f"rank {rank} ")]
                described += last_seen or [f"rank {rank} (in {at.get('stage')}, step {at.get('step')})"]
        return ", ".join(described)

    def _is_missing(self) -> bool:
        """Whether a rank is missing. False if the files cannot be read now."""
        with suppress(OSError, ValueError):  # as in `progress`; the next beat looks again
            return bool(self._missing())
        return False

    def _missing(self) -> list[str]:
        """Ranks whose last beat is older than this rank's by more than `STALE_SECONDS`."""
        now = self._file(self._compute.rank).stat().st_mtime
        missing_ranks = []
        for rank in range(self._compute.world_size):
            file = self._file(rank)
            if not file.exists():
                missing_ranks.append(f"rank {rank} (never seen)")
            elif (age := now - file.stat().st_mtime) > STALE_SECONDS:
                at = json.loads(file.read_text(encoding="utf-8"))
                seen = f"last seen {age:.0f} s ago in {at.get('stage')}, step {at.get('step')}"
                missing_ranks.append(f"rank {rank} ({seen})")
        return missing_ranks

    def _file(self, rank: int) -> Path:
        return self._directory / f"rank{rank}.json"

    def _report(self) -> dict[str, Any]:
        report = {**self._compute.position, "bytes": bytes_moved(self._main)}
        report.pop("limited", None)
        if self._compute.device.type == "cpu":
            assert self._main.ident is not None
            report["cpu"] = int(time.clock_gettime(time.pthread_getcpuclockid(self._main.ident)))
        if report.pop("busy", False):
            self._beats += 1
        return report | {"beats": self._beats}

    def _beat(self) -> None:
        quiet_beats, moves = 0, None
        while True:
            with suppress(OSError):  # such as a full disk: then this rank looks missing
                replace_text(self._file(self._compute.rank), json.dumps(self._report()))
            if self._over.wait(INTERVAL_SECONDS):
                return
            # counts beats and not time: a clock would run on while the whole process is suspended
            position, limit = self._compute.position, self._compute.timeout
            is_limited = position.get("limited", False)
            in_nccl = not is_limited and self._compute.device.type == "cuda" and not position.get("busy")
            now = position.get("moves", 0) if is_limited or in_nccl else None
            quiet_beats, moves = (0, now) if now is None or now != moves else (quiet_beats + 1, moves)
            is_hung = quiet_beats * INTERVAL_SECONDS >= (NCCL_TIMEOUT_SHARE * limit if in_nccl else limit)
            if is_hung and not self._has_reported and (is_limited or self._is_missing()):
                self._has_reported = True
                threading.Thread(target=lambda: self._on_hang(self.explain()), daemon=True).start()


def bytes_moved(thread: threading.Thread) -> int:
    """Bytes that a thread of this process has read and written so far; 0 if the kernel does not tell."""
    try:
        words = Path(f"/proc/self/task/{thread.native_id}/io").read_text(encoding="ascii").split()
    except OSError:
        return 0
    return int(words[1]) + int(words[3])  # rchar: N wchar: N ...
