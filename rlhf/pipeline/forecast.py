"""How long a run will still take: as predicted at first, then corrected by what its steps take."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rlhf.tracking.progress import clock

CHANGED = 1.5
"""The time left is said again if it is longer or shorter by this factor than was said last,"""
WORTH_SAYING = 30.0
"""by so many seconds,"""
SHARE_OF_RUN = 0.1
"""and by this share of what all stages take: near its end any run is late."""
FIRST_STEPS, FIRST_SECONDS = 3, 10.0
"""What a step takes is believed after so many steps and seconds behind the first one, which also starts
engines and kernels."""
AS_PREDICTED = 30.0
"""So many seconds count as if they had been predicted rightly: short stages mostly load."""


class Prediction(NamedTuple):
    """What a stage takes."""

    seconds: float
    """Of all of it; 0 where nothing is predicted."""
    spent: float = 0.0
    """Seconds of an earlier attempt that its newest checkpoint holds,"""
    share: float = 0.0
    """and the share of the steps. What is left follows from this one: what was predicted may be far from what
    was spent."""

    def left(self, factor: float = 1.0) -> float:
        """If it takes so many times as long as was predicted."""
        return factor * self.seconds * (1.0 - self.share)


class Forecast:
    """Compares what stages take with what was predicted. The rest is as much faster or slower."""

    def __init__(
        self, expected: Mapping[str, Prediction], tell: Callable[..., None], log: Callable[[str], None]
    ) -> None:
        """
        Args:
            expected: stages that will run, in the order of the run.
            tell: hears what `status` shows, among it the seconds of the stages as they are expected now.
            log: prints a line.
        """
        self._expected, self._tell, self._log = dict(expected), tell, log
        self._taken = self._predicted = AS_PREDICTED
        self._stage, self._begun = "", 0.0
        self._first: tuple[int, float] | None = None
        left = {name: each.left() for name, each in self._expected.items()}
        self._start = time.monotonic()
        self._said_end = self._start + sum(left.values())
        if left:
            tell(expected=left, now=True)

    def begin(self, stage: str) -> None:
        """A stage begins to run."""
        self._stage, self._begun, self._first = stage, time.monotonic(), None

    def hear(self, *, done: int, total: int | None, is_main: bool, **said: Any) -> None:
        """A task of the stage is further.

        Args:
            done: steps, those of earlier attempts too.
            is_main: the stage ends soon after this task.
        """
        self._tell(done=done, total=total, **said)
        if not is_main or total is None:
            return
        now = time.monotonic()
        first, begun = self._first = self._first or (done, now)
        if done - first >= FIRST_STEPS and now - begun >= FIRST_SECONDS:
            self._correct((now - begun) / (done - first) * (total - done))

    def end(self) -> None:
        """The stage is done."""
        self._correct(0.0)
        own, taken = self._expected.pop(self._stage, Prediction(0.0)), time.monotonic() - self._begun
        if own.seconds:
            self._taken += own.spent + taken
            self._predicted += own.seconds
        else:
            self._said_end += taken  # such as people's, who label

    def skip(self, stage: str) -> None:
        """The stage does not run: another run has made what it would make."""
        own = self._expected.pop(stage, Prediction(0.0))
        self._said_end -= own.left()

    def _correct(self, left: float) -> None:
        """The stage takes `left` seconds more. So the later ones take as many times what was predicted as the
        ones so far did."""
        own = self._expected.get(self._stage, Prediction(0.0))
        if not own.seconds:
            return
        now = time.monotonic()
        taken = self._taken + own.spent + now - self._begun + left
        factor = taken / (self._predicted + own.seconds)
        parts = {self._stage: left} | {
            name: each.left(factor) for name, each in self._expected.items() if name != self._stage
        }
        self._tell(expected=parts)
        total, said = sum(parts.values()), max(0.0, self._said_end - now)
        least = max(WORTH_SAYING, SHARE_OF_RUN * (now - self._start + total))
        if total == 0 or abs(total - said) < least or max(total, said) < CHANGED * min(total, said):
            return
        self._said_end = now + total
        stages = ", ".join(f"{name} {clock(seconds)}" for name, seconds in parts.items() if seconds)
        self._log(f"About {clock(total)} to go, by what it took so far: {stages}.")
