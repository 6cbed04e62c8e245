"""Progress with an ETA: a live bar on a terminal, sparse lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

Item = TypeVar("Item")
LINE_EVERY_SECONDS = 20.0


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Task:
    """Counts the progress of one loop."""

    def __init__(self, progress: Progress, label: str, total: int | None) -> None:
        self._progress, self._label, self._total, self._done = progress, label, total, 0
        self._earlier = 0
        self._start = self._last_line = time.monotonic()
        self._bar = progress.live.add_task(label, total=total, note="") if progress.live else None

    def skip(self, count: int) -> None:
        """Count what an earlier attempt did. The estimate of the time left does not use it."""
        self._done, self._earlier = self._done + count, self._earlier + count
        if self._progress.live and self._bar is not None:
            self._progress.live.reset(self._bar, completed=self._done)

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` more as done; `note` is shown beside the bar."""
        self._done += count
        now, left = time.monotonic(), None
        if self._total is not None and self._done > self._earlier:
            left = (now - self._start) / (self._done - self._earlier) * (self._total - self._done)
        self._progress.tell(task=self._label, done=self._done, total=self._total, left=left)
        if self._progress.live and self._bar is not None:
            self._progress.live.update(self._bar, advance=count, note=note)
            return
        if now - self._last_line < LINE_EVERY_SECONDS:
            return
        self._last_line = now
        if left is None:
            self._progress.console.print(f"  {self._label} {self._done}  {note}", highlight=False)
        elif left > 0:
            self._progress.console.print(
                f"  {self._label} {self._done}/{self._total}, {clock(left)} left  {note}", highlight=False
            )

    def close(self) -> None:
        """Take the bar away."""
        if self._progress.live and self._bar is not None:
            self._progress.live.remove_task(self._bar)


class Progress:
    """Makes tasks. On a terminal they are bars, elsewhere single lines."""

    def __init__(self, console: Console, tell: Callable[..., None] = lambda **said: None) -> None:
        """
        Args:
            tell: hears of every task how far it is: see rlhf/tracking/position.py.
        """
        self.console, self.tell = console, tell
        self.live: RichProgress | None = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """While open, tasks are drawn as live bars (on a terminal)."""
        if not self.console.is_terminal:
            yield
            return
        columns = (
            TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("eta"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        with RichProgress(*columns, console=self.console, transient=True) as self.live:
            try:
                yield
            finally:
                self.live = None

    @contextmanager
    def task(self, label: str, total: int | None) -> Iterator[Task]:
        """A counted task, removed when the block ends. Without a total nobody knows how much there is."""
        task = Task(self, label, total)
        try:
            yield task
        finally:
            task.close()

    def track(self, items: Iterable[Item], label: str, total: int) -> Iterator[Item]:
        """Yield items, counting each one once it has been worked on."""
        with self.task(label, total) as task:
            for item in items:
                yield item
                task.advance()
