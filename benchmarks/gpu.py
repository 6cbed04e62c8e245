"""Speed of one GPU: PPO steps of models of 0.1 to 8B, and one step against TRL's GRPO with vLLM.

    python benchmarks/gpu.py                                    # on a GPU: all sizes, LoRA
    python benchmarks/gpu.py --sizes 0.1B --peer-python grpo/bin/python   # as peer_trl_grpo.py installs it
    python benchmarks/gpu.py --sizes tiny --steps 2 --episodes 8 --new-tokens 8 --peer-python .venv/bin/python

Weights are random, so only time and memory are meaningful: every answer has the maximum length. Each size
runs in a fresh process. Both sample with vLLM (this project also without it: --generation local). PPO also
trains a critic, which GRPO does not have. The memory is torch's; vLLM's on a GPU is not included. The last
line above runs on a CPU, to check that everything works; with --generation vllm also vLLM for CPUs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from look import new_console
from peer_work import Work
from ppo_step import HERE, episodes_per_second, operations, run, show_phases, tokens_per_second
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM
from workloads import ANSWERS, base_model, make_work

from rlhf.distributed.device import hardware, has_gpu
from rlhf.models.base import ModelConfig, load_tokenizer
from rlhf.pipeline.sampling_engine import installed_vllm

SIZES = {
    "tiny": (64, 2, 2, 1, 128), "0.1B": (576, 30, 9, 3, 1536), "0.5B": (1024, 24, 16, 8, 4096),
    "1.5B": (2048, 24, 16, 8, 8192), "3B": (3072, 28, 24, 8, 8192), "8B": (4096, 32, 32, 8, 14336),
}  # fmt: skip
"""Hidden size, layers, heads, heads of keys and values, size of the MLP."""
console = new_console()


def random_model(directory: Path, size: str) -> Path:
    """A random Llama of that size in bf16, created on the device, with a packaged model's tokenizer."""
    target = directory / f"random-{size}"
    if (target / "config.json").exists():
        return target
    kind: Literal["tiny", "embedded"] = "tiny" if size == "tiny" else "embedded"
    tokenizer = load_tokenizer(base_model(directory, kind), ModelConfig(kind=kind))
    hidden, layers, heads, kv_heads, intermediate = SIZES[size]
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=intermediate, vocab_size=len(tokenizer), max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda" if has_gpu() else "cpu"):
        model = LlamaForCausalLM._from_config(config)
    tokenizer.save_pretrained(target)
    model.save_pretrained(target)
    return target


def share_of_peak(work: dict[str, Any], answer: dict[str, Any]) -> float:
    """Useful operations of the median step over those that the device can do in this time."""
    shares = []
    for step, seconds in list(zip(answer["metrics"], answer["seconds"], strict=True))[1:]:
        useful = operations(work, step, answer["micro_batch_tokens"], answer["positions_a_token"])
        shares.append(sum(useful.values()) / seconds / 1e9 / answer["matmul_peak"])
    return float(median(shares))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = [size for size in SIZES if size != "tiny"]
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=sizes)
    parser.add_argument("--peft", choices=["none", "lora"], default="lora")
    parser.add_argument("--steps", type=int, default=4, help="the first one warms up")
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument(
        "--peer-python", help="of TRL's environment (peer_trl_grpo.py); without, no comparison"
    )
    parser.add_argument(
        "--generation", choices=["local", "vllm"], help="what samples; by default vLLM on a GPU that has it"
    )
    parser.add_argument("--directory", type=Path, default=HERE / ".work", help="for models and logs")
    options = parser.parse_args(arguments)
    directory = options.directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    columns = ("size", "s a step", "episodes/s", "tokens/s", "of the peak", "memory, GB", "GRPO, s a step",
               "episodes/s, ratio", "tokens/s, ratio")  # fmt: skip
    by_vllm = has_gpu() and installed_vllm() is not None
    generation = options.generation or ("vllm" if by_vllm else "local")
    table = Table(*columns, title=f"{hardware()}; generation={generation}", box=None)
    for size in options.sizes:
        work = make_work(
            "uniform", directory, steps=options.steps, peft=options.peft, precision="bf16",
            policy=random_model(directory, size), episodes=options.episodes, new_tokens=options.new_tokens,
        )  # fmt: skip
        work["overrides"] = [f"generation={generation}", *([] if has_gpu() else ["vllm.kv_cache_gib=0.1"])]
        ours = run(sys.executable, "run_rlhf.py", work, directory / "rlhf.log")
        show_phases(work, ours)
        row = [
            size, f"{median(ours['seconds'][1:]):.2f}", f"{episodes_per_second(ours):.2f}",
            f"{tokens_per_second(ours):.0f}", f"{share_of_peak(work, ours):.3f}",
            f"{ours['peak_bytes'] / 1e9:.1f}",
        ]  # fmt: skip
        if options.peer_python:
            known = {field.name: work[field.name] for field in fields(Work) if field.name in work}
            answers = ANSWERS["grpo"]
            batches = [batch[: len(batch) // answers] for batch in work["batches"]]
            known |= {"algorithm": "grpo", "answers": answers, "batches": batches}
            theirs = run(options.peer_python, "peer_trl_grpo.py", known, directory / "grpo.log")
            row += [
                f"{median(theirs['seconds'][1:]):.2f}",
                f"{episodes_per_second(ours) / episodes_per_second(theirs):.2f}",
                f"{tokens_per_second(ours) / tokens_per_second(theirs):.2f}",
            ]
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    main()
