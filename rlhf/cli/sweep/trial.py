"""Runs one trial of a sweep like any other run, and writes how it ended.

trial.json in the trial's run directory tells a restarted sweep, on any node, how the trial ended. The trial
also returns it, for launchers that pass it on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf.cli.execute import execute
from rlhf.config import ConfigError
from rlhf.disk import replace_text
from rlhf.exit_codes import DONE, GATE_FAILED, INTERRUPTED, STOPPED
from rlhf.locks import Lock
from rlhf.report.trial import Outcome

NOTE = "trial.json"


def is_main_process() -> bool:
    """Whether this is the only process, or the first of several ranks."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0


def run_trial(resolved: Mapping[str, Any], run_name: str) -> Outcome:
    """Run one trial and write how it ended. If it was queued twice, the second waits for the first."""
    if not is_main_process():
        return outcome_of(execute(resolved, run_name), {})
    directory = Path(resolved["runs_dir"]) / run_name
    directory.mkdir(parents=True, exist_ok=True)

    def log(holder: str) -> None:
        print(f"{run_name} waits: another process runs this trial ({holder})", flush=True)

    with Lock(directory / ".trial.lock").awaited(log):
        write_note(directory, Outcome())
        summary = directory / "summary.json"
        summary.unlink(missing_ok=True)
        code = execute(resolved, run_name)
        outcome = outcome_of(code, json.loads(summary.read_bytes()) if summary.exists() else {})
        write_note(directory, outcome)
    return outcome


def outcome_of(code: int, summary: Mapping[str, Any]) -> Outcome:
    """The outcome of a run, from its exit code and its summary.json."""
    stages, gates = summary.get("stages", {}), summary.get("gates", [])
    word = "stopped" if code in (STOPPED, INTERRUPTED) else "failed"
    at = [name for name, stage in stages.items() if stage["status"] == word]
    if code == GATE_FAILED:
        at = [f"{gate['stage']}: gate {gate['name']}" for gate in gates if gate["outcome"] == "failed"]
    return Outcome(
        code=code,
        status="done" if code == DONE else " in ".join([word, *at[:1]]),
        metrics={name: value for stage in stages.values() for name, value in stage["metrics"].items()},
        gates=tuple(f"{gate['stage']}/{gate['name']}" for gate in gates),
    )


def write_note(directory: Path, outcome: Outcome) -> None:
    """Replace trial.json."""
    replace_text(directory / NOTE, json.dumps(asdict(outcome), indent=2))


def read_note(directory: Path) -> Outcome | None:
    """How the trial in this run directory ended; None if it never began.

    Raises:
        ConfigError: the file was cut off or changed.
    """
    if not directory.exists() or directory / NOTE not in [*directory.iterdir()]:  # see Store.find
        return None
    try:
        note = json.loads((directory / NOTE).read_bytes())
        return Outcome(note["code"], note["status"], note["metrics"], tuple(note["gates"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{directory / NOTE} cannot be read ({type(error).__name__}: {error}). Remove it: the table of "
            "trials then shows this one as not started."
        ) from None
