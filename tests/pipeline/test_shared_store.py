"""Two processes need one artifact: one makes it, the other waits, and takes over if the first is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers.chains import Chain

pytestmark = pytest.mark.slow
ROWS, EPOCHS = 24, 40
PATIENCE_SECONDS = 120.0


class Process:
    """`python -m rlhf stage=sft` with a checkpoint a step, so slow enough to be met in the middle."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory, self.run_directory = directory, directory / "runs" / name
        self.output = directory / f"{name}.txt"
        overrides = (
            "model=tiny", "device=cpu", "stage=sft", "sft.data=sft.jsonl", "reward.pairs=pairs.jsonl",
            "ppo.prompts=prompts.jsonl", "evaluate.prompts=evaluation.jsonl",
            "evaluate.retention=[sentences.jsonl,questions.jsonl]",
            "prepare.held_out_fraction=0.3", "sft.batch_rows=8", f"sft.epochs={EPOCHS}",
            "checkpoint.every_steps=1", f"run_name={name}",
        )  # fmt: skip
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rlhf", *overrides], cwd=directory, stdout=output, stderr=output,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "300"},
            )  # fmt: skip

    @property
    def said(self) -> str:
        return self.output.read_text()

    def until(self, holds: Callable[[], bool]) -> None:
        """Wait for something that happens while this process lives."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not holds():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.02)

    def trains(self) -> bool:
        """Whether it has written a checkpoint of the SFT model."""
        return any((self.directory / "store" / "sft").glob(".*.checkpoints/step-*"))

    def ended_well(self) -> dict[str, str]:
        """Wait for its end: what became of each stage."""
        assert self.process.wait(PATIENCE_SECONDS) == 0, self.said
        stages = json.loads((self.run_directory / "summary.json").read_text())["stages"]
        return {name: stage["status"] for name, stage in stages.items()}

    def metric_steps(self) -> list[int]:
        """The steps in its metrics.jsonl that have a training loss."""
        lines = [json.loads(line) for line in (self.run_directory / "metrics.jsonl").read_text().splitlines()]
        return [line["step"] for line in lines if "sft/lr" in line]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Process, Process]]:
    """The first one is stopped in the middle of training; the second one waits for it."""
    Chain(tmp_path)  # writes the data
    first = Process(tmp_path, "first")
    processes = [first]
    try:
        first.until(first.trains)
        first.process.send_signal(signal.SIGSTOP)  # a slow trainer: it holds the lock for as long as we like
        second = Process(tmp_path, "second")
        processes.append(second)
        second.until(lambda: "sft waits: another run is making" in second.said)
        assert f"(pid {first.process.pid} on host {socket.gethostname()}, started 20" in second.said
        yield first, second
    finally:
        for process in processes:
            process.process.kill()
            process.process.wait()


def num_sft_models(process: Process) -> int:
    return len(list((process.directory / "store" / "sft").glob("*/manifest.json")))


def test_one_trains_and_the_other_waits(pair: tuple[Process, Process]) -> None:
    first, second = pair
    first.process.send_signal(signal.SIGCONT)
    assert first.ended_well() == {"prepare": "ran", "sft": "ran"}
    assert second.ended_well() == {"prepare": "reused", "sft": "reused"}
    assert num_sft_models(first) == 1
    assert first.metric_steps() == second.metric_steps()  # a reused stage's curve is there too


def test_the_other_takes_over_from_one_that_was_killed(pair: tuple[Process, Process]) -> None:
    first, second = pair
    (checkpoints,) = (first.directory / "store" / "sft").glob(".*.checkpoints")
    newest = max(int(path.name.partition("-")[2]) for path in checkpoints.glob("step-*"))
    first.process.kill()
    assert second.ended_well() == {"prepare": "reused", "sft": "ran"}
    assert f"sft: continues from step {newest} " in second.said
    assert num_sft_models(second) == 1
    steps = second.metric_steps()
    assert steps == list(range(1, steps[-1] + 1)) and steps[-1] > newest  # no step lost, none taken twice
    assert not checkpoints.exists()
