"""`python -m rlhf status` and `ls`: how runs are, from the files that they write. Needs no torch."""

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
from rlhf.locks import lives
from rlhf.pipeline.run import headed
from rlhf.tracking.position import NAME, read_position
from rlhf.tracking.progress import clock
from rlhf.tracking.tables import Cells, shown

STATUS_HELP = """python -m rlhf status [run_name=NAME] [runs_dir=DIR]

How a run is, from its files: running (where, at which step, how long it will take), done, failed, stopped, or
dead. Without a name: the newest run. Exit codes: 0, or 2 if there is no such run.
"""
LS_HELP = """python -m rlhf ls [runs_dir=DIR]

All runs, the newest first: how each is, when it last wrote, and its verdict.
"""
TRIAL = "trial.json"
"""In the directory of every run that is a trial of a sweep."""
SILENT_SECONDS = 120.0
"""A run on another host that has said nothing for so long may be dead."""


@dataclass(frozen=True)
class RunState:
    """How a run is."""

    directory: Path
    word: str
    """running, done, failed, stopped, dead, or silent: on another host, and nothing was heard for long."""
    stages: Mapping[str, Mapping[str, Any]]
    """Of summary.json: those that have ended."""
    verdict: str | None
    gates: Sequence[Mapping[str, Any]]
    position: Mapping[str, Any]
    """Of position.json; empty if the run has written none."""

    @property
    def place(self) -> str:
        """Where it runs and how far it is; empty if it does not run."""
        at = self.position
        if self.word not in ("running", "silent"):
            return ""
        seen = f"last sign {clock(time.time() - at['time'])} ago" if at else "no sign yet"
        where = f"pid {at['pid']} on {at['host']}, " if at else ""
        total = f"/{at['total']}" if at.get("total") else ""
        task = f" ({at['task']} {at['done']}{total})" if at.get("task") else ""
        return f"{where}{at.get('stage', 'starting')}{task}, {seen}"

    @property
    def left(self) -> list[str]:
        """The stages that are still to end."""
        return [name for name in self.position.get("needed", []) if name not in self.stages]

    @property
    def seconds_left(self) -> float | None:
        """How long it will still take: the stage that runs by its steps, the others as was predicted."""
        at, expected = self.position, self.position.get("expected", {})
        if self.word != "running" or not self.left:
            return None
        now, *later = self.left
        own = at["left"] if at.get("left") is not None else expected.get(now)
        return None if own is None else own + sum(expected.get(name, 0.0) for name in later)


def state_of(directory: Path) -> RunState:
    """How the run in this directory is."""
    summary, position = _read(directory / "summary.json"), read_position(directory)
    stages = summary.get("stages", {})
    ended = {stage["status"] for stage in stages.values()}
    if position.get("ended"):
        word = position["ended"]
    elif summary.get("verdict") is not None:
        word = "done"
    elif "failed" in ended or "stopped" in ended:
        word = "failed" if "failed" in ended else "stopped"
    elif not position:
        word = "dead"
    elif position["host"] != socket.gethostname():
        word = "running" if time.time() - position["time"] < SILENT_SECONDS else "silent"
    else:
        word = "running" if lives(position["pid"], position["started"]) else "dead"
    verdict = summary.get("verdict")
    said = None if verdict is None else headed(summary.get("outcome"), verdict)
    finished = {name: stage for name, stage in stages.items() if stage["status"] in ("ran", "reused")}
    return RunState(directory, word, finished, said, summary.get("gates", []), position)


def runs_in(root: Path) -> list[Path]:
    """The directories of runs, the newest first.

    Raises:
        ConfigError: there is no such directory.
    """
    if not root.is_dir():
        raise ConfigError(f"runs_dir={root}: there is no such directory.")
    found = [path for path in root.iterdir() if (path / "summary.json").is_file()]
    return sorted(found, key=_written, reverse=True)


def sweep_of(path: Path) -> str | None:
    """The sweep whose trial a run is; None if it is none."""
    return path.name.rpartition("-")[0] if (path / TRIAL).is_file() else None


def find_run(root: Path, name: str) -> Path:
    """The directory of a run; without a name, of the newest one.

    Raises:
        ConfigError: there is none.
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
        raise ConfigError(f"run_name={name}: there is no such run in {root}.{did_you_mean(name, names)}")
    return root / (name or names[0])


def status(arguments: Sequence[str], defaults: Mapping[str, Any]) -> int:
    """Tell how a run is."""
    keys = read("status", arguments, {"run_name": "", "runs_dir": defaults["runs_dir"]}, STATUS_HELP)
    if keys is None:
        return DONE
    for line in lines_of(state_of(find_run(Path(keys["runs_dir"]), keys["run_name"]))):
        print(line)
    return DONE


def lines_of(state: RunState) -> Iterator[str]:
    """What `status` prints."""
    yield f"{state.directory}: {state.word}"
    if state.place:
        yield f"  {state.place}"
    for name, stage in state.stages.items():
        yield f"  {name} {stage['status']}" + (f", {clock(stage['seconds'])}" if stage["seconds"] else "")
    if state.left:
        yield f"  left: {', '.join(state.left)}"
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
    if state.word in ("dead", "stopped", "failed"):
        yield "  The same command continues: finished stages and the last checkpoint are kept."


def ls(arguments: Sequence[str], defaults: Mapping[str, Any]) -> int:
    """List all runs."""
    keys = read("ls", arguments, {"runs_dir": defaults["runs_dir"]}, LS_HELP)
    if keys is None:
        return DONE
    states = [state_of(path) for path in runs_in(Path(keys["runs_dir"]))]
    rows = [
        [
            state.directory.name, state.word, f"{_written(state.directory):%Y-%m-%d %H:%M}",
            ", ".join(state.stages), re.split(r"\.(?:\s|$)", state.verdict or "")[0],
        ]
        for state in states
    ]  # fmt: skip
    Console().print(shown(Cells(["run", "", "last wrote", "stages", "verdict"], rows)), highlight=False)
    return DONE


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):  # not there; or replaced on another host while NFS reads it
        return {}
    return found if isinstance(found, dict) else {}


def _written(directory: Path) -> datetime:
    paths = (directory / name for name in ("summary.json", NAME))
    return datetime.fromtimestamp(max(path.stat().st_mtime for path in paths if path.exists()))
