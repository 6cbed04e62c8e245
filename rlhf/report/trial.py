"""A trial of a sweep, for the sweep's table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rlhf.evaluation.sampled import Sampled
from rlhf.exit_codes import INTERRUPTED, STOPPED


@dataclass(frozen=True)
class Outcome:
    """How a trial ended."""

    code: int | None = None
    """Its exit code; None if it has not ended."""
    status: str = "unfinished"
    """`done`, `failed in STAGE`, `stopped in STAGE`, the last two without a stage if none had begun;
    `unfinished` if it is running or was killed."""
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    """Metrics of all its stages, `STAGE/NAME` -> value; None if not finite."""
    gates: tuple[str, ...] = ()
    """The metrics with a gate."""

    @property
    def can_continue(self) -> bool:
        """Whether the same command continues it."""
        return self.code in (None, STOPPED, INTERRUPTED)


@dataclass
class Trial:
    """A trial and its outcome."""

    number: int
    directory: Path
    """The directory of its run."""
    values: Mapping[str, str]
    """The overrides of the swept keys, in Hydra's grammar."""
    outcome: Outcome | None = None
    """None if it has not begun."""

    @property
    def overrides(self) -> list[str]:
        """The overrides as typed on the command line."""
        return [f"{key}={value}" for key, value in self.values.items()]

    @property
    def status(self) -> str:
        """How it ended, in words."""
        return self.outcome.status if self.outcome else "not started"

    def sampled(self, name: str) -> Sampled | None:
        """A metric with its interval; None if it has none."""
        stage, _, metric = name.partition("/")
        metrics = self.outcome.metrics if self.outcome else {}
        own = {key.removeprefix(f"{stage}/"): value for key, value in metrics.items() if value is not None}
        return Sampled.found(metric, own)

    def metric(self, name: str) -> float | None:
        """A metric; None if it was not measured or is not finite."""
        return self.outcome.metrics.get(name) if self.outcome else None
