"""Each rank says every second where it is, so that the others can name it when it is missing."""

from __future__ import annotations

import json
import threading
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
        own = self._file(self._compute.rank)
        now = own.stat().st_mtime
        seen = {}
        for rank in range(self._compute.world_size):
            file = self._file(rank)
            if file.exists():
                seen[rank] = (now - file.stat().st_mtime, json.loads(file.read_text()))
        mine = self._compute.at
        where = f"{mine.get('stage')}, step {mine.get('step')}"
        silent = [
            f"rank {rank} (last seen {age:.0f} s ago in {at.get('stage')}, step {at.get('step')})"
            for rank, (age, at) in seen.items()
            if age > STALE_SECONDS
        ]
        silent += [f"rank {r} (never seen)" for r in range(self._compute.world_size) if r not in seen]
        if silent:
            return f"{where}: rank {self._compute.rank} waited for {', '.join(silent)} in vain."
        behind = [
            f"rank {rank} (in {at.get('stage')}, step {at.get('step')})"
            for rank, (_, at) in seen.items()
            if rank != self._compute.rank and at != mine
        ]
        others = ", ".join(f"rank {rank}" for rank in seen if rank != self._compute.rank)
        elsewhere = f"; elsewhere: {', '.join(behind)}."
        network = f", at the same step: look at the network between this one and {others}."
        return (
            f"{where}: rank {self._compute.rank} lost another rank, or waited for it longer than "
            f"distributed.timeout={timeout:g} s. All ranks are alive" + (elsewhere if behind else network)
        )

    def _file(self, rank: int) -> Path:
        return self._directory / f"rank{rank}.json"

    def _beat(self) -> None:
        while True:
            beside = self._directory / f".rank{self._compute.rank}.json"
            beside.write_text(json.dumps(self._compute.at))
            beside.rename(self._file(self._compute.rank))
            if self._over.wait(INTERVAL_SECONDS):
                return
