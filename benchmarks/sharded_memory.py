"""What a rank takes of the host's memory for models that are sharded, on one rank and on two.

    python benchmarks/sharded_memory.py
    python benchmarks/sharded_memory.py --model small --zero fsdp2     # 30M parameters: does it run?

A random Llama in fp32, 0.25B parameters in three files, is read as the stages read it: all its parameters
train under an engine, or frozen and sharded they are the reference and the reward model. The phases follow
each other in one process:

    policy      read and sharded, with the engine's masters and what else it holds
    reference   a second model, read and sharded
    reward      a third one, under a scalar head
    learning    an optimizer step of the first, from one row of 64 tokens a rank

A figure is the peak, over a phase, of the process's private memory (RssAnon in /proc/self/status, asked
every 5 ms) above that of a rank that has loaded its libraries and joined the others; so what earlier phases
hold is in it. Pages of the files that the system has mapped are not in it: they are shared by all processes
and given up when memory runs short. While models are read, a rank of two wants at most 0.6 of what one rank
wants, and both want the same, up to a tenth.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import queue
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from look import new_console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.cli.execute import quiet_libraries
from rlhf.distributed.compute import Compute, make_compute
from rlhf.models.base import ModelConfig
from rlhf.models.load import load_causal_lm
from rlhf.models.logprobs import ResponseModel, pack_sequences
from rlhf.models.value_head import load_scalar_model, reset_head
from rlhf.training.config import OptimConfig
from rlhf.training.make_engine import make_engine

MODEL = ModelConfig(kind="local", attention="sdpa")
SIZES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "vocab_size": 8000},
    "quarter": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 13, "vocab_size": 16000},
}
OPTIM = OptimConfig(
    lr=1e-5, weight_decay=0.0, eps=1e-8, schedule="linear", warmup_fraction=0.0, max_grad_norm=1.0
)
MIB = 2**20


class PrivateMemory:
    """Peaks above what there was at first, by phase, in MiB."""

    def __init__(self) -> None:
        gc.collect()
        self.peaks: dict[str, float] = {}
        self._idle = _private()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """While open, ask again and again."""
        over, seen = threading.Event(), [_private()]

        def ask() -> None:
            while not over.wait(0.005):
                seen.append(_private())

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            yield
        finally:
            seen.append(_private())
            over.set()
            asking.join()
        self.peaks[name] = (max(seen) - self._idle) / MIB


def _private() -> int:
    with Path("/proc/self/status").open(encoding="ascii") as status:
        return sum(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def write_model(directory: Path, size: str) -> None:
    """Random weights, in several files."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES[size], num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, pad_token_id=2, max_position_embeddings=512,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    bytes_of_all = sum(each.nbytes for each in model.parameters())
    model.save_pretrained(directory, max_shard_size=f"{bytes_of_all // 2_000_000}MB")


def measure(directory: Path, compute: Compute) -> dict[str, float]:
    """The peak of each phase on this rank."""
    if compute.zero == "fsdp2":
        from rlhf.training.fsdp import shard_frozen
    else:
        import deepspeed  # noqa: F401 - a library that an idle rank has loaded

        from rlhf.training.deepspeed import shard_frozen
    compute.barrier()
    memory = PrivateMemory()
    with memory.phase("policy"):
        policy = load_causal_lm(directory, MODEL, compute.dtype, compute.loads_on, compute)
        engine = make_engine(ResponseModel(policy), [(policy.parameters(), OPTIM)], compute)
    with memory.phase("reference"):
        reference = load_causal_lm(directory, MODEL, compute.dtype, "cpu", compute)
        shard_frozen(reference.requires_grad_(False), compute)
    with memory.phase("reward"):
        reward = load_scalar_model(directory, MODEL, compute.dtype, "cpu", compute, new_head=True)
        reset_head(reward)
        shard_frozen(reward.requires_grad_(False), compute)
    with memory.phase("learning"):
        ids = torch.arange(64) + compute.rank
        batch = pack_sequences([ids[:1]], [ids[1:]], compute.device)
        engine.set_rates(0, 1)
        engine.backward(-engine.model(batch, 1.0).logp_N.sum() / 126, last=True)
        engine.step()
    return memory.peaks


def be_a_rank(rank: int, ranks: int, port: int, directory: Path, zero: Any, results: Any) -> None:
    """Measure beside the other ranks; put (rank, peaks) into the queue."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1",
    )  # fmt: skip
    torch.set_num_threads(1)
    quiet_libraries()
    compute, _ = make_compute("cpu", "fp32", zero)
    results.put((rank, measure(directory, compute)))
    compute.barrier()
    results.close()
    results.join_thread()
    os._exit(0)  # threads of the backend may wait for ranks that have left


def on_ranks(ranks: int, directory: Path, zero: str) -> list[dict[str, float]]:
    """The peaks of each rank."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [
        context.Process(target=be_a_rank, args=(rank, ranks, port, directory, zero, results), daemon=True)
        for rank in range(ranks)
    ]
    for worker in workers:
        worker.start()
    found: dict[int, dict[str, float]] = {}
    while len(found) < ranks:
        try:
            found.update([results.get(timeout=5)])
        except queue.Empty:
            if any(worker.exitcode for worker in workers):
                sys.exit("A rank has ended: see above; if nothing is there, the system had no more memory.")
    for worker in workers:
        worker.join()
    return [found[rank] for rank in range(ranks)]


def main(arguments: Sequence[str] | None = None) -> dict[str, list[list[dict[str, float]]]]:
    """Measure and print; by `zero=` the peaks of one rank and of two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="quarter")
    parser.add_argument("--zero", nargs="+", choices=("fsdp2", "zero3"), default=["fsdp2", "zero3"])
    parser.add_argument("--json", type=Path, help="a file for the figures")
    options = parser.parse_args(arguments)
    quiet_libraries()  # the ranks', too, by their environment
    found: dict[str, list[list[dict[str, float]]]] = {}
    console = new_console()
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "model"
        write_model(directory, options.model)
        size = sum(file.stat().st_size for file in directory.glob("*.safetensors")) / MIB
        for zero in options.zero:
            found[zero] = [on_ranks(ranks, directory, zero) for ranks in (1, 2)]
            (one,), (first, second) = found[zero]
            table = Table(
                "phase", "one rank", "rank 0 of 2", "rank 1 of 2", "share",
                title=f"zero={zero}: peaks in MiB; the model's files have {size:.0f} MiB",
            )  # fmt: skip
            for phase in one:
                peaks = [each[phase] for each in (one, first, second)]
                share = max(peaks[1:]) / peaks[0]
                table.add_row(phase, *(f"{peak:.0f}" for peak in peaks), f"{share:.2f}")
            console.print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2), encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
