"""The time left in a run: first as predicted, then corrected by the measured time of its steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rlhf.tracking.progress import clock

MIN_CHANGE_FACTOR = 1.5
"""The time left is printed again if it differs from the last printed one by at least this factor,"""
MIN_CHANGE_SECONDS = 30.0
"""by at least these seconds,"""
MIN_CHANGE_SHARE = 0.1
"""and by at least this share of the time of all stages: near its end any run is late."""
MIN_TIMED_STEPS, MIN_TIMED_SECONDS = 3, 10.0
"""Steps and seconds after the first step before the time of a step is trusted. The first step also starts
engines and kernels, so it is not counted."""
PRIOR_SECONDS = 30.0
"""Seconds that count as predicted correctly in advance, so that short stages, which mostly load, weigh
little."""


class Prediction(NamedTuple):
    """How long a stage takes."""

    seconds: float
    """Seconds of the full stage; 0 if nothing is predicted."""
    spent: float = 0.0
    """Seconds of an earlier attempt that the newest checkpoint holds."""
    share: float = 0.0
    """Share of the steps that this checkpoint holds. The time left follows from it, not from `spent`, because
    the prediction may be far from the time spent."""

    def left(self, factor: float = 1.0) -> float:
        """Seconds left if the stage takes `factor` times as long as predicted."""
        return factor * self.seconds * (1.0 - self.share)


class Forecast:
    """Compares the time that stages take with the prediction. Later stages count as equally faster or
    slower."""

    def __init__(
        self, expected: Mapping[str, Prediction], tell: Callable[..., None], log: Callable[[str], None]
    ) -> None:
        """
        Args:
            expected: stages that will run, in the order of the run.
            tell: receives what `status` shows, such as the seconds that each stage is now expected to take.
            log: prints a line.
        """
        self._expected, self._tell, self._log = dict(expected), tell, log
        self._taken = self._predicted = PRIOR_SECONDS
        self._stage, self._begun = "", 0.0
        self._first: tuple[int, float] | None = None
        left = {name: each.left() for name, each in self._expected.items()}
        self._start = time.monotonic()
        self._announced_end = self._start + sum(left.values())
        if left:
            tell(expected=left, now=True)

    def begin(self, stage: str) -> None:
        """Note that a stage begins to run."""
        self._stage, self._begun, self._first = stage, time.monotonic(), None

    def update(self, *, done: int, total: int | None, is_main: bool, **position: Any) -> None:
        """Note that a task of the stage has advanced.

        Args:
            done: steps, including those of earlier attempts.
            is_main: the stage ends soon after this task.
        """
        self._tell(done=done, total=total, **position)
        if not is_main or total is None:
            return
        now = time.monotonic()
        first, begun = self._first = self._first or (done, now)
        if done - first >= MIN_TIMED_STEPS and now - begun >= MIN_TIMED_SECONDS:
            self._correct((now - begun) / (done - first) * (total - done))

    def end(self) -> None:
        """Note that the stage is done."""
        self._correct(0.0)
        own, taken = self._expected.pop(self._stage, Prediction(0.0)), time.monotonic() - self._begun
        if own.seconds:
            self._taken += own.spent + taken
            self._predicted += own.seconds
        else:
            self._announced_end += taken  # such as a stage that waits for people's labels

    def skip(self, stage: str) -> None:
        """Note that the stage does not run: another run has made its artifact."""
        own = self._expected.pop(stage, Prediction(0.0))
        self._announced_end -= own.left()

    def _correct(self, left: float) -> None:
        """Predict the later stages anew, given that this one takes `left` seconds more: they are expected
        to be off by the same factor as the stages so far. Print the new time left if it has changed
        enough."""
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
        total, printed = sum(parts.values()), max(0.0, self._announced_end - now)
        least = max(MIN_CHANGE_SECONDS, MIN_CHANGE_SHARE * (now - self._start + total))
        if (
            total == 0
            or abs(total - printed) < least
            or max(total, printed) < MIN_CHANGE_FACTOR * min(total, printed)
        ):
            return
        self._announced_end = now + total
        stages = ", ".join(f"{name} {clock(seconds)}" for name, seconds in parts.items() if seconds)
        self._log(f"About {clock(total)} to go, by what it took so far: {stages}.")
