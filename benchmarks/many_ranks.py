"""Every stage on many ranks, with every `zero=`, against one rank: the difference of the results, in fp32.

    python benchmarks/many_ranks.py                                  # eight ranks on this machine, 5 GB
    python benchmarks/many_ranks.py --ranks 4 --zero zero3 fsdp2

With `hsdp` the ranks form two nodes, each started by launch/torchrun.sh on this machine. The model is
`model=tiny`; all its parameters train. SFT, reward model, PPO, DPO and GRPO take two optimizer steps;
`generate`, `evaluate` and `compare` run too. Each `zero=` starts from an empty store. Compared are every
step's metrics and the stages' summaries, both without times and sizes, and the published weights. A figure is
the largest difference; a metric's is divided by its size or by 1, whichever is larger. On CPUs ranks
communicate over gloo.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, get_args

from look import new_console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from rlhf.distributed.compute import Zero

TORCHRUN = Path(__file__).parents[1] / "launch" / "torchrun.sh"
STAGES = ("sft", "reward", "generate", "ppo", "evaluate", "dpo", "grpo", "compare")
TRAINED = ("sft", "reward", "ppo", "dpo", "grpo")
"""Stages that publish weights."""
OTHER_EACH_TIME = re.compile("seconds|latency|bytes|break_even|cost|time")
SETTINGS = (
    "model=tiny", "device=cpu", "precision=fp32", "gates=warn", "preflight=warn",
    "prepare.held_out_fraction=0.5", "sft.data=sft.jsonl", "reward.pairs=pairs.jsonl",
    "ppo.prompts=prompts.jsonl",
    "evaluate.prompts=evaluation.jsonl", "evaluate.retention=[sentences.jsonl,questions.jsonl]",
    "evaluate.gold=vader", "sft.peft=none", "sft.batch_rows=8", "sft.epochs=1", "reward.peft=none",
    "reward.batch_pairs=8", "reward.epochs=1", "generate.num_prompts=6", "ppo.peft=none", "ppo.steps=2",
    "ppo.epochs=1", "ppo.batch_episodes=8", "ppo.minibatch_episodes=8", "ppo.max_new_tokens=6",
    "ppo.evaluate_prompts=6", "ppo.evaluate_every=1", "evaluate.num_prompts=6", "compare.num_questions=3",
    "compare.max_new_tokens=6", "sft.optim.eps=1e-4", "ppo.optim.eps=1e-4", "reward.optim.eps=1e-4",
    "ppo.critic.optim.eps=1e-4", "dpo.data=choices.jsonl", "dpo.peft=none", "dpo.batch_rows=8",
    "dpo.optim.eps=1e-4", "grpo.peft=none", "grpo.steps=2", "grpo.batch_episodes=8",
    "grpo.minibatch_episodes=8", "grpo.optim.eps=1e-4",
)  # fmt: skip
"""Adam divides by a gradient's size. An eps far above rounding errors keeps Adam from amplifying them."""


def write_data(directory: Path) -> None:
    """Write rows of every role; their number is not divisible by 4 or 8 ranks.

    DPO's figures are differences of sums over tokens, so long answers would increase the rounding error, and
    the interval of few rows would multiply it. So its answers are short and many rows are held out.
    """
    numbers = range(24)
    rows: dict[str, list[dict[str, object]]] = {
        "sft": [{"prompt": f"Say {n}", "completion": "word " * (1 + n % 7)} for n in numbers],
        "pairs": [
            {"prompt": f"Rate {n}", "chosen": "I love it! " * (1 + n % 3), "rejected": "No."} for n in numbers
        ],
        "choices": [{"prompt": f"Grade {n}", "chosen": "!" * (1 + n % 3), "rejected": "?"} for n in numbers],
        "prompts": [{"prompt": f"Tell me {'more ' * (n % 5)}about {n}"} for n in numbers],
        "evaluation": [{"prompt": f"What is {n}?"} for n in numbers[:7]],
        "sentences": [{"text": f"Water boils at {n} degrees."} for n in numbers[:5]],
        "questions": [{"question": f"{n}+1?", "choices": ["1", "7"], "answer": 0} for n in numbers[:3]],
    }
    for name, content in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in content)
        (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")


def run(directory: Path, name: str, ranks: int, *overrides: str, nodes: int = 1) -> None:
    """Run all stages. The run's name is also that of its store."""
    command = [sys.executable, "-m", "rlhf", f"launch.processes={ranks}"] if nodes == 1 else [str(TORCHRUN)]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    keys = (f"run_name={name}", f"store_dir=store-{name}", f"stage=[{','.join(STAGES)}]")
    meeting = {"NNODES": str(nodes), "NPROC_PER_NODE": str(ranks // nodes), "MASTER_PORT": free_port()}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path, **meeting}
    logs = [directory / f"{name}.{node}.log" for node in range(nodes)]
    started = []
    for node, log in enumerate(logs):
        with log.open("w", encoding="utf-8") as file:
            words = [*command, *keys, *SETTINGS, *overrides]
            started.append(start(words, directory, environment | {"NODE_RANK": str(node)}, file))
    ended = [each.wait() for each in started]
    if any(ended):
        sys.exit("\n".join([f"{name} failed:", *(log.read_text(encoding="utf-8") for log in logs)]))


def start(words: list[str], directory: Path, environment: dict[str, str], log: IO[str]) -> Any:
    """Start the launcher of one node."""
    return subprocess.Popen(words, cwd=directory, env=environment, stdout=log, stderr=log)


def free_port() -> str:
    """A port on which no process listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def figures(directory: Path, name: str) -> dict[str, dict[str, float | None]]:
    """Comparable figures by stage: each step's metrics and those of the summary."""
    run_directory = directory / "runs" / name
    summary = json.loads((run_directory / "summary.json").read_text(encoding="utf-8"))
    found: dict[str, dict[str, float | None]] = {
        stage: dict(summary["stages"][stage]["metrics"]) for stage in STAGES
    }
    for line in (run_directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        metrics = json.loads(line)
        for metric, value in metrics.items():
            stage = metric.partition("/")[0]
            if stage in found and isinstance(value, int | float):
                found[stage][f"{metric} of step {metrics.get('step')}"] = value
    return {
        stage: {name: value for name, value in each.items() if not OTHER_EACH_TIME.search(name)}
        for stage, each in found.items()
    }


def difference(one: dict[str, float | None], many: dict[str, float | None]) -> tuple[float, str]:
    """The largest difference, and its metric.

    Raises:
        SystemExit: the two sides have different metrics.
    """
    if one.keys() != many.keys():
        sys.exit(f"other metrics: {sorted(one.keys() ^ many.keys())}")

    def between(name: str) -> float:
        a, b = one[name], many[name]
        if a is None or b is None:  # not finite
            return 0.0 if a is b else math.inf
        found = abs(a - b) / max(1.0, abs(a))
        return math.inf if math.isnan(found) else found

    worst = max(one, key=between)
    return between(worst), worst


def published(directory: Path, name: str, stage: str) -> dict[str, Tensor]:
    """The weights that a stage of this run published."""
    return load_file(directory / "runs" / name / "artifacts" / stage / "model.safetensors")


def weights_apart(directory: Path, one: str, many: str, stage: str) -> float:
    """The largest difference between two runs' published weights."""
    a, b = published(directory, one, stage), published(directory, many, stage)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Run, compare and print; the largest difference by `zero=` and stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--zero", nargs="+", choices=get_args(Zero), default=list(get_args(Zero)))
    options = parser.parse_args(arguments)
    found: dict[str, dict[str, float]] = {}
    table = Table("zero=", *STAGES, "weights", title=f"{options.ranks} ranks against one")
    worst_of_all = (0.0, "")
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        write_data(directory)
        run(directory, "one", 1)
        expected = figures(directory, "one")
        for zero in options.zero:
            nodes = 2 if zero == "hsdp" else 1
            run(directory, zero, options.ranks, f"zero={zero}", nodes=nodes)
            measured = figures(directory, zero)
            apart = {stage: difference(expected[stage], measured[stage]) for stage in STAGES}
            worst_of_all = max(worst_of_all, *apart.values())
            weights = max(weights_apart(directory, "one", zero, stage) for stage in TRAINED)
            found[zero] = {stage: value for stage, (value, _) in apart.items()} | {"weights": weights}
            table.add_row(zero, *(f"{value:.1e}" for value in found[zero].values()))
    console = new_console()
    console.print(table)
    console.print(f"The largest difference of a metric: {worst_of_all[0]:.1e} of {worst_of_all[1]}.")
    return found


if __name__ == "__main__":
    main()
