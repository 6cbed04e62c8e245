"""Time and memory of one step of PPO, GRPO or RLOO by phase, compared with peers.

    python benchmarks/ppo_step.py                                        # uniform, all parameters
    python benchmarks/ppo_step.py --workload skewed --peft lora
    python benchmarks/ppo_step.py --peer trl --peer-python ~/trl/bin/python
    python benchmarks/ppo_step.py --algorithm grpo --workload skewed --peer trl

Skewed lengths are drawn once and forced on both sides: the n-th answer has the n-th length
(forced_lengths.py). A run whose answers have other lengths ends with an error.

Every run is a fresh process. With a peer, runs alternate; each pair has its own seed and gives one ratio, of
the medians over the steps. No figure includes the first step, which warms up. The matmul peak is the better
of two measurements in the run's process, before its first step and after its last. Peers' runners are for
CPUs, so with a peer this project uses device=cpu. GRPO and RLOO are compared with TRL 1.16 of this project's
own environment; PPO's peers need --peer-python.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from look import new_console
from peer_work import Work
from rich.table import Table
from run_rlhf import make_single, overrides
from transformers import AutoConfig
from workloads import ANSWERS, SHAPES, make_work

from rlhf.config import ConfigError

HERE = Path(__file__).parent
console = new_console()


def run(python: str, script: str, work: dict[str, Any], log: Path) -> dict[str, Any]:
    """Start a runner on the work; return the JSON of its last line."""
    with (
        tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file,
        log.open("w", encoding="utf-8") as errors,
    ):
        json.dump(work, file)
        file.flush()
        of_ranks = (
            "RANK",
            "LOCAL_RANK",
            "WORLD_SIZE",
        )  # a runner is a single rank, even if this process is one of several
        alone = {name: value for name, value in os.environ.items() if name not in of_ranks}
        command = [python, str(HERE / script), file.name]
        result = subprocess.run(command, env=alone, stdout=subprocess.PIPE, stderr=errors, text=True)
    if result.returncode:
        sys.exit(f"{script} ended with {result.returncode}:\n{log.read_text(encoding='utf-8')[-3000:]}")
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answer


def episodes_per_second(answer: dict[str, Any]) -> float:
    """Median over the steps, without the first, which warms up."""
    found: float = median(n / s for n, s in zip(answer["episodes"][1:], answer["seconds"][1:], strict=True))
    return found


def tokens_per_second(answer: dict[str, Any]) -> float:
    """Response tokens over seconds of all steps, without the first."""
    return float(sum(answer["new_tokens"][1:]) / sum(answer["seconds"][1:]))


def sampled(answer: dict[str, Any]) -> str:
    """Median and mean response tokens of a step, as text."""
    tokens = answer["new_tokens"][1:]
    return f"{median(tokens):.0f}, {mean(tokens):.0f}"


def operations(
    work: dict[str, Any], step: dict[str, float], micro_batch_tokens: int, positions_a_token: float
) -> dict[str, float]:
    """Useful matrix operations by phase: 2 per weight and token, 6 if it trains.

    Padding, recomputation and attention scores are not counted; shared prefixes count once. If the rollout
    fits into one pass, the pass in `score` is the first of `update` (`rlhf.ppo.trainer.PolicyTrainer.score`)
    and is not counted again.
    """
    config = AutoConfig.from_pretrained(work["model"])
    head = config.hidden_size * config.vocab_size
    key_value = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    layer = (
        2 * config.hidden_size * (config.hidden_size + key_value)
        + 3 * config.hidden_size * config.intermediate_size
    )
    trunk = config.num_hidden_layers * layer
    prompt, response = step["prompt_tokens"], step["response_tokens"]
    every = 2 * trunk * (prompt + response) * min(1.0, positions_a_token)
    passes = work["epochs"] - 1 if prompt + response <= micro_batch_tokens else work["epochs"]
    train = 4 if work["peft"] == "lora" else 6  # an adapter needs no gradients of the frozen weights
    models = 2 if work["algorithm"] == "ppo" else 1  # policy and critic
    return {
        "generate": every + 2 * head * response,
        "reward": every,
        "score": models * every + 2 * head * response,
        "reference": every + 2 * head * response,
        "update": (work["epochs"] * (train - 2) + passes * 2) * (models * every / 2 + head * response),
    }


def show_phases(work: dict[str, Any], answer: dict[str, Any]) -> None:
    """Print each phase's median over the steps, without the first."""
    steps, peak = answer["metrics"][1:], answer["matmul_peak"]
    table = Table("phase", "seconds", "share", "tokens/s", "GFLOP/s", "of peak", box=None)
    total = median(answer["seconds"][1:])
    useful = [
        operations(work, step, answer["micro_batch_tokens"], answer["positions_a_token"]) for step in steps
    ]
    for name in answer["phases"][1]:
        phase = name.removeprefix("seconds_")
        seconds = median(step[name] for step in steps)
        tokens = median(
            step["response_tokens"] + (0 if phase == "generate" else step["prompt_tokens"]) for step in steps
        )
        row = [
            phase,
            f"{seconds:.2f}",
            f"{seconds / total:.0%}",
            f"{tokens / seconds:.0f}" if seconds > 0.05 else "",
        ]
        if phase in useful[0]:
            speed = median(each[phase] for each in useful) / seconds / 1e9
            row += [f"{speed:.0f}", f"{speed / peak:.2f}"]
        table.add_row(*row)
    table.add_row("step", f"{total:.2f}")
    console.print(table)
    tokens = median(answer["new_tokens"][1:])
    console.print(f"sampled tokens per step (median, mean): {sampled(answer)}")
    console.print(
        f"{episodes_per_second(answer):.2f} episodes/s, {tokens / total:.0f} response tokens/s, "
        f"{answer['positions_a_token']:.2f} positions per token, peak memory "
        f"{answer['peak_bytes'] / 1e9:.2f} GB, matmul peak {peak:.0f} GFLOP/s; {answer['precision']}"
    )


def show_peer(name: str, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Print the ratios by pair. Both sides have sampled equally many tokens."""
    table = Table(
        "pair", "rlhf, s a step", f"{name}, s a step", "sampled tokens", "rlhf, peak GB", f"{name}, peak GB",
        "episodes/s, ratio", "memory, ratio", box=None,
    )  # fmt: skip
    ratios, memory = [], []
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True), 1):
        ratios.append(episodes_per_second(mine) / episodes_per_second(other))
        memory.append(mine["peak_bytes"] / other["peak_bytes"])
        table.add_row(
            str(number), f"{median(mine['seconds'][1:]):.2f}", f"{median(other['seconds'][1:]):.2f}",
            sampled(mine), f"{mine['peak_bytes'] / 1e9:.2f}", f"{other['peak_bytes'] / 1e9:.2f}",
            f"{ratios[-1]:.2f}", f"{memory[-1]:.2f}",
        )  # fmt: skip
    console.print(table)
    console.print(
        f"median: {median(ratios):.2f} times the episodes/s of {name} in {median(memory):.2f} of its memory"
    )
    console.print(f"{name}: {theirs[0]['precision']}; {theirs[0]['versions']}")


def add_clock(parser: argparse.ArgumentParser) -> None:
    """Add the option that selects the clock, for a machine that others use too."""
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall",
        help="cpu: CPU seconds of one thread on both sides, for a machine that does other work too",
    )  # fmt: skip


def clocked(clock: str) -> dict[str, Any]:
    """Work items of the chosen clock. One thread only with CPU time: several threads' waiting would count."""
    return {"clock": clock, "threads": 1 if clock == "cpu" else len(os.sched_getaffinity(0))}


def check_tokens(work: dict[str, Any], answer: dict[str, Any]) -> None:
    """End if a side's number of tokens is not that of the drawn lengths; runners check each answer."""
    wanted = work["lengths"] and [sum(lengths) for lengths in work["lengths"]]
    if wanted and list(map(int, answer["new_tokens"])) != wanted:
        sys.exit(f"answers of {answer['new_tokens']} tokens in the steps, where {wanted} were forced")


def check(work: dict[str, Any], peer: str | None) -> None:
    """End before the first run if the options do not fit together."""
    try:
        device = make_single(overrides(work)).settings.device
    except ConfigError as error:
        sys.exit(str(error))
    if peer and device != "cpu" and torch.cuda.is_available():
        sys.exit(f"device={device}: this would run on CUDA, and peer_{peer}.py is for CPUs. Use device=cpu.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--algorithm", choices=sorted(ANSWERS), default="ppo")
    parser.add_argument("--workload", choices=sorted(SHAPES), default="uniform")
    parser.add_argument("--peft", choices=["none", "lora"], default="none")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    parser.add_argument("--model", choices=["embedded", "tiny"], default="embedded")
    parser.add_argument("--steps", type=int, default=4, help="the first one warms up")
    parser.add_argument("--episodes", type=int)
    parser.add_argument("--new-tokens", type=int)
    parser.add_argument("--peer", choices=["trl", "torchtune"])
    parser.add_argument("--peer-python", help="the python of the peer's own environment (docs/benchmarks.md)")
    parser.add_argument(
        "--peer-checkpointing", choices=["on", "off"], default="on",
        help="TRL's default for GRPO and RLOO: on",
    )  # fmt: skip
    parser.add_argument("--pairs", type=int, default=3)
    add_clock(parser)
    parser.add_argument("--directory", type=Path, default=HERE / ".work", help="for models and logs")
    parser.add_argument(
        "overrides", nargs="*", help="keys of this project, such as ppo.micro_batch_tokens=2048"
    )
    options = parser.parse_args(arguments)
    is_ppo = options.algorithm == "ppo"
    if options.peer and is_ppo and not options.peer_python:
        parser.error("--peer needs --peer-python")
    if options.peer == "torchtune" and options.peft != "none":
        parser.error("--peer torchtune trains all parameters: use --peft none")
    if options.peer == "torchtune" and not is_ppo:
        parser.error(f"--peer torchtune has no {options.algorithm}: use --peer trl")
    if options.peer == "torchtune" and SHAPES[options.workload]["honour_stop"]:
        parser.error("--peer torchtune ends no answer where it is told: use --workload uniform")
    options.directory.mkdir(parents=True, exist_ok=True)
    changes = {"episodes": options.episodes, "new_tokens": options.new_tokens}
    work = make_work(
        options.workload, options.directory.resolve(), steps=options.steps, peft=options.peft,
        precision=options.precision, model=options.model, algorithm=options.algorithm,
        **{key: value for key, value in changes.items() if value},
    )  # fmt: skip
    work["overrides"] = [*(["device=cpu"] if options.peer else []), *options.overrides]
    work |= clocked(options.clock)
    work["checkpointing"] = options.peer_checkpointing == "on"
    check(work, options.peer)
    ours, theirs = [], []
    for pair in range(options.pairs if options.peer else 1):
        work["seed"] = pair
        ours.append(run(sys.executable, "run_rlhf.py", work, options.directory / "rlhf.log"))
        check_tokens(work, ours[-1])
        if options.peer:
            script = f"peer_{options.peer}.py" if is_ppo else "peer_trl_grpo.py"
            known = {field.name: work[field.name] for field in fields(Work) if field.name in work}
            python, log = options.peer_python or sys.executable, options.directory / f"{options.peer}.log"
            theirs.append(run(python, script, known, log))
            check_tokens(work, theirs[-1])
            console.print(f"pair {pair + 1}: {ours[-1]['seconds']} against {theirs[-1]['seconds']}")
    show_phases(work, ours[-1])
    if options.peer:
        show_peer(options.peer, ours, theirs)


if __name__ == "__main__":
    main()
