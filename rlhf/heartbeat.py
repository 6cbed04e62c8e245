"""Each rank says every second where it is, so that the others can name it when it is missing."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import TracebackType

from rlhf.distributed import Compute

INTERVAL_SECONDS = 1.0
STALE_SECONDS = 5.0
"""Behind the reader's own last beat, by the file system's clock: those of the hosts may differ."""


class Heartbeat:
    """A thread that writes RUN_DIR/ranks/rankN.json while the run lasts, where there are several ranks."""

    def __init__(self, directory: Path, compute: Compute) -> None:
        self._directory, self._compute = directory, compute
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Heartbeat:
        if self._compute.world_size > 1:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def explain(self, timeout: float) -> str:
        """Which rank is missing, and in which stage and step it and this one are."""
        deadline = time.monotonic() + STALE_SECONDS + 2 * INTERVAL_SECONDS
        while not (silent := self._silent()) and time.monotonic() < deadline:  # it may just have died
            time.sleep(INTERVAL_SECONDS / 4)
        mine, rank = self._compute.at, self._compute.rank
        where = f"{mine.get('stage')}, step {mine.get('step')}"
        if silent:
            return f"{where}: rank {rank} waited for {', '.join(silent)} in vain."
        others = [
            f"rank {other} (in {at.get('stage')}, step {at.get('step')})"
            for other in range(self._compute.world_size)
            if other != rank and (at := json.loads(self._file(other).read_text(encoding="utf-8")))
        ]
        return (
            f"{where}: rank {rank} waited longer than distributed.timeout={timeout:g} s, all alive: "
            f"{', '.join(others)}. Where the steps differ one hangs; where not, see the network."
        )

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

    def _beat(self) -> None:
        while True:
            beside = self._directory / f".rank{self._compute.rank}.json"
            beside.write_text(json.dumps(self._compute.at), encoding="utf-8")
            beside.rename(self._file(self._compute.rank))
            if self._over.wait(INTERVAL_SECONDS):
                return
