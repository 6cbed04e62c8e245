"""Runs the chosen stages in order: reuses what is finished, runs the rest, says why, checks the gates."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout
from rich.console import Console

from rlhf.artifacts import Artifact, Manifest, Recipe, Store, recipe_key
from rlhf.config import Bound, ConfigError
from rlhf.data.prepared import PreparedData
from rlhf.distributed import Compute, make_compute
from rlhf.estimate import parameters_in, speed_of
from rlhf.experiment import Experiment
from rlhf.job import Job
from rlhf.models.load import BaseModelFiles, base_files, base_identity
from rlhf.progress import Progress, clock
from rlhf.stage import Stage
from rlhf.tracking import Tracker, make_tracker

PACKAGES = ("rlhf", "torch", "transformers", "trl", "peft", "accelerate", "datasets")


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

    def record(self, name: str, status: str, artifact: Artifact | None, seconds: float) -> None:
        """Note how a stage ended, and link its artifact."""
        metrics = (
            {f"{name}/{metric}": value for metric, value in artifact.manifest.metrics.items()}
            if artifact
            else {}
        )
        self.stages[name] = {
            "status": status,
            "key": artifact.key if artifact else None,
            "artifact": str(artifact.path.resolve()) if artifact else None,
            "seconds": round(seconds, 2),
            "metrics": metrics,
        }
        if artifact:
            link = self.directory / "artifacts" / name
            link.parent.mkdir(exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(artifact.path.resolve())
        self.write()

    def write(self) -> None:
        """Write summary.json; figures that are not finite become null."""
        gates = [gate.as_json() for gate in self.gates]
        stages = {
            name: stage | {"metrics": {metric: _finite(value) for metric, value in stage["metrics"].items()}}
            for name, stage in self.stages.items()
        }
        (self.directory / "summary.json").write_text(
            json.dumps({"stages": stages, "gates": gates}, indent=2, allow_nan=False)
        )


class Pipeline:
    """Everything that an experiment's stages share."""

    def __init__(self, experiment: Experiment, run_name: str, console: Console) -> None:
        settings = experiment.settings
        self.experiment, self.console = experiment, console
        self.store = Store(Path(settings.store_dir))
        self.results = Run(Path(settings.runs_dir) / run_name)
        self.model_identity = base_identity(settings.model)
        for name in experiment.needed():
            experiment.stages[name].external()  # a missing data file is told now, not after hours of training

    def run(self) -> None:
        """Run the chain; `results` says how far it came.

        Raises:
            GateError: a gate failed; every finished stage is kept.
        """
        settings, run = self.experiment.settings, self.results
        try:
            run.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"runs_dir={settings.runs_dir}: {run.directory} cannot be created ({error.strerror})."
            ) from None
        (run.directory / "config.yaml").write_text(to_yaml(self.experiment.resolved))
        compute, precision = make_compute(settings.device, settings.precision)
        self.console.print(f"Run in {run.directory}; {precision}.", highlight=False)
        tracker = make_tracker(settings.tracker, run.directory.name, run.directory, self.experiment.resolved)
        try:
            base = base_files(settings.model, self.model_identity, self.keep_base)
            artifacts: dict[str, Artifact] = {}
            for name in self.experiment.needed():
                artifacts[name] = self.finish(name, artifacts, base, compute, tracker)
                if name == "prepare":
                    self.announce(artifacts["prepare"], base, compute)
                self.check_gates(name, artifacts[name])
        finally:
            tracker.close()

    def finish(
        self,
        name: str,
        artifacts: Mapping[str, Artifact],
        base: BaseModelFiles,
        compute: Compute,
        tracker: Tracker,
    ) -> Artifact:
        """The stage's artifact: the store's where it is finished, made now otherwise."""
        stage, run = self.experiment.stages[name], self.results
        recipe = self.recipe(stage, artifacts, compute)
        key = recipe_key(recipe)
        forced = name in self.experiment.settings.force
        start = time.monotonic()
        with self.locked(name, key):
            found = None if forced else self.store.find(name, key)
            if found:
                tracker.replay(found.path)
                run.record(name, "reused", found, 0.0)
                why = f": every knob and input equals {found.path}" if self.experiment.settings.why else ""
                self.console.print(f"[cyan]{name}[/] reused ({key}){why}", highlight=False)
                return found
            if self.experiment.settings.why:
                reason = "force" if forced else self.store.explain(name, recipe)
                self.console.print(f"[cyan]{name}[/] runs ({key}): {reason}", highlight=False)
            else:
                self.console.print(f"[cyan]{name}[/] runs ({key})", highlight=False)
            progress = Progress(self.console)
            scratch = self.store.scratch(name, key)
            tracker.begin(scratch)
            prepared = PreparedData(artifacts["prepare"].path if "prepare" in artifacts else scratch)
            job = Job(
                stage=name,
                seed=self.experiment.settings.seed,
                compute=compute,
                base=base,
                inputs={other: artifacts[other] for other in stage.inputs()},
                data=prepared,
                directory=scratch,
                tracker=tracker,
                progress=progress,
            )
            torch.manual_seed(job.seed)
            try:
                with progress.shown():
                    stage.run(job)
            except BaseException:
                run.record(name, "failed", None, time.monotonic() - start)
                raise
            assert job.summary is not None, f"{name} ended without publishing"
            seconds = time.monotonic() - start
            artifact = self.store.publish(scratch, self.manifest(stage, recipe, job.summary, seconds))
        run.record(name, "ran", artifact, seconds)
        self.console.print(f"[cyan]{name}[/] done in {clock(seconds)}", highlight=False)
        return artifact

    def announce(self, prepared: Artifact, base: BaseModelFiles, compute: Compute) -> None:
        """Say roughly how long the stages that have to run will take."""
        parameters, speed = parameters_in(base.directory), speed_of(compute)
        estimates = {
            name: self.experiment.stages[name].work(PreparedData(prepared.path)).seconds(parameters, speed)
            for name in self.pending(prepared, compute)
        }
        if estimates:
            parts = ", ".join(f"{name} {clock(seconds)}" for name, seconds in estimates.items())
            self.console.print(f"About {clock(sum(estimates.values()))} to go: {parts}.", highlight=False)

    def pending(self, prepared: Artifact, compute: Compute) -> list[str]:
        """The stages behind `prepare` that the store does not answer."""
        known, pending = {"prepare": prepared}, []
        for name in self.experiment.needed()[1:]:
            stage = self.experiment.stages[name]
            found = None
            if name not in self.experiment.settings.force and set(stage.inputs()) <= set(known):
                found = self.store.find(name, recipe_key(self.recipe(stage, known, compute)))
            if found:
                known[name] = found
            else:
                pending.append(name)
        return pending

    def recipe(self, stage: Stage, artifacts: Mapping[str, Artifact], compute: Compute) -> Recipe:
        """All that decides the stage's artifact."""
        recipe: Recipe = {
            "stage": stage.name,
            "version": stage.version,
            "knobs": stage.knobs(),
            "external": stage.external(),
            "inputs": {name: artifacts[name].key for name in stage.inputs() if name != "prepare"},
        }
        if stage.roles():  # the content of the prepared sets, not the key of `prepare`: see DESIGN in README
            prepared = PreparedData(artifacts["prepare"].path)
            recipe["data"] = {role: prepared.digest(role) for role in stage.roles()}
        if stage.reads_base_model():
            recipe["model"] = self.model_identity
        if stage.random:
            recipe["seed"] = self.experiment.settings.seed
            recipe["dtype"] = str(compute.dtype).removeprefix("torch.")
        return recipe

    def manifest(self, stage: Stage, recipe: Recipe, metrics: dict[str, float], seconds: float) -> Manifest:
        """What will be known of the artifact later."""
        return Manifest(
            stage=stage.name,
            key=recipe_key(recipe),
            recipe=recipe,
            config=dict(self.experiment.resolved),
            metrics=metrics,
            seconds=round(seconds, 2),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            git_revision=git_revision(),
            packages={name: importlib.metadata.version(name) for name in PACKAGES},
            hardware=f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
            + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
            files={},
        )

    def check_gates(self, name: str, artifact: Artifact) -> None:
        """Compare the stage's summary with its bounds."""
        run = self.results
        results = [
            GateResult(name, metric, artifact.manifest.metrics.get(metric, float("nan")), bound)
            for metric, bound in self.experiment.stages[name].gates.items()
            if bound is not None
        ]
        run.gates += results
        run.write()
        failed = [result for result in results if not result.passed]
        if not failed:
            return
        if self.experiment.settings.gates == "enforce":
            raise GateError("\n".join(f"Gate failed: {result}" for result in failed))
        for result in failed:
            self.console.print(f"[yellow]Gate failed, going on (gates=warn):[/] {result}", highlight=False)

    @contextmanager
    def locked(self, name: str, key: str) -> Iterator[None]:
        """Hold the artifact's lock; says so when another run has it."""
        lock = self.store.lock(name, key)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            self.console.print(f"[cyan]{name}[/] waits: another run is making {key}", highlight=False)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def keep_base(self, kind: str, write: Callable[[Path], None]) -> Path:
        """Make a base model that has to be converted or built first, once, and keep it in the store."""
        recipe: Recipe = {"stage": "base", "kind": kind, "identity": self.model_identity}
        key = recipe_key(recipe)
        with self.store.lock("base", key):
            found = self.store.find("base", key)
            if found:
                return found.path
            self.console.print(f"[cyan]base[/] model={kind}: converting it, once", highlight=False)
            start = time.monotonic()
            scratch = self.store.scratch("base", key)
            write(scratch)
            manifest = Manifest(
                stage="base", key=key, recipe=recipe, config={}, metrics={}, files={},
                seconds=round(time.monotonic() - start, 2), git_revision=git_revision(), hardware="",
                created=datetime.now(UTC).isoformat(timespec="seconds"), packages={},
            )  # fmt: skip
            return self.store.publish(scratch, manifest).path


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def to_yaml(resolved: Mapping[str, Any]) -> str:
    """A resolved config as YAML."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(dict(resolved)))


def git_revision() -> str | None:
    """The checkout this package runs from, with a mark when it has uncommitted changes."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
        )  # fmt: skip
    except FileNotFoundError:  # no git on this machine
        return None
    return described.stdout.strip() or None
