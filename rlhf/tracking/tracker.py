"""Writes metrics.jsonl and samples.jsonl, and optionally logs to wandb or tensorboard."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import defaultdict, deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol
from uuid import uuid4

from rlhf.config import ConfigError, Strict
from rlhf.digests import digest_of
from rlhf.disk import naming
from rlhf.printable import printable
from rlhf.tracking.redaction import redacted
from rlhf.tracking.tables import Cells


class TrackerConfig(Strict):
    """`tracker.*`: a tracker for metrics, in addition to the files."""

    kind: Literal["none", "wandb", "tensorboard"]
    """The tracker. Choose it with `tracker=NAME`."""
    mode: Literal["offline", "online"] = "offline"
    """wandb only: with `offline`, nothing leaves the machine."""
    project: str = "rlhf"
    """wandb only: the run's project."""


PRIVACY_SETTINGS: dict[str, Any] = {
    "x_disable_meta": True,  # the command line, the host and the user's name
    "console": "off",  # it would copy printed text before secrets are removed
    "disable_git": True,  # the remote's URL may carry a token, and an uncommitted change anything
}
"""Settings with which wandb gets only metrics, samples and the config, and nothing else from the machine."""


INIT_TIMEOUT_SECONDS = 60.0
MAX_TABLE_SAMPLES = 1000
"""Samples per stage in a tracker's table: the last ones. samples.jsonl has all."""


class Sink(Protocol):
    """A tracker, in addition to the files."""

    def log(self, metrics: Mapping[str, float], stage: str, step: int) -> None:
        """Record metrics whose names begin with the stage's name."""

    def summarize(self, metrics: Mapping[str, float]) -> None:
        """Record a stage's final metrics, separate from the curves with the same names."""

    def sample(self, stage: str, row: Mapping[str, Any]) -> None:
        """Record one generated text for a table."""

    def close(self) -> None:
        """Write everything and close."""


class SampleTables:
    """The last generated texts of each stage, as tables."""

    def __init__(self) -> None:
        self._rows: dict[str, deque[dict[str, Any]]] = defaultdict(lambda: deque(maxlen=MAX_TABLE_SAMPLES))
        self.counts: dict[str, int] = {}
        """Stage -> number of generated texts."""

    def add(self, stage: str, row: Mapping[str, Any]) -> None:
        """Add one text."""
        self._rows[stage].append({name: _cell(value) for name, value in row.items() if name != "stage"})
        self.counts[stage] = self.counts.get(stage, 0) + 1

    def columns(self, stage: str) -> list[str]:
        """The columns of a stage's table."""
        return [*dict.fromkeys(name for row in self._rows[stage] for name in row)]

    def rows(self, stage: str) -> list[list[Any]]:
        """The rows of a stage's table; None if a row lacks a column."""
        return [[row.get(name) for name in self.columns(stage)] for row in self._rows[stage]]


def _cell(value: Any) -> Any:
    """A table cell: numbers stay, everything else becomes text."""
    if isinstance(value, int | float) or value is None:
        return value
    if isinstance(value, list) and all(isinstance(each, Mapping) and "role" in each for each in value):
        value = "\n".join(f"{each['role']}: {each['content']}" for each in value)
    return printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


class WandbSink:
    """Weights & Biases, offline by default.

    RUN_DIR/wandb.json has the wandb run's id and the number of lines that each stage has logged. The same
    command, run again, logs the same lines in the same order. So it continues the same wandb run after the
    lines that wandb already has.
    """

    def __init__(self, config: TrackerConfig, directory: Path, resolved: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError("tracker=wandb needs the package: pip install -e '.[wandb]'.") from None
        self._note = directory / "wandb.json"
        known = json.loads(self._note.read_text(encoding="utf-8")) if self._note.exists() else {}
        content = digest_of(redacted(resolved))
        self._id = known["id"] if known.get("config") == content else uuid4().hex[:8]
        self._wandb_lines: dict[str, int] = known.get("lines", {}) if known.get("config") == content else {}
        self._logged_lines: dict[str, int] = {}
        """Stage -> lines that it has logged in this process."""
        self._content = content
        self._teardown = wandb.teardown
        try:
            self._run = wandb.init(
                project=redacted(config.project), name=directory.name, dir=str(directory), mode=config.mode,
                config=redacted(resolved), id=self._id, resume="allow",
                settings=wandb.Settings(init_timeout=INIT_TIMEOUT_SECONDS, **PRIVACY_SETTINGS),
            )  # fmt: skip
        except (wandb.Error, OSError) as error:
            self._teardown()  # else later runs would use its process, whose address is in the environment
            raise ConfigError(
                f"tracker=wandb tracker.mode={config.mode}: wandb cannot start ({redacted(str(error))}). "
                "Check the network and `wandb login`, or use tracker.mode=offline; nothing was run."
            ) from None
        self._stages: set[str] = set()
        self._tables = SampleTables()
        self._written_samples: dict[str, int] = (
            known.get("samples", {}) if known.get("config") == content else {}
        )
        """Stage -> number of its texts (not only those in its table) when the table was last written."""
        self._make_table = wandb.Table

    def log(self, metrics: Mapping[str, float], stage: str, step: int) -> None:
        """Log metrics on the stage's own x axis, because each stage counts its own steps."""
        self._logged_lines[stage] = line = self._logged_lines.get(stage, 0) + 1
        if line <= self._wandb_lines.get(stage, 0):
            return
        self._wandb_lines[stage] = line
        self._write_note()
        if stage not in self._stages:
            self._stages.add(stage)
            self._run.define_metric(f"{stage}/step")
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self._run.log({**metrics, f"{stage}/step": step})

    def summarize(self, metrics: Mapping[str, float]) -> None:
        """Write the metrics to the run's summary, which wandb's table of runs shows."""
        self._run.summary.update(dict(metrics))

    def sample(self, stage: str, row: Mapping[str, Any]) -> None:
        """Collect a row for the stage's table. The table is written at the end, because wandb stores a full
        copy each time."""
        self._tables.add(stage, row)

    def close(self) -> None:
        """Write the tables that have grown, finish the wandb run and end wandb's own process. `finish` may
        return before that process has written everything to the disk."""
        for stage, count in self._tables.counts.items():
            if count != self._written_samples.get(stage):
                columns: list[str | int] = [*self._tables.columns(stage)]
                table = self._make_table(
                    columns=columns, data=self._tables.rows(stage), allow_mixed_types=True
                )
                self._run.log({f"{stage}/samples": table})
        self._written_samples |= self._tables.counts
        self._write_note()
        self._run.finish()
        self._teardown()

    def _write_note(self) -> None:
        note = {
            "id": self._id,
            "config": self._content,
            "lines": self._wandb_lines,
            "samples": self._written_samples,
        }
        self._note.write_text(json.dumps(note), encoding="utf-8")


class TensorboardSink:
    """TensorBoard event files in the run directory. The same command, run again, logs the same lines again.
    So it replaces the old files, and no line is there twice."""

    def __init__(self, directory: Path, resolved: Mapping[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "tracker=tensorboard needs the package: pip install -e '.[tensorboard]'."
            ) from None
        shutil.rmtree(directory / "tensorboard", ignore_errors=True)
        self._writer = SummaryWriter(str(directory / "tensorboard"))
        config = json.dumps(redacted(resolved), indent=2, ensure_ascii=False, default=str)
        self._writer.add_text("config", "\n".join(f"    {line}" for line in config.splitlines()))
        self._tables = SampleTables()

    def log(self, metrics: Mapping[str, float], stage: str, step: int) -> None:
        """Write one scalar per metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def summarize(self, metrics: Mapping[str, float]) -> None:
        """Write one scalar per metric, under `summary/`."""
        for name, value in metrics.items():
            self._writer.add_scalar(f"summary/{name}", value)

    def sample(self, stage: str, row: Mapping[str, Any]) -> None:
        """Collect a row for the stage's table, which is written at the end."""
        self._tables.add(stage, row)

    def close(self) -> None:
        """Write the tables and flush the event file."""
        for stage in self._tables.counts:
            rows = [[" ".join(f"{cell}".split()) for cell in row] for row in self._tables.rows(stage)]
            table = Cells(self._tables.columns(stage), rows).markdown()
            self._writer.add_text(f"{stage}/samples", table)
        self._writer.close()


class Tracker:
    """Writes each stage's lines into its artifact, and the lines of all stages into the run directory.

    The artifact has the stage's lines, so a run that reuses it can show its curve. Without a run directory
    (on ranks other than 0) nothing is written.
    """

    METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"

    def __init__(self, run_directory: Path | None, sinks: list[Sink]) -> None:
        self._run_directory, self._sinks = run_directory, sinks
        self._stage_directory: Path | None = None
        if run_directory is not None:
            for name in (self.METRICS, self.SAMPLES):
                (run_directory / name).write_text("", encoding="utf-8")

    def begin(self, stage_directory: Path) -> None:
        """Begin a stage: from now on, also write to its directory."""
        self._stage_directory = stage_directory if self._run_directory else None

    def keep(self, checkpoint: Path) -> None:
        """Copy the lines that the stage has written so far into a checkpoint."""
        for name in (self.METRICS, self.SAMPLES):
            if self._stage_directory and (self._stage_directory / name).exists():
                shutil.copyfile(self._stage_directory / name, checkpoint / name)

    def restore(self, checkpoint: Path) -> None:
        """Restore the lines of a checkpoint, so that none is missing or written twice."""
        if self._stage_directory is None:
            return
        for name in (self.METRICS, self.SAMPLES):
            if (checkpoint / name).exists():
                shutil.copyfile(checkpoint / name, self._stage_directory / name)
        self.replay(checkpoint)

    def replay(self, stage_directory: Path) -> None:
        """Copy the lines of a reused artifact to the run's files and to the sinks."""
        if self._run_directory is None:
            return
        for name in (self.METRICS, self.SAMPLES):
            if (stage_directory / name).exists():
                path = self._run_directory / name
                with naming(path), path.open("a", encoding="utf-8") as run_file:
                    run_file.write((stage_directory / name).read_text(encoding="utf-8"))
        metrics_file = stage_directory / self.METRICS
        lines = metrics_file.read_bytes().splitlines() if self._sinks and metrics_file.exists() else ()
        for line in lines:
            row = json.loads(line)
            metrics = {name: value for name, value in row.items() if "/" in name and value is not None}
            for sink in self._sinks:
                if row.get("summary"):
                    sink.summarize(metrics)
                else:
                    sink.log(metrics, row["stage"], row["step"])
        samples_file = stage_directory / self.SAMPLES
        for line in samples_file.read_bytes().splitlines() if self._sinks and samples_file.exists() else ():
            row = json.loads(line)
            for sink in self._sinks:
                sink.sample(row["stage"], row)

    def log(self, stage: str, metrics: Mapping[str, float], step: int) -> None:
        """Record one step of a stage. Puts the stage's name before each metric's name."""
        named = {f"{stage}/{name}": float(value) for name, value in metrics.items()}
        self._append(self.METRICS, {"stage": stage, "step": step, "time": _now(), **_finite(named)})
        for sink in self._sinks:
            sink.log(named, stage, step)

    def summarize(self, stage: str, metrics: Mapping[str, float]) -> None:
        """Record a stage's final metrics, in a line with `"summary": true`."""
        named = {f"{stage}/{name}": float(value) for name, value in metrics.items()}
        self._append(self.METRICS, {"stage": stage, "summary": True, "time": _now(), **_finite(named)})
        for sink in self._sinks:
            sink.summarize(named)

    def sample(self, stage: str, row: Mapping[str, Any]) -> None:
        """Record one generated text."""
        public_row = redacted(row)
        self._append(self.SAMPLES, {"stage": stage, **public_row})
        for sink in self._sinks:
            sink.sample(stage, public_row)

    def close(self) -> None:
        """Close the sinks."""
        for sink in self._sinks:
            sink.close()

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        line = json.dumps(row, ensure_ascii=False) + "\n"
        for directory in filter(None, (self._run_directory, self._stage_directory)):
            path = directory / name
            with naming(path), path.open("a", encoding="utf-8") as file:
                file.write(line)


def _now() -> float:
    return round(time.time(), 3)


def _finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """The metrics with None for NaN and infinity, which JSON does not have."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def make_tracker(config: TrackerConfig, run_directory: Path, resolved: Mapping[str, Any]) -> Tracker:
    """A tracker for the files and for the choice in `tracker=`."""
    sinks: list[Sink] = []
    if config.kind == "wandb":
        sinks.append(WandbSink(config, run_directory, resolved))
    elif config.kind == "tensorboard":
        sinks.append(TensorboardSink(run_directory, resolved))
    return Tracker(run_directory, sinks)
