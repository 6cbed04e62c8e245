"""The planner's predictions against measurements: peak memory and seconds of single stages.

    python benchmarks/plan_accuracy.py              # measure what is not measured yet, then the table
    python benchmarks/plan_accuracy.py --table      # the table alone
    python benchmarks/plan_accuracy.py --fp32       # the same in fp32
    python benchmarks/plan_accuracy.py --ranks      # the same on two and four ranks: memory alone

Each case is `python -m rlhf` in a fresh process that runs one stage; its inputs are in the store already. The
peak is the process's largest resident size, the seconds are those of the stage. Measurements are saved in
benchmarks/.work/plan, one file per case; delete one to measure it again. No other work should run meanwhile.

With several ranks, the peak of each is measured, without pages of mapped model files. Other work on the
machine does not change memory but time, so their seconds are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from run_rlhf import make_experiment
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rlhf.costs.hardware import LIBRARIES, Machine, calibrated_speed, local_machine, quick_speed
from rlhf.costs.model_shape import shape_of
from rlhf.data.prepared import PreparedData
from rlhf.distributed.compute import Compute, make_compute
from rlhf.models.base import BaseModelFiles
from rlhf.pipeline.costing import cost_of
from rlhf.pipeline.preflight import cost_context, peak_memory

HERE = Path(__file__).parent
WORK = HERE / ".work" / "plan"
DATA = HERE.parent / "data"
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Case:
    """One stage with its settings."""

    name: str
    stage: str
    overrides: tuple[str, ...]
    ranks: int = 1


SHORT, MEDIUM, LONG = 24, 160, 640
"""Words per answer."""
COMMON = (
    "model=embedded", "device=cpu", "precision=bf16", "gates=warn", "prepare.held_out_fraction=0.2",
    "evaluate.prompts=prompts.jsonl", "ppo.prompts=prompts.jsonl", "reward.pairs=pairs.jsonl",
    "evaluate.retention=[samples:retention_sentences,samples:retention_questions]", "evaluate.gold=vader",
    "sft.data=short.jsonl", "ppo.score.normalize=none", "ppo.steps=1", "ppo.evaluate_prompts=8",
    "ppo.evaluate_every=1", "ppo.batch_episodes=32", "ppo.minibatch_episodes=16", "ppo.max_new_tokens=48",
)  # fmt: skip
BASE = ("sft.peft=lora", "sft.optim.lr=3e-4", "sft.epochs=1")
"""Overrides of the SFT model that the later stages read."""
FULL_REWARD = ("reward.peft=none", "reward.optim.lr=1e-5")
FULL_PPO = ("ppo.peft=none", "ppo.optim.lr=1e-6", "ppo.critic.optim.lr=1e-5")
CASES = (
    Case("sft lora, short rows", "sft", BASE),
    Case("sft full, short rows", "sft", ("sft.epochs=1",)),
    Case("sft full, medium rows", "sft", ("sft.data=medium.jsonl", "sft.epochs=0.4")),
    Case("sft lora, medium rows", "sft", (*BASE, "sft.data=medium.jsonl", "sft.epochs=0.4")),
    Case("sft full, long rows", "sft", ("sft.data=long.jsonl", "sft.epochs=0.2")),
    Case("sft lora, long rows", "sft", (*BASE, "sft.data=long.jsonl", "sft.epochs=0.2")),
    Case("sft full, long rows, checkpointing", "sft",
         ("sft.data=long.jsonl", "sft.epochs=0.2", "sft.activation_checkpointing=true")),
    Case("sft full, medium rows, 1024 tokens per pass", "sft",
         ("sft.data=medium.jsonl", "sft.epochs=0.4", "sft.micro_batch_tokens=1024")),
    Case("reward lora", "reward", BASE),
    Case("reward full", "reward", (*BASE, *FULL_REWARD)),
    Case("generate", "generate", (*BASE, "generate.num_prompts=32", "generate.samples_per_prompt=4")),
    Case("ppo lora", "ppo", BASE),
    Case("ppo full", "ppo", (*BASE, *FULL_REWARD, *FULL_PPO)),
    Case("ppo lora, one minibatch", "ppo", (*BASE, "ppo.minibatch_episodes=32")),
    Case("ppo full, 512 tokens per pass", "ppo",
         (*BASE, *FULL_REWARD, *FULL_PPO, "ppo.micro_batch_tokens=512")),
)  # fmt: skip

FP32 = tuple(
    replace(case, name=f"{case.name}, fp32", overrides=(*case.overrides, "precision=fp32")) for case in CASES
)
RANKS = tuple(
    Case(f"{stage} full, {zero}, {ranks} ranks", stage,
         (*overrides, "model=local", "model.path=small", f"zero={zero}", f"launch.processes={ranks}"), ranks)
    for stage, overrides in (("sft", ("sft.epochs=1",)), ("ppo", (*BASE, *FULL_REWARD, *FULL_PPO)))
    for zero in ("zero2", "zero3", "fsdp2")
    for ranks in (2, 4)
)  # fmt: skip
"""Cases with a random model of 113 million parameters: its states are larger than an empty process, and four
ranks fit on one machine."""
SMALL = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
         "num_key_value_heads": 4}  # fmt: skip


def write_data(directory: Path) -> None:
    """Write rows of three lengths, pairs and prompts, from the packaged sentences."""
    directory.mkdir(parents=True, exist_ok=True)
    texts = [json.loads(line)["text"] for line in (DATA / "retention_sentences.jsonl").open(encoding="utf-8")]
    words = " ".join(texts).split()
    draw = random.Random(0)

    def text(length: int) -> str:
        length = draw.randint(length * 3 // 4, length * 5 // 4)
        start = draw.randrange(len(words))
        return " ".join((words * 3)[start : start + length])

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        (directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    for name, length in (("short", SHORT), ("medium", MEDIUM), ("long", LONG)):
        write(
            f"{name}.jsonl",
            [{"prompt": f"Tell me fact {n}.", "completion": text(length)} for n in range(100)],
        )
    write(
        "pairs.jsonl",
        [{"prompt": f"Say fact {n}.", "chosen": text(96), "rejected": text(96)} for n in range(100)],
    )
    write("prompts.jsonl", [{"prompt": f"Write fact {n}: {text(SHORT)}"} for n in range(120)])


def write_small(directory: Path) -> None:
    """Write a random model with the embedded model's tokenizer."""
    if directory.exists():
        return
    first = [*COMMON, "stage=prepare", "run_name=embedded"]
    subprocess.run([sys.executable, "-m", "rlhf", *first], cwd=WORK, check=True, stdout=subprocess.DEVNULL)
    (base,) = (WORK / "store" / "base").glob("[!.]*/")
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(base)
    config.update(SMALL | {"head_dim": 64})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    AutoTokenizer.from_pretrained(base).save_pretrained(directory)


def name_of(case: Case) -> str:
    """Name of a case's run and file."""
    return case.name.replace(", ", "-").replace(" ", "-")


def command(case: Case) -> list[str]:
    """Overrides of a case."""
    return [*COMMON, f"stage={case.stage}", f"run_name={name_of(case)}", *case.overrides]


def result_file(case: Case) -> Path:
    """File of a case's measurement."""
    return WORK / f"{name_of(case)}.json"


def wait_for(pid: int) -> tuple[int, resource.struct_rusage, float]:
    """Wait for a process: (status, usage, seconds for which SIGSTOP stopped it and this process)."""
    stopped, process, last = 0.0, psutil.Process(pid), time.monotonic()
    while True:
        found, status, usage = os.wait4(pid, os.WNOHANG)
        if found:
            return status, usage, stopped
        time.sleep(POLL_SECONDS)
        now = time.monotonic()
        if now - last > 10 * POLL_SECONDS or process.status() == psutil.STATUS_STOPPED:
            stopped += now - last
        last = now


class Ranks(threading.Thread):
    """Reads the memory of the ranks that a process has started, until it ends."""

    def __init__(self, launcher: int) -> None:
        super().__init__(daemon=True)
        self._launcher, self._over = psutil.Process(launcher), threading.Event()
        self.peaks: dict[int, float] = {}
        """Peak bytes by process."""
        self.before: dict[int, float] = {}
        """Bytes by process at the start of the stage, before anything is loaded."""

    def run(self) -> None:
        """Read memory until `end`."""
        while not self._over.wait(POLL_SECONDS / 5):
            with suppress(psutil.Error):  # a process may end meanwhile
                for process in self._launcher.children():
                    with suppress(psutil.Error):
                        self._ask(process)

    def _ask(self, process: psutil.Process) -> None:
        found = process.memory_info()
        own, peak = float(found.rss), self.peaks.get(process.pid, 0.0)
        if own > peak:  # count mapped pages only now, because it is slow
            maps = process.memory_maps(grouped=True)
            own -= sum(each.rss - each.anonymous for each in maps if each.path.endswith(".safetensors"))
            self.peaks[process.pid] = max(own, peak)

    def begin(self) -> None:
        """Record that the stage begins."""
        self.before = {each.pid: float(each.memory_info().rss) for each in self._launcher.children()}

    def end(self, ranks: int) -> list[float]:
        """Peak bytes of each rank above its start; other child processes are left out."""
        self._over.set()
        self.join()
        largest = sorted(self.peaks, key=self.peaks.__getitem__, reverse=True)[:ranks]
        return [self.peaks[pid] - self.before[pid] for pid in largest]


def run(case: Case) -> dict[str, Any] | None:
    """Peak bytes of the process and seconds of the stage; with several ranks, each one's peak above its
    memory at the start of the stage. None if the process ran an earlier stage too."""
    arguments = [*command(case), f"force=[{case.stage}]"]
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if case.ranks > 1 else {})
    line = [sys.executable, "-m", "rlhf", *arguments]
    process = subprocess.Popen(line, cwd=WORK, env=environment, stdout=subprocess.PIPE, text=True)
    ranks = Ranks(process.pid)
    if case.ranks > 1:
        ranks.start()
    assert process.stdout is not None
    for said in process.stdout:
        print(said, end="", flush=True)
        if case.ranks > 1 and f" {case.stage} runs (" in said:
            ranks.begin()
    status, usage, stopped = wait_for(process.pid)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{case.name}: exit code {process.returncode}")
    stages = json.loads((WORK / "runs" / name_of(case) / "summary.json").read_bytes())["stages"]
    others = {name for name, stage in stages.items() if stage["status"] == "ran"}
    if others - {case.stage, "prepare"}:
        return None
    found = {"peak_bytes": usage.ru_maxrss * 1024, "seconds": stages[case.stage]["seconds"] - stopped}
    return found if case.ranks == 1 else {"peak_bytes": ranks.end(case.ranks)}


def measure(case: Case) -> None:
    """Measure a case and save the result; create its inputs first if they are missing."""
    found = run(case) or run(case)
    assert found is not None
    result_file(case).write_text(json.dumps(found), encoding="utf-8")


def predict(case: Case, compute: Compute, machine: Machine) -> tuple[float, float, str]:
    """(peak bytes, seconds, phase of the peak), as the planner predicts them before the run.

    Args:
        machine: the machine as a new process sees it.
    """
    alone = [each for each in case.overrides if not each.startswith("launch.")]
    prepare = [*COMMON, "stage=prepare", "run_name=prepared", *alone]
    subprocess.run([sys.executable, "-m", "rlhf", *prepare], cwd=WORK, check=True, stdout=subprocess.DEVNULL)
    experiment = make_experiment(command(case))
    data = PreparedData(WORK / "runs" / "prepared" / "artifacts" / "prepare")
    (base,) = (WORK / "store" / "base").glob("[!.]*/")
    base = base if case.ranks == 1 else WORK / "small"
    shape = shape_of(BaseModelFiles(base, "the model", experiment.settings.model).architecture)
    machine = replace(machine, ranks=case.ranks, ranks_here=case.ranks)
    on = replace(cost_context(experiment.settings, shape, compute, data.size), machine=machine)
    cost = cost_of(experiment.stages[case.stage], on, experiment.stages)
    phase, peak = peak_memory(cost, on)
    return peak, cost.seconds, phase.name


def table(cases: Sequence[Case]) -> str:
    """Table in Markdown: predicted and measured figures by case."""
    compute, _ = make_compute("cpu", "fp32" if cases is FP32 else "bf16")
    speed = calibrated_speed(compute, WORK / "store")
    machine = local_machine(compute, speed)
    lines = [
        f"Calibration: {speed.gflops:.0f} GFLOP/s, {speed.gbytes:.1f} GB/s.\n",
        "| stage | peak, predicted (phase) | measured | error | time, predicted | measured | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        if not result_file(case).exists():
            continue
        found = json.loads(result_file(case).read_text(encoding="utf-8"))
        peak, seconds, phase = predict(case, compute, machine)
        errors = (peak / found["peak_bytes"] - 1, seconds / found["seconds"] - 1)
        lines.append(
            f"| {case.name} | {peak / 2**30:.2f} GiB ({phase}) | {found['peak_bytes'] / 2**30:.2f} GiB "
            f"| {errors[0]:+.0%} | {seconds:.0f} s | {found['seconds']:.0f} s | {errors[1]:+.0%} |"
        )
    return "\n".join(lines)


def table_of_ranks() -> str:
    """Table in Markdown: predicted and measured memory of the cases on several ranks, above a rank's memory
    before loading."""
    compute, _ = make_compute("cpu", "bf16")
    machine = replace(local_machine(compute, quick_speed(compute)), used=LIBRARIES)
    lines = [
        "| case | peak of a rank, predicted (phase) | measured, by rank | error |",
        "| -- | -- | -- | -- |",
    ]
    for case in RANKS:
        if not result_file(case).exists():
            continue
        peaks = json.loads(result_file(case).read_text(encoding="utf-8"))["peak_bytes"]
        peak, _, phase = predict(case, compute, machine)
        measured = f"{min(peaks) / 2**30:.2f} to {max(peaks) / 2**30:.2f}"
        error = f"{peak / max(peaks) - 1:+.0%}"
        lines.append(f"| {case.name} | {peak / 2**30:.2f} GiB ({phase}) | {measured} GiB | {error} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", action="store_true", help="measure nothing")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--fp32", action="store_true", help="the cases in fp32")
    which.add_argument("--ranks", action="store_true", help="the cases on several ranks")
    parser.add_argument("--most", type=int, default=len(CASES), help="measure so many cases at most")
    options = parser.parse_args()
    write_data(WORK)
    write_small(WORK / "small")
    cases = RANKS if options.ranks else FP32 if options.fp32 else CASES
    missing = [case for case in cases if not result_file(case).exists()]
    for case in [] if options.table else missing[: options.most]:
        measure(case)
    if options.table or len(missing) <= options.most:
        print(table_of_ranks() if options.ranks else table(cases))


if __name__ == "__main__":
    main()
