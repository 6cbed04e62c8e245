"""The real command line on small data: called in this process, so that torch is imported once; in processes
of their own, which are killed, stopped and compared (warm.py); and as sweeps."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from helpers.warm import Command, KillAt
from rlhf.__main__ import main

STAGES = ("prepare", "sft", "reward", "generate", "ppo", "evaluate")
SETTINGS = (
    "model=tiny", "device=cpu", "sft.batch_rows=8", "reward.batch_pairs=8",
    "generate.num_prompts=4", "ppo.steps=2", "ppo.batch_episodes=8", "ppo.minibatch_episodes=4",
    "ppo.max_new_tokens=6", "ppo.evaluate_prompts=4", "evaluate.num_prompts=4",
    "prepare.held_out_fraction=0.3", "sft.optim.lr=1e-3",
)  # fmt: skip
SOURCES = (
    "sft.data=sft.jsonl", "reward.pairs=pairs.jsonl", "ppo.prompts=prompts.jsonl",
    "evaluate.prompts=evaluation.jsonl", "evaluate.retention=[sentences.jsonl,questions.jsonl]",
    "evaluate.gold=vader",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """How one invocation ended."""

    code: int
    out: str
    err: str
    directory: Path

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json."""
        found: dict[str, Any] = json.loads((self.directory / "summary.json").read_text())
        return found

    @property
    def statuses(self) -> dict[str, str]:
        """Stage -> ran, reused or failed."""
        return {name: stage["status"] for name, stage in self.summary["stages"].items()}

    def key(self, stage: str) -> str:
        """The key of a stage's artifact."""
        found: str = self.summary["stages"][stage]["key"]
        return found

    def artifact(self, stage: str) -> Path:
        """Where a stage's artifact lies."""
        return Path(self.summary["stages"][stage]["artifact"])


class Chain:
    """A directory with small data sets, a store and runs."""

    def __init__(self, directory: Path) -> None:
        self.directory, self._num_runs = directory, 0
        numbers = range(24)
        rows: dict[str, list[dict[str, Any]]] = {
            "sft": [{"prompt": f"Say {n}", "completion": f"It is {n}."} for n in numbers],
            "pairs": [{"prompt": f"Rate {n}", "chosen": "I love it!", "rejected": "No."} for n in numbers],
            "prompts": [{"prompt": f"Tell me about {n}"} for n in numbers],
            "evaluation": [{"prompt": f"What is {n}?"} for n in numbers[:6]],
            "sentences": [{"text": f"Water boils at {n} degrees."} for n in numbers[:4]],
            "questions": [{"question": f"{n}+1?", "choices": ["1", "7"], "answer": 0} for n in numbers[:4]],
        }
        for name, content in rows.items():
            self.write(f"{name}.jsonl", content)

    def write(self, name: str, rows: Iterable[Mapping[str, Any]]) -> str:
        """Write a JSONL file; its name, for a config key."""
        (self.directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return name

    def run(self, *overrides: str) -> Outcome:
        """`python -m rlhf` with small settings and these overrides, in the chain's directory."""
        self._num_runs += 1
        name = f"run{self._num_runs}"
        flags = [override for override in overrides if override.startswith("-")]  # argparse wants them first
        rest = [override for override in overrides if not override.startswith("-")]
        arguments = [*flags, *SETTINGS, *SOURCES, f"run_name={name}", *rest]
        return run_main(self.directory, arguments, self.directory / "runs" / name)


def run_main(directory: Path, arguments: Iterable[str], run_directory: Path) -> Outcome:
    """Call main() as the command line does. A crash (exit code 1) raises here, with its traceback.

    A module of another test that has the name of one in this directory is forgotten first."""
    for path in directory.glob("*.py"):
        if getattr(sys.modules.get(path.stem), "__file__", None) not in (None, str(path)):
            del sys.modules[path.stem]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.chdir(directory),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["rlhf", *arguments])
        patch.setattr(sys, "path", [*sys.path])  # main adds the directory
        patch.setenv("HYDRA_FULL_ERROR", "0")  # so that what main sets is undone
        patch.setenv("COLUMNS", "300")
        try:
            main()
        except SystemExit as end:
            assert isinstance(end.code, int)
            code = end.code
    return Outcome(code, out.getvalue(), err.getvalue(), run_directory)


BY_RULE = ("stage=ppo", "ppo.reward=vader", "ppo.critic.init=sft", "ppo.score.normalize=running")


def sweep_file(chain: Chain, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((chain.directory / "runs" / name / "sweep.json").read_text())
    return found


def trial_run(chain: Chain, name: str, number: int) -> Outcome:
    return Outcome(0, "", "", chain.directory / "runs" / f"{name}-{number}")


def finished(chain: Chain, stage: str) -> int:
    """How many artifacts of a stage there are."""
    return len(list((chain.directory / "store" / stage).glob("*/manifest.json")))


def submitit_sweep_arguments(launcher: str, *settings: str) -> list[str]:
    """Four PPO trials that need the same SFT model, as submitit's jobs, two at once."""
    return [
        "-m", *BY_RULE, f"hydra/launcher={launcher}", *(f"hydra.launcher.{each}" for each in settings),
        "sweep.parallel=2", "sweep.metric=ppo/held_out_score", "run_name=jobs",
        "ppo.kl.coef=0.01,0.02,0.03,0.04",
    ]  # fmt: skip


def check_submitit_sweep(chain: Chain) -> None:
    """All are done, and the SFT model was trained once."""
    content = sweep_file(chain, "jobs")
    assert [trial["status"] for trial in content["trials"]] == ["done"] * 4
    ran = [trial_run(chain, "jobs", number).statuses["sft"] for number in range(4)]
    assert sorted(ran) == ["ran", "reused", "reused", "reused"]
    assert (finished(chain, "sft"), finished(chain, "ppo")) == (1, 4)


TRAINING = (
    "stage=ppo", "precision=fp32", "gates=warn", "sft.epochs=4", "reward.epochs=3", "ppo.steps=6",
    "ppo.evaluate_every=2", "sft.peft=none", "reward.peft=none", "ppo.peft=none",
)  # fmt: skip
"""Some ten optimizer steps in each training stage."""
GROUPS = (
    "stage=grpo", "grpo.peft=none", "grpo.steps=4", "grpo.batch_episodes=8", "grpo.minibatch_episodes=8",
    "grpo.samples_per_prompt=4", "grpo.max_resamples=1",
)  # fmt: skip
"""The same without a critic, behind the stages before PPO."""
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
        names = (f"run_name={name}", f"store_dir=store-{name}")
        return [sys.executable, "-m", "rlhf", *SETTINGS, *SOURCES, *names, *TRAINING, *overrides]

    def start(
        self,
        name: str,
        *overrides: str,
        environment: Mapping[str, str] | None = None,
        kill_at: KillAt | None = None,
    ) -> Command:
        """Start it, in a process group of its own."""
        return self._start(self.command(name, *overrides)[3:], environment or {}, kill_at)

    def _start(
        self, arguments: list[str], environment: Mapping[str, str], kill_at: KillAt | None = None
    ) -> Command:
        always = {"OMP_NUM_THREADS": "1", "COLUMNS": "300"}
        return Command(
            arguments,
            cwd=self.directory,
            environment={**os.environ, **always, **environment},
            kill_at=kill_at,
        )

    def command_of(self, *words: str) -> str:
        """Run another command, such as `gc`, to its end; what it printed."""
        process = self._start([*words], {})
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 0, f"exit code {process.returncode}\n{out}\n{err}"
        return out

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

    def start_until(self, stage: str, step: int, name: str, *overrides: str, **options: Any) -> Command:
        """Start it, and return once the stage has written a checkpoint of that step or a later one."""
        process = self.start(name, *overrides, **options)
        wait_until(lambda: newest_step(self.store(name), stage) >= step, process)
        return process

    def run_killed(self, stage: str, step: int, name: str, *overrides: str) -> None:
        """Run it until the stage has written its checkpoint of that step, which is the last it does."""
        checkpoint = rf"/{re.escape(stage)}/\.[^/]*\.checkpoints/step-{step:08d}$"
        process = self.start(name, *overrides, kill_at=KillAt(checkpoint))
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == -signal.SIGKILL, f"exit code {process.returncode}\n{out}\n{err}"
        assert newest_step(self.store(name), stage) == step

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


def wait_until(condition: Callable[[], bool], process: Command | subprocess.Popen[str]) -> None:
    """Poll until the condition holds, as long as the process lives."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
            out, err = process.communicate()
            pytest.fail(f"it ended (exit code {process.returncode}) or took too long\n{out}\n{err}")
        time.sleep(0.005)


def kill(process: Command | subprocess.Popen[str]) -> None:
    """SIGKILL, as a crash of the machine would end it. Nothing, where it has just ended by itself."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def children_of(pid: int) -> list[int]:
    """The pids of what a process started."""
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def ranks_of(launcher: int) -> dict[int, int]:
    """Rank -> pid of what a launcher with that pid started."""
    found: dict[int, int] = {}
    for pid in children_of(launcher):
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        words.append(Path(f"/proc/{pid}/comm").read_bytes().strip())  # of a rank that was forked
        found |= {int(word.removeprefix(b"RANK=")): pid for word in words if word.startswith(b"RANK=")}
    return found
