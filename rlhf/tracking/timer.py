"""Where a PPO step's time goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class StepTimer:
    """Seconds of each phase of one step, in the order in which they were first entered."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time what runs inside, as a part of the phase `name`."""
        start = self._now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - start

    def taken(self) -> dict[str, float]:
        """The times as `seconds_NAME`. After this call all times are 0 again."""
        seconds, self.seconds = self.seconds, {}
        return {f"seconds_{name}": value for name, value in seconds.items()}

    def _now(self) -> float:
        import torch

        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.monotonic()
