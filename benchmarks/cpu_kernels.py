"""Time that each CPU kernel saves in a PPO step. In one process, steps with it and without it take turns.

    OMP_NUM_THREADS=1 python benchmarks/cpu_kernels.py

All steps have the same prompts, and all answers are equally long. Seconds are the CPU time of all threads of
the process, which other work on the machine disturbs less than wall-clock time. The first round warms up.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from look import new_console
from rich.table import Table
from run_rlhf import make_trainer, take_step
from workloads import make_work

from rlhf.data.schema import PromptRow
from rlhf.generation import sampler
from rlhf.models import packed_attention
from rlhf.models.packed_batch import Packed
from rlhf.tracking.timer import StepTimer

Changes = Sequence[tuple[Any, str, Any]]
NO_LEAN: Changes = [(sampler, "is_lean", lambda *_: False)]


def by_torchs_kernel(*args: Any) -> torch.Tensor:
    """Attention of one token by torch's kernel."""
    q, k, v, mask, scale = args
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2)


WITHOUT: dict[str, Changes] = {
    "nothing": [],
    "LeanDecoder": NO_LEAN,
    "LeanDecoder, _of_one_token": [*NO_LEAN, (packed_attention, "_of_one_token", by_torchs_kernel)],
    "ShortAttention": [(packed_attention, "MAX_SHORT_TOKENS", 0)],
    "shared prefixes": [(Packed, "_share", lambda *_: None)],
}
"""Kernel that is left out -> changes that do so. Models without `LeanDecoder` decode by `_of_one_token`."""


@contextmanager
def changed(changes: Changes) -> Iterator[None]:
    """While open, these attributes have other values."""
    before = [(owner, name, vars(owner)[name]) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def main() -> None:
    """Take the steps and print the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=6, help="the first one warms up")
    parser.add_argument("--peft", choices=["none", "lora"], default="none")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--model", choices=["embedded", "tiny"], default="embedded")
    parser.add_argument("--episodes", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--directory", type=Path, default=Path(__file__).parent / ".work")
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    work = make_work(
        "uniform", options.directory.resolve(), steps=1, peft=options.peft, precision=options.precision,
        model=options.model, episodes=options.episodes, new_tokens=options.new_tokens,
    )  # fmt: skip
    work["prompts"] *= options.rounds * len(WITHOUT)
    work["overrides"] = ["device=cpu"]
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in WITHOUT}
    number = 0
    cpu_time: Changes = [(StepTimer, "_now", lambda timer: time.process_time())]
    with tempfile.TemporaryDirectory() as scratch, changed(cpu_time):
        trainer, precision = make_trainer(work, Path(scratch))
        trainer.policy.stop_ids = []
        rows = [PromptRow(prompt) for prompt in work["prompts"][0]]
        for _ in range(options.rounds):
            for name, changes in WITHOUT.items():
                number += 1
                with changed(changes):
                    begun = time.process_time()
                    metrics = take_step(trainer, rows, number)
                    whole = time.process_time() - begun
                clocks = {key: value for key, value in metrics.items() if key.startswith("seconds_")}
                seconds[name].append({"step": whole, **clocks})
    console, table = new_console(), Table("without", "step, CPU s", "ratio", "each round", box=None)
    for phase in clocks:
        table.add_column(phase.removeprefix("seconds_"))
    for name, steps in seconds.items():
        pairs = list(zip(steps, seconds["nothing"], strict=True))[1:]
        ratios = [one["step"] / whole["step"] for one, whole in pairs]
        table.add_row(
            name, f"{median(step['step'] for step in steps[1:]):.2f}", f"{median(ratios):.2f}",
            ", ".join(f"{ratio:.2f}" for ratio in ratios),
            *(f"{median(step[phase] for step in steps[1:]):.2f}" for phase in clocks),
        )  # fmt: skip
    console.print(table)
    console.print(f"{precision}; {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
