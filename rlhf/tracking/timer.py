"""Times the phases of a PPO step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class StepTimer:
    """Seconds per phase of one step, in the order in which the phases began."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time of the block to the phase `name`."""
        start = self._now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - start

    def taken(self) -> dict[str, float]:
        """The times as metrics `seconds_NAME`. Resets all times to 0."""
        seconds, self.seconds = self.seconds, {}
        return {f"seconds_{name}": value for name, value in seconds.items()}

    def _now(self) -> float:
        import torch

        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.monotonic()
