"""The real command line on small data: `main()` called in this process, so that torch is imported once."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

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
    """Call main() as the command line does. A crash (exit code 1) raises here, with its traceback."""
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
