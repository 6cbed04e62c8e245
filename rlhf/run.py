"""One invocation: its directory, what its stages came to, and its gates."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rlhf.artifacts import Artifact
from rlhf.config import Bound, ConfigError
from rlhf.disk import naming
from rlhf.secrets import redacted


@dataclass(frozen=True)
class GateResult:
    """One summary metric against its bound."""

    stage: str
    name: str
    value: float
    bound: Bound

    @property
    def passed(self) -> bool:
        """Whether the value lies within the bound."""
        return self.bound.holds(self.value)

    def as_json(self) -> dict[str, Any]:
        """Its entry in summary.json; a value that is not finite becomes null."""
        return {
            "stage": self.stage,
            "name": self.name,
            "value": _finite(self.value),
            "bound": str(self.bound),
            "passed": self.passed,
        }

    def __str__(self) -> str:
        return f"{self.stage}: {self.name} = {self.value:.4g}, wanted {self.bound}. Try: {self.bound.advice}."


class GateError(Exception):
    """A stage finished, but its result is not good enough to go on with. Exit code 3."""


@dataclass
class Run:
    """One invocation: its directory, and what is known of it so far (summary.json)."""

    directory: Path
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    gates: list[GateResult] = field(default_factory=list)
    writes: bool = True
    """False on ranks other than 0: one writes for all."""

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the run directory, which is made, so that two runs cannot mix their files in it.

        Raises:
            ConfigError: another run holds it, or it cannot be written.
        """
        lock = FileLock(self.directory / ".lock", timeout=0)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise ConfigError(
                f"run_name={self.directory.name}: another run is writing {self.directory}. "
                "Choose another run_name."
            ) from None
        except OSError as error:
            raise self.unwritable(error) from None
        try:
            yield
        finally:
            lock.release()

    def unwritable(self, error: OSError) -> ConfigError:
        """In the user's own key."""
        return ConfigError(
            f"runs_dir={self.directory.parent}: {self.directory} cannot be written ({error.strerror}). "
            "Mend it, or choose another runs_dir."
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
            "metrics": metrics,
        }
        if artifact and self.writes:
            link = self.directory / "artifacts" / name
            link.parent.mkdir(exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(artifact.path.resolve())
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
        beside = self.directory / ".summary.json"
        content = json.dumps(redacted({"stages": stages, "gates": gates}), indent=2, allow_nan=False)
        with naming(self.directory / "summary.json"):
            beside.write_text(content, encoding="utf-8")
            beside.rename(self.directory / "summary.json")

    def begin(self) -> None:
        """Remove what an earlier run of this name said of itself."""
        shutil.rmtree(self.directory / "artifacts", ignore_errors=True)
        (self.directory / "report.md").unlink(missing_ok=True)
        self.write()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
