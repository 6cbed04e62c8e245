"""Slowdown of a PPO step by other work on a core, with this project's wait at a barrier and with OpenMP's
own.

    python benchmarks/busy_core.py

Threads wait for each other after each operation, and by default they spin for some milliseconds. A spinning
thread holds a core that the other thread needs. So, with other work on the machine, each wait lasts as long
as the scheduler lets a process run. Each figure is the median step of a fresh process; the settings take
turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from look import new_console
from rich.table import Table
from workloads import make_work

from rlhf.cli.execute import OPENMP_SPINS

SETTINGS = {"OpenMP's own": {}, "rlhf's": {"GOMP_SPINCOUNT": str(OPENMP_SPINS)}}


@contextmanager
def busy(cores: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """While open, `cores` processes compute without end."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
    try:
        yield others
    finally:
        for other in others:
            other.kill()
            other.wait()


def take_steps(directory: Path, model: str, steps: int) -> None:
    """Run in the fresh process: print the seconds of each step except the first."""
    from run_rlhf import make_trainer, take_step

    from rlhf.data.schema import PromptRow

    work = make_work("uniform", directory, steps=1, peft="lora", precision="auto", model=model)
    work["overrides"] = ["device=cpu"]
    seconds = []
    with tempfile.TemporaryDirectory() as scratch:
        trainer, _ = make_trainer(work, Path(scratch))
        trainer.policy.stop_ids = []  # all answers are equally long
        rows = [PromptRow(prompt) for prompt in work["prompts"][0]]
        for step in range(1, steps + 2):
            begun = time.monotonic()
            take_step(trainer, rows, step)
            seconds.append(time.monotonic() - begun)
    print(json.dumps(seconds[1:]))


def main() -> None:
    """Start the processes in turns and print the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="after the one that warms up")
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1], help="cores that do other work")
    parser.add_argument("--model", choices=["embedded", "tiny"], default="embedded")
    parser.add_argument("--directory", type=Path, default=Path(__file__).parent / ".work")
    parser.add_argument("--fresh", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.directory.mkdir(parents=True, exist_ok=True)
    if given.fresh:
        take_steps(given.directory.resolve(), given.model, given.steps)
        return
    ours = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    command = [sys.executable, __file__, "--fresh", f"--model={given.model}", f"--steps={given.steps}"]
    table = Table("cores with other work", *(f"{name}, s" for name in SETTINGS), "ratio", box=None)
    for cores in given.busy:
        found: dict[str, list[float]] = {name: [] for name in SETTINGS}
        for _ in range(given.rounds):
            for name, settings in SETTINGS.items():
                with busy(cores):
                    said = subprocess.run(
                        [*command, f"--directory={given.directory}"],
                        env=ours | settings, check=True, stdout=subprocess.PIPE, text=True,
                    ).stdout  # fmt: skip
                found[name].append(median(json.loads(said.splitlines()[-1])))
        by_default, by_ours = found.values()
        ratios = [one / other for one, other in zip(by_ours, by_default, strict=True)]
        table.add_row(
            str(cores), *(f"{median(each):.1f}" for each in found.values()),
            f"{median(ratios):.2f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)})",
        )  # fmt: skip
    new_console().print(table)


if __name__ == "__main__":
    main()
