"""A trial of a sweep, as its table shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rlhf.exit_codes import INTERRUPTED, STOPPED


@dataclass(frozen=True)
class Outcome:
    """How a trial ended."""

    code: int | None = None
    """Its exit code; None as long as it has not said."""
    status: str = "unfinished"
    """`done`, `failed in STAGE`, `stopped in STAGE`, or without a stage where none had begun; `unfinished` is
    running, or was killed."""
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    """Of all its stages, by `STAGE/NAME`; null where not finite."""
    gates: tuple[str, ...] = ()
    """The metrics that have a bound."""

    @property
    def goes_on(self) -> bool:
        """Whether the same command goes on with it."""
        return self.code in (None, STOPPED, INTERRUPTED)


@dataclass
class Trial:
    """A trial that was planned, and what became of it."""

    number: int
    directory: Path
    """Its run's."""
    values: Mapping[str, str]
    """Of the swept keys, in Hydra's grammar."""
    outcome: Outcome | None = None
    """None as long as it has not begun."""

    @property
    def overrides(self) -> list[str]:
        """As on the command line."""
        return [f"{key}={value}" for key, value in self.values.items()]

    @property
    def status(self) -> str:
        """In words."""
        return self.outcome.status if self.outcome else "not started"

    def metric(self, name: str) -> float | None:
        """None where it was not measured, or is not finite."""
        return self.outcome.metrics.get(name) if self.outcome else None
