"""Progress with an ETA: a live panel on a terminal, sparse lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.progress import Task as RichTask
from rich.text import Text

Item = TypeVar("Item")
LINE_EVERY_SECONDS = 20.0
PANEL_METRICS = (
    "score", "kl", "stop_rate", "loss", "accuracy", "margin", "grad_norm", "lr", "explained_variance",
)  # fmt: skip
"""Metrics for the live panel. It shows the first three that a stage logs."""
MIN_BAR_COLUMNS = 60
"""Smallest width of a terminal, in characters, for progress bars."""


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Task:
    """Counts the finished items of one loop."""

    def __init__(self, progress: Progress, label: str, total: int | None, *, is_main: bool) -> None:
        self._progress, self._label, self._total, self._done = progress, label, total, 0
        self._earlier, self._is_main = 0, is_main
        self._start = self._last_line = time.monotonic()
        self._bar = None
        if progress.live is not None:
            short_label = label.removeprefix(f"{progress.live.stage}: ")
            self._bar = progress.live.add_task(escape(short_label), total=total)

    def skip(self, count: int) -> None:
        """Count items that an earlier attempt did. The estimate of the time left ignores them."""
        self._done, self._earlier = self._done + count, self._earlier + count
        if self._progress.live and self._bar is not None:
            self._progress.live.reset(self._bar, completed=self._done)

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` more items. A printed line ends with `note`; the panel shows `Progress.figures`."""
        self._done += count
        now, left = time.monotonic(), None
        if self._total is not None and self._done > self._earlier:
            left = (now - self._start) / (self._done - self._earlier) * (self._total - self._done)
        self._progress.tell(
            task=self._label, done=self._done, total=self._total, left=left, is_main=self._is_main
        )
        if self._progress.live and self._bar is not None:
            self._progress.live.update(self._bar, advance=count)
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
        """Remove the bar."""
        if self._progress.live and self._bar is not None:
            self._progress.live.remove_task(self._bar)


class TimeLeft(TimeRemainingColumn):
    """The time left, followed by "left"; empty if the total is unknown."""

    def render(self, task: RichTask) -> Text:
        """Render like rich, and append "left"."""
        time_left = super().render(task)
        return time_left.append(" left") if time_left.plain else time_left


class StagePanel(RichProgress):
    """The live panel of a stage: its tasks with the time left, three metrics, and memory."""

    def __init__(self, stage: str, console: Console, memory: Callable[[], float] | None) -> None:
        self.stage, self._memory = stage, memory  # first: rich draws the panel in its own __init__
        self.figures: list[str] = []
        bars = () if console.width < MIN_BAR_COLUMNS else (BarColumn(bar_width=None),)
        super().__init__(
            TextColumn("{task.description}"), *bars, MofNCompleteColumn(), TimeLeft(compact=True),
            console=console, transient=True, refresh_per_second=4, expand=bool(bars),
        )  # fmt: skip

    def get_renderables(self) -> Iterable[RenderableType]:
        """What rich draws: tasks, metrics and memory."""
        parts: list[RenderableType] = [self.make_tasks_table(self.tasks)] if self.tasks else []
        memory = [] if self._memory is None else [f"memory {self._memory() / 2**30:.2f} GiB"]
        parts.append(Columns([Text(each) for each in (*self.figures, *memory)], padding=(0, 3)))
        yield Panel(Group(*parts), title=escape(self.stage), title_align="left", border_style="dim")


class Progress:
    """Makes tasks, and shows them in a panel on a terminal, or as single lines elsewhere."""

    def __init__(
        self,
        console: Console,
        tell: Callable[..., None] = lambda **said: None,
        memory: Callable[[], float] | None = None,
    ) -> None:
        """
        Args:
            tell: called with the progress of every task: see rlhf/pipeline/forecast.py.
            memory: gives the bytes that this rank holds now; None hides them.
        """
        self.console, self.tell, self._memory = console, tell, memory
        self.live: StagePanel | None = None

    def figures(self, metrics: Mapping[str, float]) -> None:
        """Show the three most important metrics of a step."""
        if self.live is not None:
            names = [name for name in PANEL_METRICS if name in metrics][:3]
            if names:
                self.live.figures = [f"{name} {metrics[name]:.3g}" for name in names]

    @contextmanager
    def shown(self, stage: str = "") -> Iterator[None]:
        """While open, a live panel shows the tasks (on a terminal)."""
        if not self.console.is_terminal:
            yield
            return
        with StagePanel(stage, self.console, self._memory) as self.live:
            try:
                yield
            finally:
                self.live = None

    @contextmanager
    def task(self, label: str, total: int | None, *, is_main: bool = False) -> Iterator[Task]:
        """A counted task, removed when the block ends.

        Args:
            total: number of items; None if unknown.
            is_main: whether it is most of its stage's work, so that the stage ends soon after it.
        """
        task = Task(self, label, total, is_main=is_main)
        try:
            yield task
        finally:
            task.close()

    def track(self, items: Iterable[Item], label: str, total: int) -> Iterator[Item]:
        """Yield the items. Count each one when the next is requested."""
        with self.task(label, total) as task:
            for item in items:
                yield item
                task.advance()
