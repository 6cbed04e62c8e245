"""How long a run will still take: as predicted at first, then corrected by what its steps take."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from rlhf.tracking.progress import clock

CHANGED = 1.5
"""The time left is said again if it is longer or shorter by this factor than was said last,"""
WORTH_SAYING = 30.0
"""and by so many seconds."""
FIRST_STEPS, FIRST_SECONDS = 3, 10.0
"""What a stage's steps take is believed after so many of them, and so many seconds."""
AS_PREDICTED = 30.0
"""So many seconds count as if they had been predicted rightly: short stages mostly load."""


class Forecast:
    """Compares what stages take with what was predicted. The rest is as much faster or slower."""

    def __init__(
        self, expected: Mapping[str, float], tell: Callable[..., None], log: Callable[[str], None]
    ) -> None:
        """
        Args:
            expected: stage -> seconds that it will take, in the order of the run.
            tell: hears what `status` shows, among it the seconds of the stages as they are expected now.
            log: prints a line.
        """
        self._expected, self._tell, self._log = dict(expected), tell, log
        self._taken = self._predicted = AS_PREDICTED
        self._stage, self._begun, self._steps = "", 0.0, 0
        self._said_end = time.monotonic() + sum(self._expected.values())

    def begin(self, stage: str) -> None:
        """A stage begins to run."""
        self._stage, self._begun, self._steps = stage, time.monotonic(), 0

    def hear(self, *, left: float | None, is_main: bool, **said: Any) -> None:
        """A task of the stage is further.

        Args:
            left: seconds until it ends, where that is known.
            is_main: the stage ends soon after this task.
        """
        self._tell(left=left, **said)
        if not is_main or left is None:
            return
        self._steps += 1
        if self._steps >= FIRST_STEPS and time.monotonic() - self._begun >= FIRST_SECONDS:
            self._correct(left)

    def end(self) -> None:
        """The stage is done."""
        if self._stage in self._expected:
            self._correct(0.0)
            self._taken += time.monotonic() - self._begun
            self._predicted += self._expected.pop(self._stage)
        self._stage = ""

    def _correct(self, left: float) -> None:
        """The stage takes `left` seconds more. So the later ones take as many times what was predicted as the
        ones so far did."""
        own = self._expected.get(self._stage, 0.0)
        if own == 0.0:
            return  # nothing is predicted of it
        now = time.monotonic()
        factor = (self._taken + now - self._begun + left) / (self._predicted + own)
        later = {name: factor * seconds for name, seconds in self._expected.items() if name != self._stage}
        self._tell(expected={self._stage: left, **later})
        total, said = left + sum(later.values()), max(0.0, self._said_end - now)
        is_other = max(total, said) > CHANGED * min(total, said)
        if total == 0 or not is_other or abs(total - said) < WORTH_SAYING:
            return
        self._said_end = now + total
        parts = [
            f"{name} {clock(seconds)}" for name, seconds in {self._stage: left, **later}.items() if seconds
        ]
        self._log(f"About {clock(total)} to go, by what it took so far: {', '.join(parts)}.")
