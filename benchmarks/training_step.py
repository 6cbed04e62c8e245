"""SFT, reward-model and DPO training against TRL's trainers, on the same tokens in the same batches.

    python benchmarks/training_step.py                          # the packaged rows
    python benchmarks/training_step.py --data hh                # HH's rows: long, with very different lengths
    python benchmarks/training_step.py --data hh --peer-checkpointing off
    python benchmarks/training_step.py --stages dpo --data hh
    python benchmarks/training_step.py --model tiny             # small sizes too: does it run?

It needs the `bench` extra (TRL). Every run is a fresh process; this project's (train_rlhf.py) and TRL's
(peer_trl_training.py) alternate, each going first in every other pair, and each pair gives one ratio. A step
lasts from the end of the previous step to its own end, so the first step, which warms up, is not counted.
tokens/s are real tokens (prompts and answers; both sides of a pair). Positions are those in the models'
linear layers: padding increases them, shared prefixes reduce them. TRL's DPO runs the reference in each step.
This project runs it once, before the first step, and the counted steps' share of that time is added. The
losses of the first counted steps are shown as a check that both do the same: those of SFT and DPO agree up to
rounding, those of reward models up to their random heads.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from look import new_console
from ppo_step import add_clock, clocked, run
from rich.table import Table
from run_rlhf import make_single
from train_rlhf import overrides
from transformers import PreTrainedTokenizerBase
from workloads import HH, PACKAGED, PPO, base_model

from rlhf.data.chat_template import exchange_ids
from rlhf.models.base import ModelConfig, load_tokenizer

HERE = Path(__file__).parent
MAX_TOKENS = 1024
"""Most tokens of a row, or of a side of a pair: TRL's and this project's default. Longer rows are left
out."""
LEARNING_RATES = {"sft": 2e-5, "reward": 1e-4, "dpo": 1e-6}
"""TRL's defaults."""
CENTER = 0.01
"""Weight of the term that centers scores: recommended by TRL, and this project's default."""
OF_STAGE = {
    "sft": [], "reward": [f"reward.center={CENTER}"], "dpo": ["dpo.beta=0.1", "dpo.evaluations=1"],
}  # fmt: skip
"""Settings that TRL has too."""
NUM_HELD_OUT = 8
TINY: dict[str, Any] = {"steps": 4, "batch": 4, "pairs": 2}
"""Sizes for --model tiny."""
console = new_console()

Row = dict[str, Any]


class Measured(NamedTuple):
    """Measurements of one run, without its first step."""

    tokens_per_second: float
    positions_a_token: float
    peak_bytes: int
    losses: list[float]
    how: str
    versions: dict[str, str]


def read_rows(stage: str, data: str) -> list[Row]:
    """Rows in the form of this project's data sets."""
    name = "instructions" if stage == "sft" else "pairs"
    with gzip.open(HH) if data == "hh" else (PACKAGED / f"{name}.jsonl").open("rb") as file:
        rows = [json.loads(line) for line in file]
    if stage == "sft" and data == "hh":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    answers = ("completion",) if stage == "sft" else ("chosen", "rejected")
    return [{"prompt": as_messages(row["prompt"]), **{name: row[name] for name in answers}} for row in rows]


def as_messages(prompt: str | list[dict[str, str]]) -> list[dict[str, str]]:
    """The prompt as messages; a text becomes a user's turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def encode(stage: str, row: Row, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """The row in columns that TRL's trainers accept as prepared data."""
    if stage == "sft":
        ids, prompt = exchange_ids(tokenizer, row["prompt"], row["completion"])
        return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}
    sides = {side: exchange_ids(tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected")}
    if stage == "reward":
        return {f"{side}_ids": ids for side, (ids, _) in sides.items()}
    ids, prompt = sides["chosen"]
    return {"prompt_ids": ids[:prompt], **{f"{side}_ids": ids[prompt:] for side, (ids, _) in sides.items()}}


def lengths_of(encoded: dict[str, list[int]]) -> list[int]:
    """Real tokens of a row, or of each side of a pair with its prompt."""
    prompt = len(encoded.get("prompt_ids", []))
    return [prompt + len(ids) for name, ids in encoded.items() if name not in ("labels", "prompt_ids")]


def length(encoded: dict[str, list[int]]) -> int:
    """Real tokens of a row."""
    return sum(lengths_of(encoded))


def make_work(stage: str, options: argparse.Namespace) -> dict[str, Any]:
    """Rows for the steps: unchanged for this project, and for TRL in the order in which the stage uses
    them."""
    directory = options.directory.resolve()
    model = base_model(directory, options.model)
    tokenizer = load_tokenizer(model, ModelConfig(kind="local", path=str(model)))
    rows = read_rows(stage, options.data)
    random.Random(0).shuffle(rows)
    short = [row for row in rows if max(lengths_of(encode(stage, row, tokenizer))) <= MAX_TOKENS]
    count = options.steps * options.batch
    if len(short) < count + NUM_HELD_OUT:
        sys.exit(
            f"--steps {options.steps} of --batch {options.batch} need {count} rows, and {NUM_HELD_OUT} more; "
            f"there are {len(short)}. Use fewer."
        )
    train, seed = short[:count], PPO["seed"]
    order = random.Random(seed).sample(train, count)  # as the stages shuffle them (distributed/batching.py)
    work = {
        "stage": stage, "model": str(model), "rows": train, "held_out": short[count : count + NUM_HELD_OUT],
        "encoded": [encode(stage, row, tokenizer) for row in order], "batch": options.batch, "seed": seed,
        "lr": LEARNING_RATES[stage], "eps": 1e-8, "center": CENTER, "max_tokens": MAX_TOKENS,
        "peft": options.peft, "lora_rank": PPO["lora_rank"], "lora_alpha": PPO["lora_alpha"],
        "precision": options.precision, "checkpointing": options.peer_checkpointing == "on",
        **clocked(options.clock),
        "overrides": [*OF_STAGE[stage], *options.overrides],
    }  # fmt: skip
    return {**work, "device": make_single(overrides(work)).settings.device}


def measure(script: str, work: dict[str, Any], directory: Path) -> Measured:
    """Run one side in a separate process."""
    answer = run(sys.executable, script, work, directory / f"{Path(script).stem}.log")
    batch = work["batch"]
    steps = [work["encoded"][start : start + batch] for start in range(0, len(work["encoded"]), batch)]
    tokens = [sum(map(length, step)) for step in steps]
    assert len(answer["ends"]) == len(steps) == len(answer["losses"]), answer
    if "tokens" in answer:
        theirs = [later - earlier for earlier, later in pairwise(answer["tokens"])]
        assert theirs == tokens[1:], "TRL saw other batches"
    positions = answer["positions"][-1] - answer["positions"][0]
    counted = sum(tokens[1:])
    seconds = answer["ends"][-1] - answer["ends"][0]
    seconds += answer.get("reference_seconds", 0.0) * counted / sum(tokens)
    return Measured(
        counted / seconds, positions / counted,
        answer["peak_bytes"], answer["losses"], answer["precision"], answer["versions"],
    )  # fmt: skip


def compare(stage: str, options: argparse.Namespace) -> None:
    """Run both sides in turn and print each pair."""
    work = make_work(stage, options)
    scripts = ["train_rlhf.py", "peer_trl_training.py"]
    table = Table(
        "pair",
        "tokens/s",
        "TRL's",
        "ratio",
        "positions per token",
        "TRL's",
        "peak GB",
        "TRL's",
        "memory ratio",
        box=None,
    )
    ratios, memory = [], []
    for pair in range(1, options.pairs + 1):
        order = scripts if pair % 2 else scripts[::-1]
        found = {script: measure(script, work, options.directory) for script in order}
        ours, theirs = (found[script] for script in scripts)
        ratios.append(ours.tokens_per_second / theirs.tokens_per_second)
        memory.append(ours.peak_bytes / theirs.peak_bytes)
        table.add_row(
            str(pair), f"{ours.tokens_per_second:.0f}", f"{theirs.tokens_per_second:.0f}",
            f"{ratios[-1]:.2f}", f"{ours.positions_a_token:.2f}", f"{theirs.positions_a_token:.2f}",
            f"{ours.peak_bytes / 1e9:.2f}", f"{theirs.peak_bytes / 1e9:.2f}", f"{memory[-1]:.2f}",
        )  # fmt: skip
    lengths = [length(row) for row in work["encoded"]]
    console.print(
        f"\n{stage}, {options.data} rows of {median(lengths):.0f} tokens (median; longest {max(lengths)}), "
        f"{options.steps} steps of {options.batch}, peft={options.peft}"
    )
    console.print(table)
    console.print(f"median: {median(ratios):.2f} times TRL's tokens/s in {median(memory):.2f} of its memory")
    for name, side in (("this project", ours), ("TRL", theirs)):
        losses = ", ".join(f"{loss:.3f}" for loss in side.losses[:4])
        console.print(f"{name}: losses {losses}; {side.how}; {side.versions}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", nargs="+", choices=sorted(LEARNING_RATES), default=["sft", "reward"])
    parser.add_argument("--data", choices=["packaged", "hh"], default="packaged")
    parser.add_argument("--model", choices=["embedded", "tiny"], default="embedded")
    parser.add_argument("--peft", choices=["none", "lora"], default="none")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    parser.add_argument("--peer-checkpointing", choices=["on", "off"], default="on", help="TRL's default: on")
    parser.add_argument("--steps", type=int, default=9, help="the first one warms up")
    parser.add_argument("--batch", type=int, default=16, help="rows or pairs of a step")
    parser.add_argument("--pairs", type=int, default=3)
    add_clock(parser)
    parser.add_argument("--directory", type=Path, default=HERE / ".work", help="for models and logs")
    parser.add_argument(
        "--overrides", nargs="*", default=[], help="keys of this project, such as sft.micro_batch_tokens=2048"
    )
    if parser.parse_known_args(arguments)[0].model == "tiny":
        parser.set_defaults(**TINY)
    options = parser.parse_args(arguments)
    if options.data == "hh" and not HH.exists():
        parser.error(f"--data hh: {HH} is absent (RLHF_HH=FILE names another place)")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    options = parse(arguments)
    options.directory.mkdir(parents=True, exist_ok=True)
    for stage in options.stages:
        compare(stage, options)


if __name__ == "__main__":
    main()
