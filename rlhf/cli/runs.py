"""`python -m rlhf status` and `ls`: the state of runs, from the files that they write. Needs no torch."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from rlhf.cli.command import read
from rlhf.config import ConfigError, did_you_mean
from rlhf.exit_codes import DONE
from rlhf.locks import is_alive
from rlhf.pipeline.run import with_outcome
from rlhf.tracking.position import FILE_NAME, read_position
from rlhf.tracking.progress import clock
from rlhf.tracking.tables import Cells, shown

STATUS_HELP = """python -m rlhf status [run_name=NAME] [runs_dir=DIR]

Show the state of a run, from its files: running (where, at which step, how long it will take), done, failed,
stopped, or dead (killed). Without a name: the newest run. Exit codes: 0, or 2 if there is no such run.
"""
LS_HELP = """python -m rlhf ls [runs_dir=DIR]

All runs and decisions, the newest first: how each is, when it last wrote, and its verdict.
"""
TRIAL = "trial.json"
"""File in the run directory of every trial of a sweep."""
DECISION = "decision.json"
"""File in the directory of every decision."""
SILENT_SECONDS = 120.0
"""Seconds without a new position after which a run on another host is `silent`: it may be dead."""


@dataclass(frozen=True)
class RunState:
    """The state of a run."""

    directory: Path
    status: str
    """running, done, failed, stopped, dead, or silent (see `SILENT_SECONDS`)."""
    stages: Mapping[str, Mapping[str, Any]]
    """Finished stages, from summary.json."""
    verdict: str | None
    gates: Sequence[Mapping[str, Any]]
    position: Mapping[str, Any]
    """Content of position.json; empty without this file."""

    @property
    def activity(self) -> str:
        """Process, stage and progress of a running run; else empty."""
        position = self.position
        if self.status not in ("running", "silent"):
            return ""
        last_sign = f"last sign {clock(time.time() - position['time'])} ago" if position else "no sign yet"
        process = f"pid {position['pid']} on {position['host']}, " if position else ""
        total = f"/{position['total']}" if position.get("total") else ""
        progress = f" ({position['task']} {position['done']}{total})" if position.get("task") else ""
        return f"{process}{position.get('stage', 'starting')}{progress}, {last_sign}"

    @property
    def ending(self) -> Iterator[str]:
        """The error of a failed run, and what to do after a run did not reach its end."""
        if self.status == "failed":
            if (error := self.position.get("error")) and not error.startswith("GateError"):
                yield f"error: {error}"
            yield "Fix the cause first. Finished stages and the last checkpoint are kept."
        if self.status in ("dead", "stopped"):
            yield "The same command continues: finished stages and the last checkpoint are kept."

    @property
    def unfinished(self) -> list[str]:
        """Stages that have not finished yet."""
        return [name for name in self.position.get("needed", []) if name not in self.stages]

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the run ends: the current stage by its speed, later stages by the forecast. None if
        not known."""
        position, expected = self.position, self.position.get("expected", {})
        if self.status != "running" or not self.unfinished:
            return None
        now, *later = self.unfinished
        stage_seconds = position["left"] if position.get("left") is not None else expected.get(now)
        return (
            None if stage_seconds is None else stage_seconds + sum(expected.get(name, 0.0) for name in later)
        )


def state_of(directory: Path) -> RunState:
    """Read the state of the run in this directory."""
    summary, position = _read(directory / "summary.json"), read_position(directory)
    stages = summary.get("stages", {})
    statuses = {stage["status"] for stage in stages.values()}
    if position.get("ended"):
        run_status = position["ended"]
    elif summary.get("verdict") is not None:
        run_status = "done"
    elif "failed" in statuses or "stopped" in statuses:
        run_status = "failed" if "failed" in statuses else "stopped"
    elif not position:
        run_status = "dead"
    elif position["host"] != socket.gethostname():
        run_status = "running" if time.time() - position["time"] < SILENT_SECONDS else "silent"
    else:
        run_status = "running" if is_alive(position["pid"], position["started"]) else "dead"
    verdict = summary.get("verdict")
    headed_verdict = None if verdict is None else with_outcome(summary.get("outcome"), verdict)
    finished = {name: stage for name, stage in stages.items() if stage["status"] in ("ran", "reused")}
    return RunState(directory, run_status, finished, headed_verdict, summary.get("gates", []), position)


def runs_in(root: Path) -> list[Path]:
    """Directories of runs, newest first.

    Raises:
        ConfigError: there is no such directory.
    """
    if not root.is_dir():
        raise ConfigError(f"runs_dir={root}: there is no such directory.")
    directories = [path for path in root.iterdir() if (path / "summary.json").is_file()]
    return sorted(directories, key=_written, reverse=True)


def sweep_of(path: Path) -> str | None:
    """Name of the sweep that a trial belongs to; None if the run is no trial."""
    return path.name.rpartition("-")[0] if (path / TRIAL).is_file() else None


def find_run(root: Path, name: str) -> Path:
    """The directory of a run. Without a name: of the newest run.

    Raises:
        ConfigError: there is no such run.
    """
    runs = runs_in(root)
    names = [path.name for path in runs]
    if not runs:
        raise ConfigError(f"runs_dir={root}: there is no run.")
    trials = sorted(path.name for path in runs if name and sweep_of(path) == name)
    if trials and name not in names:
        raise ConfigError(
            f"run_name={name} is a sweep of {len(trials)} trials. Name one of them, such as {trials[0]}."
        )
    if name and name not in names:
        raise no_such_run(root, name, names)
    return root / (name or names[0])


def no_such_run(root: Path, name: str, names: Sequence[str]) -> ConfigError:
    """The error for a name that no run has.

    Args:
        names: those of the runs.
    """
    if (root / name / DECISION).is_file():
        pilots = [each for each in names if each.startswith(f"{name}-")]
        return ConfigError(
            f"run_name={name} is a decision: see {root / name / 'report.html'}. Its pilots are runs: name "
            f"one of them, such as {next(iter(pilots), name)}."
        )
    return ConfigError(f"run_name={name}: there is no such run in {root}.{did_you_mean(name, names)}")


def status(arguments: Sequence[str], defaults: Mapping[str, Any]) -> int:
    """Print the state of a run."""
    keys = read("status", arguments, {"run_name": "", "runs_dir": defaults["runs_dir"]}, STATUS_HELP)
    if keys is None:
        return DONE
    for line in lines_of(state_of(find_run(Path(keys["runs_dir"]), keys["run_name"]))):
        print(line)
    return DONE


def lines_of(state: RunState) -> Iterator[str]:
    """Lines that `status` prints."""
    yield f"{state.directory}: {state.status}"
    if state.activity:
        yield f"  {state.activity}"
    for name, stage in state.stages.items():
        yield f"  {name} {stage['status']}" + (f", {clock(stage['seconds'])}" if stage["seconds"] else "")
    if state.unfinished:
        yield f"  left: {', '.join(state.unfinished)}"
    if state.seconds_left is not None:
        end = datetime.fromtimestamp(time.time() + state.seconds_left)
        yield f"  about {clock(state.seconds_left)} to go, until {end:%H:%M}"
    for gate in state.gates:
        if gate["outcome"] == "failed":
            name = f"{gate['stage']}/{gate['name']}"
            figure = "no number" if gate["value"] is None else f"{gate['value']:.4g}"
            yield f"  gate failed: {name} = {figure}, wanted {gate['bound']}"
    if state.verdict:
        yield from (f"  {line}" for line in state.verdict.split("\n"))
    yield from (f"  {line}" for line in state.ending)


def ls(arguments: Sequence[str], defaults: Mapping[str, Any]) -> int:
    """List all runs."""
    keys = read("ls", arguments, {"runs_dir": defaults["runs_dir"]}, LS_HELP)
    if keys is None:
        return DONE
    root = Path(keys["runs_dir"])
    directories = {*runs_in(root), *(path.parent for path in root.glob(f"*/{DECISION}"))}
    rows = [line_of(path) for path in sorted(directories, key=_written, reverse=True)]
    Console().print(shown(Cells(["run", "", "last wrote", "stages", "verdict"], rows)), highlight=False)
    return DONE


def line_of(directory: Path) -> list[str]:
    """What `ls` says of a run, or of a decision: its result, or why it ended early."""
    if decision := _read(directory / DECISION):
        how = "not decided" if decision.get("outcome") is None else "decided"
        stages, told = "decide", next(iter(decision.get("sentences", ())), decision.get("ended", ""))
    else:
        state = state_of(directory)
        how, stages, told = state.status, ", ".join(state.stages), state.verdict or ""
    written = f"{_written(directory):%Y-%m-%d %H:%M}"
    return [directory.name, how, written, stages, re.split(r"\.(?:\s|$)", told)[0]]


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError):  # no such file, or replaced on another host while NFS reads it
        return {}
    return values if isinstance(values, dict) else {}


def _written(directory: Path) -> datetime:
    paths = (directory / name for name in ("summary.json", FILE_NAME, DECISION))
    return datetime.fromtimestamp(max(path.stat().st_mtime for path in paths if path.exists()))
