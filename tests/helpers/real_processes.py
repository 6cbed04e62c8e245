"""`python -m rlhf` as real processes, to be killed, stopped, and compared."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from small_chain import SETTINGS, Chain

TRAINING = (
    "stage=ppo", "precision=fp32", "gates=warn", "sft.epochs=4", "reward.epochs=3", "ppo.steps=6",
    "ppo.evaluate_every=2", "sft.peft=none", "reward.peft=none", "ppo.peft=none",
)  # fmt: skip
"""Some ten optimizer steps in each training stage."""
PATIENCE_SECONDS = 150.0


class RealChain:
    """Small data sets in a directory, and commands that run in it."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        Chain(directory)
        self.directory = directory
        self._undisturbed: dict[tuple[str, ...], str] = {}

    def command(self, name: str, *overrides: str) -> list[str]:
        """The command line of a run called `name`, with a store of the same name unless told otherwise."""
        sources = (
            "sft.data=sft.jsonl", "reward.pairs=pairs.jsonl", "ppo.prompts=prompts.jsonl",
            "evaluate.prompts=evaluation.jsonl", "evaluate.retention=[sentences.jsonl,questions.jsonl]",
            "evaluate.gold=vader",
        )  # fmt: skip
        names = (f"run_name={name}", f"store_dir=store-{name}")
        return [sys.executable, "-m", "rlhf", *SETTINGS, *sources, *names, *TRAINING, *overrides]

    def start(
        self, name: str, *overrides: str, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start it, in a process group of its own."""
        return subprocess.Popen(
            self.command(name, *overrides),
            cwd=self.directory,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300", **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, name: str, *overrides: str, code: int = 0) -> tuple[str, str]:
        """Run it to its end; what it printed."""
        process = self.start(name, *overrides)
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
        return out, err

    def run_once(self, *overrides: str) -> str:
        """The name of an undisturbed run with these overrides, made when it is asked for first."""
        if overrides not in self._undisturbed:
            name = f"undisturbed{len(self._undisturbed)}"
            self.run(name, *overrides)
            self._undisturbed[overrides] = name
        return self._undisturbed[overrides]

    def start_until(
        self, stage: str, step: int, name: str, *overrides: str, **options: Any
    ) -> subprocess.Popen[str]:
        """Start it, and return once the stage has written a checkpoint of that step or a later one."""
        process = self.start(name, *overrides, **options)
        wait_until(lambda: newest_step(self.store(name), stage) >= step, process)
        return process

    def store(self, name: str) -> Path:
        """Where that run's artifacts are."""
        return self.directory / f"store-{name}"

    def weights(self, name: str, stage: str) -> str:
        """A digest of the weights that a stage published."""
        (path,) = self.store(name).glob(f"{stage}/[!.]*/model.safetensors")
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """metrics.jsonl without what tells the time."""
        text = (self.directory / "runs" / name / "metrics.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        return [{key: row[key] for key in row if key != "time" and "seconds" not in key} for row in rows]

    def curve(self, name: str) -> dict[tuple[str, int, str], float]:
        """(stage, step, metric) -> value of all training steps; rounding noise of the engine left out."""
        return {
            (row["stage"], row["step"], key): value
            for row in self.metrics(name)
            if "step" in row
            for key, value in row.items()
            if "/" in key and "mismatch" not in key and value is not None
        }


def newest_step(store: Path, stage: str) -> int:
    """Of the stage's finished checkpoints; -1 without."""
    names = [path.name for path in store.glob(f"{stage}/.*.checkpoints/step-*")]
    return max((int(name.removeprefix("step-")) for name in names), default=-1)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Poll until the condition holds, as long as the process lives."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
            out, err = process.communicate()
            pytest.fail(f"it ended (exit code {process.returncode}) or took too long\n{out}\n{err}")
        time.sleep(0.005)


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL, as a crash of the machine would end it."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def children_of(pid: int) -> list[int]:
    """The pids of what a process started."""
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def ranks_of(launcher: int) -> dict[int, int]:
    """Rank -> pid of what a launcher with that pid started."""
    found = {}
    for pid in children_of(launcher):
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found |= {int(word.removeprefix(b"RANK=")): pid for word in words if word.startswith(b"RANK=")}
    return found
