"""Host memory of a rank while a stage trains a sharded model, on one rank and on several.

    python benchmarks/sharded_memory.py
    python benchmarks/sharded_memory.py --model small --stages sft --zero fsdp2    # 30M parameters
    python benchmarks/sharded_memory.py --generation layers            # weights gathered layer by layer
    python benchmarks/sharded_memory.py --generation vllm              # where vLLM is installed

A random fp32 Llama with 0.25B parameters in three files goes through the product's own stages, from the
config to the published directory. All its parameters train: two optimizer steps of short rows in SFT; two
steps of a few episodes in PPO, where reference and reward model are as large. The phases:

    loading         from an idle rank to the first pass: read files, shard weights, create masters
    sampling        responses: by the local engine as the preflight chooses, which gathers these small models
                    whole; by the local engine layer by layer; or by one vLLM on all ranks
    reading         passes without gradients: held-out losses, log-probabilities, rewards learning
    forward, backward, optimizer steps checkpointing   the engine's state, hashed and flushed; in PPO also the
    best weights so far publishing      unsharded weights on disk, in 16 files: in PPO the best ones so far,
    at the end those of the
                    model directory

A figure is the peak of the process's private memory in a phase (RssAnon in /proc/self/status, read every 5
ms), above that of an idle rank, which has loaded its libraries and rows and joined the others. So it includes
memory that earlier phases still hold; free memory is returned to the system before each phase. Pages of
mapped files are not included: all processes share them, and the system takes them back when memory runs
short. The share is the larger rank's figure over that of a single rank with the same `zero=`.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import importlib
import json
import multiprocessing
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from look import new_console
from rich.table import Table
from run_rlhf import make_experiment
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from workloads import base_model

from rlhf.cli.execute import execute, set_up_libraries
from rlhf.exit_codes import DONE
from rlhf.models.base import ModelConfig, load_tokenizer

SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size": 384,
        "intermediate_size": 1056,
        "num_hidden_layers": 16,
        "vocab_size": 1000,
        "num_attention_heads": 6,
    },
    "quarter": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 24,
        "vocab_size": 16000,
        "num_attention_heads": 8,
    },
}
STAGES = ("sft", "ppo")
PHASES: dict[str, tuple[str, ...]] = {
    "sampling": ("rlhf.generation.policy_model:PolicyModel.sample",),
    "reading": (
        "rlhf.stages.sft:answer_losses", "rlhf.generation.policy_model:PolicyModel.log_probabilities",
        "rlhf.rewards.model:LearnedReward.__call__", "rlhf.ppo.trainer:PolicyTrainer.score",
    ),
    "learning": ("rlhf.stages.sft:answer_step", "rlhf.ppo.trainer:PolicyTrainer.learn"),
    "checkpointing": ("rlhf.training.checkpoint:Checkpointer.save",),
    "publishing": (
        "rlhf.training.engine:PlainEngine.save_trained", "rlhf.training.fsdp:FsdpEngine.save_trained",
        "rlhf.training.deepspeed:ZeroEngine.save_trained",
    ),
}  # fmt: skip
"""Phase -> functions whose call starts it. It lasts until another one starts."""
IDLE_UNTIL = "rlhf.pipeline.trainable:load_causal_lm"
LIBRARIES = (
    "pandas",
    "pyarrow.compute",
    "peft",
    "safetensors.torch",
    "transformers.models.llama.modeling_llama",
)
"""Libraries that an idle rank has loaded."""
OF_DEEPSPEED = ("deepspeed", "torch._inductor.compile_fx")
"""Libraries of an idle rank with DeepSpeed, which imports the second one late."""
LOADING = "loading"
FILES = 16
"""Number of weight files. One file of the product's size, 5 GB, would hold a full model here."""
MIB = 2**20
M_MMAP_THRESHOLD = -3
"""Constant of malloc.h."""


class PrivateMemory:
    """Peaks by phase above the memory at the start, MiB."""

    def __init__(self) -> None:
        self.peaks: dict[str, float] = {}
        give_back()
        self._idle = _private()
        self._phase: str | None = None
        self._over = threading.Event()
        self._asking = threading.Thread(target=self._ask, daemon=True)
        self._asking.start()

    def begin(self, phase: str) -> None:
        """End the current phase and begin this one."""
        self._note()
        give_back()
        self._phase = phase
        self._note()

    def end(self) -> dict[str, float]:
        """The peaks."""
        self._note()
        self._over.set()
        self._asking.join()
        return self.peaks

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure this phase while open."""
        self.begin(name)
        yield
        self._note()
        self._phase = None

    def _ask(self) -> None:
        while not self._over.wait(0.005):
            self._note()

    def _note(self) -> None:
        phase = self._phase
        if phase is not None:
            self.peaks[phase] = max(self.peaks.get(phase, 0.0), (_private() - self._idle) / MIB)


def map_each_block() -> None:
    """Map each tensor separately, so that freeing it returns its memory to the system.

    On CPUs the product keeps freed memory for its next tensors. Its fragmentation is random, and peaks would
    vary by a fifth from run to run.
    """
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 * 1024)


def give_back() -> None:
    """Return free memory to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _private() -> int:
    with Path("/proc/self/status").open(encoding="ascii") as status:
        return sum(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def write_models(directory: Path, size: str) -> None:
    """Write a causal model and a reward model with random weights, in several files each."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES[size], tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, pad_token_id=2, max_position_embeddings=512,
    )  # fmt: skip
    config.num_labels = 1
    tokenizer = load_tokenizer(base_model(directory, "tiny"), ModelConfig(kind="tiny"))
    for name, kind in (("model", LlamaForCausalLM), ("reward", LlamaForSequenceClassification)):
        model = kind(config)
        bytes_of_all = sum(each.nbytes for each in model.parameters())
        model.save_pretrained(directory / name, max_shard_size=f"{bytes_of_all // 2_000_000}MB")
        tokenizer.save_pretrained(directory / name)


def overrides(directory: Path, stage: str, zero: str, ranks: int, generation: str) -> list[str]:
    """Overrides for the run of one stage."""
    rows = [{"prompt": f"Count to {n}.", "completion": "one two three four five"} for n in range(24)]
    for name in ("sft", "prompts"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return [
        f"stage={stage}", f"zero={zero}", "model=local", f"model.path={directory / 'model'}", "device=cpu",
        "precision=fp32", f"store_dir={directory / 'store'}", f"runs_dir={directory / 'runs'}",
        "gates=warn", "preflight=warn", f"force=[{stage}]", "checkpoint.every_steps=1",
        f"sft.data={directory / 'sft.jsonl'}", "sft.peft=none", "sft.batch_rows=8", "sft.epochs=1.0",
        "prepare.held_out_fraction=0.3", f"ppo.prompts={directory / 'prompts.jsonl'}", "ppo.init=base",
        "ppo.peft=none", f"ppo.reward=model:{directory / 'reward'}", "ppo.critic.init=sft",
        "ppo.score.normalize=none", "ppo.steps=2", "ppo.batch_episodes=4", "ppo.minibatch_episodes=4",
        *(f"{each}.activation_checkpointing=true" for each in STAGES),
        *(f"{each}.micro_batch_tokens=64" for each in STAGES),
        f"ppo.max_new_tokens={3 if generation == 'layers' else 8}",
        "ppo.evaluate_every=1", "ppo.evaluate_prompts=2", "ppo.epochs=1",
        f"generation={'vllm' if generation == 'vllm' else 'local'}",
        "vllm.kv_cache_gib=0.1", "vllm.max_model_len=64",
        f"vllm.tensor_parallel={ranks if generation == 'vllm' else 1}",
    ]  # fmt: skip


def watch(result: Callable[[PrivateMemory], None]) -> None:
    """Start to measure when the first model is loaded; `result` gets the measuring object."""
    memory: list[PrivateMemory] = []

    def begins(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def called(*arguments: Any, **named: Any) -> Any:
            if not memory and phase == LOADING:
                memory.append(PrivateMemory())
                result(memory[0])
                memory[0].begin(LOADING)
            if memory and phase != LOADING:
                memory[0].begin(phase)
            return function(*arguments, **named)

        return called

    for phase, places in {LOADING: (IDLE_UNTIL,), **PHASES}.items():
        for place in places:
            module, _, path = place.partition(":")
            owner, _, name = path.rpartition(".")
            holder: Any = importlib.import_module(module)
            holder = getattr(holder, owner) if owner else holder
            setattr(holder, name, begins(phase, getattr(holder, name)))


def sample_by_layers() -> None:
    """Make the preflight choose sampling by layers, as for a model that is too large for one rank."""
    from rlhf.pipeline import preflight

    chosen = preflight.with_sampling_choice
    preflight.with_sampling_choice = lambda *of: replace(chosen(*of), local_sampling="layers")


def be_a_rank(
    rank: int, ranks: int, port: int, arguments: Sequence[str], file_bytes: int, by_layers: bool, results: Any
) -> None:
    """Run the stage as one of the ranks; put (rank, peaks) into the queue."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1",
    )  # fmt: skip
    torch.set_num_threads(1)
    set_up_libraries()
    sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - until the process ends
    from rlhf.distributed import compute
    from rlhf.training import trained

    trained.FILE_BYTES = file_bytes
    compute.keep_freed_memory = map_each_block  # type: ignore[attr-defined]  # defined in another module
    needs_deepspeed = any(each.startswith("zero=zero") for each in arguments)
    for library in (*LIBRARIES, *(OF_DEEPSPEED if needs_deepspeed else ())):
        importlib.import_module(library)
    if "generation=vllm" in arguments:
        importlib.import_module("vllm")
    if by_layers:
        sample_by_layers()
    found: list[PrivateMemory] = []
    watch(found.append)
    gc.freeze()  # each phase collects garbage: exclude the libraries' objects
    code = execute(make_experiment([*arguments]).resolved, "measured")
    if code == DONE:
        results.put((rank, found[0].end()))
        results.close()
        results.join_thread()
    os._exit(code)  # threads of the backend may wait for ranks that have left


def on_ranks(
    ranks: int, arguments: Sequence[str], file_bytes: int, *, by_layers: bool = False
) -> list[dict[str, float]]:
    """Peaks of each rank."""
    context = multiprocessing.get_context("forkserver")  # importing the libraries takes longer than a stage
    context.set_forkserver_preload([*LIBRARIES, *OF_DEEPSPEED])
    results = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [
        context.Process(
            target=be_a_rank,
            args=(rank, ranks, port, arguments, file_bytes, by_layers, results),
            daemon=True,
        )
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
    """Measure and print; peaks of one rank and of several by stage and `zero=`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="quarter")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--zero", nargs="+", choices=("fsdp2", "zero3"), default=["fsdp2", "zero3"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--generation", choices=("local", "layers", "vllm"), default="local")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    options = parser.parse_args(arguments)
    set_up_libraries()  # the ranks', too, by their environment
    found: dict[str, list[list[dict[str, float]]]] = {}
    console = new_console()
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        write_models(directory, options.model)
        size = sum(file.stat().st_size for file in (directory / "model").glob("*.safetensors"))
        prepare = overrides(directory, "prepare", "none", 1, "local")
        subprocess.run([sys.executable, "-m", "rlhf", *prepare], check=True, stdout=subprocess.DEVNULL)
        for stage in options.stages:
            for zero in options.zero:
                runs = [
                    on_ranks(
                        ranks,
                        overrides(directory, stage, zero, ranks, options.generation),
                        size // FILES,
                        by_layers=options.generation == "layers",
                    )
                    for ranks in (1, options.ranks)
                ]
                found[f"{stage} {zero}"] = runs
                show(
                    console, f"stage={stage} zero={zero}: peaks in MiB; the model has {size / MIB:.0f}", runs
                )
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2), encoding="utf-8")
    return found


def show(console: Any, title: str, runs: Sequence[Sequence[dict[str, float]]]) -> None:
    """Print the table of one stage."""
    (one,), several = runs
    headings = [f"rank {rank} of {len(several)}" for rank in range(len(several))]
    table = Table("phase", "one rank", *headings, "share", title=title)
    for phase in one:
        peaks = [each[phase] for each in (one, *several)]
        table.add_row(phase, *(f"{peak:.0f}" for peak in peaks), f"{max(peaks[1:]) / peaks[0]:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
