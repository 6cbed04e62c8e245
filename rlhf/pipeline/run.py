"""One invocation: its directory, how its stages ended, and its gates."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf.config import Bound, ConfigError
from rlhf.disk import replace_text
from rlhf.evaluation.sampled import Sampled
from rlhf.locks import HeldError, Lock
from rlhf.pipeline.defaults import Change
from rlhf.pipeline.graph import inputs
from rlhf.pipeline.metrics import healthy_curves
from rlhf.pipeline.store import Artifact
from rlhf.tracking.redaction import redacted

if TYPE_CHECKING:
    from rlhf.pipeline.stage import Stage

NO_VERDICT = "It is done. Nothing in it is judged."
"""The verdict of a run that makes no model, such as one of `stage=plan`."""
OUTCOMES = {
    "worked": "It worked.",
    "no gain worth having": "No gain worth having.",
    "did not work": "It did not work.",
    "cannot be told": "Whether it worked cannot be told.",
}
"""`Run.outcome` -> the sentence that comes before the verdict."""
GateOutcome = Literal["passed", "failed", "cannot tell", "not checked"]
MIN_ROWS = 8
"""Fewest rows from which the number of further rows to decide a gate is estimated."""
MAX_ROWS_FACTOR = 100
"""Largest factor by which more rows are plainly advised: a difference that needs more does not matter."""


@dataclass(frozen=True)
class GateResult:
    """One summary metric against its bound."""

    stage: str
    name: str
    value: float
    bound: Bound
    sampled: Sampled | None = None
    """The value with its interval, if it was measured on a sample of rows."""
    not_checked: str | None = None
    """Why the bound does not apply here."""

    @property
    def outcome(self) -> GateOutcome:
        """passed if the whole interval is in the bound, failed if no part of it is, else cannot tell."""
        if self.not_checked is not None:
            return "not checked"
        sampled, bound = self.sampled, self.bound
        if sampled is None or (math.isnan(self.value) and sampled.rows):
            return "passed" if bound.holds(self.value) else "failed"
        if bound.holds(sampled.low) and bound.holds(sampled.high):
            return "passed"
        is_below = bound.min is not None and sampled.high < bound.min
        is_above = bound.max is not None and sampled.low > bound.max
        return "failed" if is_below or is_above else "cannot tell"

    @property
    def more_rows(self) -> int | None:
        """About how many more rows would decide the gate, if the value does not change: the interval's width
        falls with the root of the rows. None with few rows, whose value will change, or on the bound."""
        if self.outcome != "cannot tell" or self.sampled is None or self.sampled.rows < MIN_ROWS:
            return None
        bounds = (bound for bound in (self.bound.min, self.bound.max) if bound is not None)
        bound = min(bounds, key=lambda each: abs(self.value - each))
        end = self.sampled.high if bound > self.value else self.sampled.low  # the one beyond the bound
        half, distance = abs(end - self.value), abs(bound - self.value)
        if not math.isfinite(half) or not distance > 0:
            return None
        return max(1, math.ceil(self.sampled.rows * ((half / distance) ** 2 - 1)))

    @property
    def advice(self) -> str:
        """What to do, as a sentence; empty if there is nothing to do."""
        if self.outcome == "failed":
            return f"Try: {self._filled(self.bound.advice)}."
        if self.outcome == "not checked":
            return f"Does not apply: {self.not_checked}."
        if self.outcome == "passed":
            return ""
        where = f" ({self._filled(self.bound.rows)})" if self.bound.rows else ""
        if self.more_rows is not None:
            rows = rounded_up(self.more_rows)
            if self.sampled is not None and rows > MAX_ROWS_FACTOR * self.sampled.rows:
                return f"It is so near the bound that it would take about {rows:,} more rows{where}."
            return f"About {rows:,} more row{'s' * (rows > 1)} like these would tell{where}."
        if self.sampled is not None and not self.sampled.rows:
            return f"No row could be measured, so it has no value{where}."
        if self.sampled is not None and self.sampled.rows < MIN_ROWS:
            return f"These rows are too few to tell. Give more{where}."
        return "The figure lies on the bound: no number of rows would tell."

    def _filled(self, words: str) -> str:
        return words.replace("{stage}", self.stage)

    def as_json(self) -> dict[str, Any]:
        """Its entry in summary.json; a value that is not finite becomes null."""
        sampled = self.sampled
        return {
            "stage": self.stage,
            "name": self.name,
            "value": _finite(self.value),
            "low": _finite(sampled.low) if sampled else None,
            "high": _finite(sampled.high) if sampled else None,
            "rows": sampled.rows if sampled else None,
            "bound": str(self.bound),
            "min": self.bound.min,
            "max": self.bound.max,
            "outcome": self.outcome,
            "passed": self.outcome == "passed",
            "more_rows": self.more_rows,
            "advice": self.advice,
        }

    @property
    def figure(self) -> str:
        """The value, its interval and its rows."""
        if self.sampled is None:
            return "-" if self.not_checked and math.isnan(self.value) else f"{self.value:.4g}"
        _, low, high, rows = self.sampled
        return f"{self.value:.4g} (95%: {low:.4g} to {high:.4g}, {rows:,} row{'s' * (rows != 1)})"

    def __str__(self) -> str:
        return f"{self.stage}: {self.name} = {self.figure}, wanted {self.bound}. {self.advice}".rstrip()


def with_outcome(outcome: str | None, verdict: str) -> str:
    """The outcome as a sentence, then the verdict, in lines; only the verdict if there is no outcome."""
    return f"{OUTCOMES[outcome]}\n{verdict}" if outcome in OUTCOMES else verdict


def as_markdown_list(lines: str) -> str:
    """The first line, then the others as a list, in Markdown."""
    first, *others = lines.split("\n")
    return "\n".join([first, *(["", *(f"- {line}" for line in others)] if others else [])])


def rounded_up(count: int) -> int:
    """An estimated count, rounded up to two digits."""
    unit: int = 10 ** max(0, len(str(count)) - 2)
    return -(-count // unit) * unit


def gate_results(stage: Stage, metrics: Mapping[str, float]) -> list[GateResult]:
    """A stage's summary metrics against its gates."""
    not_checked = stage.not_checked()
    return [
        GateResult(
            stage.name, metric, metrics.get(metric, math.nan), bound, Sampled.found(metric, metrics),
            not_checked.get(metric),
        )
        for metric, bound in stage.gates.items()
        if bound is not None
    ]  # fmt: skip


class GateError(Exception):
    """A stage finished, but a gate says that its result is not good enough. Exit code 3."""


@dataclass
class Run:
    """One invocation: its directory and its results so far (summary.json)."""

    directory: Path
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    gates: list[GateResult] = field(default_factory=list)
    writes: bool = True
    """True on rank 0, which writes for all."""
    chain: Mapping[str, Stage] = field(default_factory=dict)
    """The experiment's stages, in order: what they make, what they read, and what the report calls them."""
    verdict: str | None = None
    """The verdict, a line for each statement; empty if there is nothing to judge; None before the run's
    end."""
    outcome: str | None = None
    """The verdict in a few words: one of `OUTCOMES`; None if there is nothing to judge."""
    judged_by: str | None = None
    """The metric that decided the outcome."""
    needed: Sequence[str] = ()
    """The stages of this run, in order."""
    changed: Sequence[Change] = ()
    """The config's keys that differ from the packaged values."""
    policies: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The policies that `evaluate` compared: the name of each in tables, and the cost of making it."""

    def metrics_of(self, stage: str) -> dict[str, float]:
        """A stage's summary metrics, without its name; empty if it was not part of the run."""
        metrics: dict[str, float] = self.stages.get(stage, {}).get("metrics", {})
        return {name.removeprefix(f"{stage}/"): value for name, value in metrics.items()}

    @contextmanager
    def locked(self, name: str = ".lock", command: str = "") -> Iterator[None]:
        """Make and lock the run directory, so that two runs cannot mix their files in it.

        Args:
            name: name of the lock file; the launcher has one of its own.
            command: what does its work in the directory, if that is no run.

        Raises:
            ConfigError: another run holds it, or the directory cannot be written.
        """
        lock = Lock(self.directory / name)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except HeldError as held:
            if command:
                raise ConfigError(
                    f"{self.directory.name}: this {command} is already going on ({held}). Wait for its end."
                ) from None
            raise ConfigError(
                f"run_name={self.directory.name}: another run is writing {self.directory} ({held}). "
                "Choose another run_name."
            ) from None
        except OSError as error:
            raise self.unwritable(error) from None
        try:
            yield
        finally:
            lock.release()

    def unwritable(self, error: OSError) -> ConfigError:
        """The error that the run's directory cannot be written, in the user's own key."""
        return ConfigError(
            f"runs_dir={self.directory.parent}: {self.directory} cannot be written ({error.strerror}). "
            "Fix it, or choose another runs_dir."
        )

    def record(self, name: str, status: str, key: str, artifact: Artifact | None, seconds: float) -> None:
        """Note how a stage ended, and link its artifact."""
        metrics = (
            {f"{name}/{metric}": value for metric, value in artifact.manifest.metrics.items()}
            if artifact
            else {}
        )
        self.stages[name] = {
            "status": status,
            "key": key,
            "artifact": str(artifact.path.resolve()) if artifact else None,
            "seconds": round(seconds, 2),
            "cost": {
                "seconds": artifact.manifest.seconds,
                "peak_bytes": artifact.manifest.peak_bytes,
            }
            if artifact
            else None,
            "metrics": metrics,
        }
        if artifact and self.writes:
            link = self.directory / "artifacts" / name
            link.parent.mkdir(exist_ok=True)
            link.unlink(missing_ok=True)
            # relative, because the directory that holds both the runs and the store may move
            link.symlink_to(os.path.relpath(artifact.path.resolve(), link.parent.resolve()))
        self.write()

    def write(self) -> None:
        """Write summary.json; figures that are not finite become null."""
        if not self.writes:
            return
        gates = [gate.as_json() for gate in self.gates]
        stages = {
            name: stage | {"metrics": {metric: _finite(value) for metric, value in stage["metrics"].items()}}
            for name, stage in self.stages.items()
        }
        bounds = {
            name: {
                metric: [bound.min, bound.max] for metric, bound in self.chain[name].gates.items() if bound
            }
            for name in self.needed
        }
        healthy = {
            name: {
                curve: [each.min, each.max, each.from_start]
                for curve, each in healthy_curves(self.chain[name]).items()
            }
            for name in self.needed
        }
        content = redacted({"stages": stages, "gates": gates, "verdict": self.verdict})
        content |= {
            "policies": redacted(self.policies),
            "outcome": self.outcome,
            "judged_by": self.judged_by,
            "reads": {name: [*inputs(self.chain[name], self.chain)] for name in self.needed},
            "bounds": bounds,
            "healthy": healthy,
            "changed": [*self.changed],  # it holds no secret
        }
        replace_text(self.directory / "summary.json", json.dumps(content, indent=2, allow_nan=False))

    def begin(self) -> None:
        """Remove the results of an earlier run of this name."""
        shutil.rmtree(self.directory / "artifacts", ignore_errors=True)
        for name in ("report.md", "report.html", "policies.png"):
            (self.directory / name).unlink(missing_ok=True)
        self.write()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
