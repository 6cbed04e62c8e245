"""A million rows: time of `prepare` compared with the tokenizer alone, and a rank's memory for the rows.

    python benchmarks/million_rows.py --rows 100000
    python benchmarks/million_rows.py --rows 300 --model tiny      # does it run?
    python benchmarks/million_rows.py --rows 50000 --profile       # only: the parts of prepare's time

Answers have about 500 tokens, of words from the packaged samples, and are the same for each number of rows.
`prepare` reads them as sft.data, and takes their prompts for ppo.prompts and evaluate.prompts. Each side of a
pair (`--pairs`, none by default) is as long. Then the tokenizer alone encodes the same texts, with all of its
threads and with one process per core. Then two processes read the result like two ranks of the stages:

    sft       one epoch's batches, of each the rank's share
    reward    the same for pairs
    ppo       the prompts of one epoch's steps

`--profile` runs `prepare` on one core, in one process, and prints the core seconds of each part. They come
from stopwatches around a few functions: a profiler would slow down Python's functions but not the tokenizer.

Memory is the peak of anonymous memory: of `prepare` with its processes (Pss_Anon, read every 0.2 s), and of a
rank above its memory after loading the libraries (RssAnon, every 5 ms). Pages of mapped files are not
included: the system shares them between processes, and takes them back when memory runs short.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import runpy
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import psutil
from look import new_console
from rich.table import Table
from sharded_memory import MIB, PrivateMemory

from rlhf.data import chat_template
from rlhf.data.answers import Answers
from rlhf.data.cores import on_all_cores
from rlhf.data.prepared import PreparedData
from rlhf.data.tokens import Examiner, TokenIds, in_pieces
from rlhf.distributed.batching import shuffled_batches
from rlhf.distributed.compute import Compute
from rlhf.models.base import ModelConfig, load_tokenizer
from rlhf.ppo.trainer import prompt_batches
from rlhf.stages.prepare import PrepareStage
from rlhf.supervised.pairs import Pairs

SAMPLES = Path(__file__).parents[1] / "data"
TOKENS = 500
BATCH, MAX_TOKENS, MICRO_BATCH_TOKENS = 64, 1024, 8192
OTHER = "all else that runs"
FEW = 40
"""Rows of a run that measures the fixed cost of `prepare`."""
TEXTS_AT_ONCE = 10_000
"""Texts per call of the tokenizer with its own threads."""


def words() -> list[str]:
    """Words of the packaged instructions, in order."""
    lines = (SAMPLES / "instructions.jsonl").read_text(encoding="utf-8").splitlines()
    return [word for line in lines for value in json.loads(line).values() for word in str(value).split()]


def write_rows(path: Path, rows: int, sides: Sequence[str], words_per_row: int) -> None:
    """Write rows with a prompt and these answers; each text has half of the row's words."""
    draw, known = random.Random(0), words()
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            texts = [" ".join(draw.choices(known, k=words_per_row // 2)) for _ in ("prompt", *sides)]
            row = dict(zip(("prompt", *sides), texts, strict=True))
            row["prompt"] = f"{number}: {row['prompt']}"
            file.write(json.dumps(row) + "\n")


def anonymous_bytes(process: psutil.Process) -> int:
    """Anonymous memory of a process and its child processes."""
    total = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            lines = Path(f"/proc/{each.pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # it has ended
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss_Anon"))
    return total


class Clock:
    """Wall seconds since it was created, and core seconds, because others may use the machine too."""

    def __init__(self) -> None:
        self._start, self._work = time.monotonic(), self._all_cores()

    def taken(self, name: str) -> dict[str, float]:
        """Both times, with this name in their keys."""
        seconds, work = time.monotonic() - self._start, self._all_cores() - self._work
        return {f"{name}: seconds": seconds, f"{name}: core seconds": work}

    def _all_cores(self) -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(each.ru_utime + each.ru_stime for each in used)


def prepare_command(folder: Path, model: str, name: str, *sources: str) -> list[str]:
    """Command of `prepare` with these sources, and with prompts taken from sft.data."""
    return [
        "stage=prepare", f"model={model}", "device=cpu", f"run_name={name}", f"runs_dir={folder}/runs",
        f"store_dir={folder}/store", "ppo.prompts=sft.data", "evaluate.prompts=sft.data", *sources,
    ]  # fmt: skip


def prepare(folder: Path, model: str, name: str, *sources: str) -> dict[str, float]:
    """Run `prepare` in a separate process."""
    start, peak = Clock(), 0
    command = prepare_command(folder, model, name, *sources)
    started = subprocess.Popen([sys.executable, "-m", "rlhf", *command], cwd=folder)
    process = psutil.Process(started.pid)
    while started.poll() is None:
        peak = max(peak, anonymous_bytes(process))
        time.sleep(0.2)
    if started.returncode:
        sys.exit("`prepare` failed: see above.")
    return {**start.taken(name), f"{name}: peak MiB": peak / MIB}


class Stopwatches:
    """Core seconds of this thread in each part, without parts that run inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open, self._last = [OTHER], time.thread_time()

    def watch(self, holder: object, name: str, part: str) -> None:
        """From now on, count the time of this function of a module or class to the part."""
        function = getattr(holder, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            self._lap()
            self._open.append(part)
            try:
                return function(*arguments, **options)
            finally:
                self._lap()
                self._open.pop()

        setattr(holder, name, watched)

    def _lap(self) -> None:
        now = time.thread_time()
        self.seconds[self._open[-1]] += now - self._last
        self._last = now


def watched_prepare(command: Sequence[str], results: Any) -> None:
    """Run `prepare` in this process, on one core; put the seconds of each part into the queue."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # on one core it starts no processes
    watches = Stopwatches()
    watches.watch(PrepareStage, "run", "reading, splitting, writing")
    watches.watch(Examiner, "_examine_piece", "ids and texts as columns")
    watches.watch(Examiner, "_examine_row", "parsing, checking, deduplicating")
    watches.watch(Examiner, "_sequences", "ids and texts as columns")
    watches.watch(chat_template, "_render", "chat template")
    watches.watch(chat_template, "_encode", "tokenizing")
    sys.argv = ["rlhf", *command]
    try:
        runpy.run_module("rlhf", run_name="__main__")
    finally:
        del watches.seconds[OTHER]
        results.put(dict(watches.seconds))


def parts_of_prepare(command: Sequence[str]) -> dict[str, float]:
    """Core seconds of `prepare` by part."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=watched_prepare, args=(command, results))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit("`prepare` failed: see above.")
    parts: dict[str, float] = results.get()
    return parts


def texts_of(data: PreparedData) -> Iterator[str]:
    """The different texts that `prepare` encodes, as the chat template renders them."""
    for role, split in (("sft", "train"), ("sft", "held_out"), ("pairs", "train"), ("pairs", "held_out")):
        for row in data.rows(role, split):
            (prompt, *_), *_ = row.exchanges()
            yield prompt[0]["content"]
            yield from (answer for _, answer in row.exchanges())


def tokenizer_alone(tokenizer: Any, data: PreparedData) -> dict[str, float]:
    """Seconds of encoding, without reading: with the tokenizer's threads, and with one process per core."""
    figures: dict[str, float] = defaultdict(float)
    tokens, found = 0, texts_of(data)
    while texts := list(islice(found, TEXTS_AT_ONCE)):
        start = Clock()
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for name, seconds in start.taken("threads").items():
            figures[name] += seconds
        tokens += sum(map(len, encoded))

    def encode(texts: Sequence[str]) -> int:
        rows = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return sum(map(len, rows))

    start = Clock()
    same = sum(on_all_cores(encode, in_pieces(texts_of(data))))
    assert same == tokens
    return {**figures, **start.taken("processes"), "tokens": tokens}


def be_a_rank(rank: int, artifact: Path, results: Any) -> None:
    """Read rows as a rank of the stages does; put (rank, peaks in MiB) into the queue."""
    import pyarrow.compute  # noqa: F401 - a library that an idle rank has loaded
    import torch

    torch.set_num_threads(1)
    compute, data = Compute("cpu", "float32", rank=rank, world_size=2), PreparedData(artifact)
    memory = PrivateMemory()
    with memory.phase("sft"):
        rows, ids = data.rows("sft", "train"), TokenIds(data.tokens_path("sft", "train"))
        answers = Answers.of(rows, ids, MAX_TOKENS, all_turns=True)
        for batch in shuffled_batches(range(len(answers)), BATCH, 1, seed=0):
            part = answers.pick(batch)
            for indices, _, _ in compute.micro_batches(part.lengths.tolist(), MICRO_BATCH_TOKENS):
                assert all(len(part[index]) <= MAX_TOKENS for index in indices)
    with memory.phase("reward"):
        pairs = Pairs(data.rows("pairs", "train"), TokenIds(data.tokens_path("pairs", "train")), MAX_TOKENS)
        for batch in shuffled_batches(range(len(pairs)), BATCH, 1, seed=0):
            some = pairs.pick(batch)
            for indices, _, _ in compute.micro_batches(some.lengths.max(-1).tolist(), MICRO_BATCH_TOKENS):
                assert all(len(some[index].chosen) <= MAX_TOKENS for index in indices)
    with memory.phase("ppo"):
        prompts = data.rows("ppo", "train")
        for asked in prompt_batches(prompts, BATCH, max(1, len(prompts) // BATCH), seed=0):
            assert all(row.prompt for row in asked)
    results.put((rank, memory.peaks))


def on_two_ranks(artifact: Path) -> list[dict[str, float]]:
    """Peaks of each rank, MiB."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=be_a_rank, args=(rank, artifact, results)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    found = dict(results.get(timeout=3600) for _ in ranks)
    for rank in ranks:
        rank.join()
    return [found[rank] for rank in range(2)]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--pairs", type=int, default=0)
    parser.add_argument("--profile", action="store_true", help="only what prepare's time goes into")
    parser.add_argument("--model", choices=("embedded", "tiny"), default="embedded")
    parser.add_argument("--scratch", type=Path, help="a directory on a disk with room: 10 GB for a million")
    options = parser.parse_args(arguments)
    console = new_console()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch)
        per_row = 60 if options.model == "tiny" else 370  # a byte is a token; or 1.35 tokens to a word
        write_rows(folder / "sft.jsonl", options.rows, ["completion"], per_row)
        write_rows(folder / "pairs.jsonl", options.pairs, ["chosen", "rejected"], per_row)
        write_rows(folder / "few.jsonl", FEW, ["completion"], per_row)
        pairs = [f"reward.pairs={folder}/pairs.jsonl"] if options.pairs else []
        prepare(folder, options.model, "base", f"sft.data={folder}/few.jsonl", "prepare.response_tokens=9")
        if options.profile:
            parts = parts_of_prepare(
                prepare_command(folder, options.model, "all", f"sft.data={folder}/sft.jsonl", *pairs)
            )
            table = Table("", "core seconds", "share", title=f"{options.rows} rows, {options.pairs} pairs")
            for part, seconds in sorted(parts.items(), key=itemgetter(1), reverse=True):
                table.add_row(part, f"{seconds:.1f}", f"{seconds / sum(parts.values()):.0%}")
            console.print(table)
            return {"parts": parts}
        found: dict[str, Any] = prepare(folder, options.model, "few", f"sft.data={folder}/few.jsonl")
        found |= prepare(folder, options.model, "all", f"sft.data={folder}/sft.jsonl", *pairs)
        artifact = folder / "runs" / "all" / "artifacts" / "prepare"
        (base,) = (folder / "store" / "base").glob("[!.]*")
        tokenizer = load_tokenizer(base, ModelConfig(kind=options.model))
        found |= tokenizer_alone(tokenizer, PreparedData(artifact))
        ranks = on_two_ranks(artifact)
    cores = len(os.sched_getaffinity(0))
    title = f"{options.rows} rows, {options.pairs} pairs, {found['tokens'] / 1e6:.1f}M tokens, {cores} cores"
    table = Table("", "seconds", "of all cores", "peak MiB", title=title)
    for name, what in (
        ("all", "prepare, with its processes"),
        ("few", f"prepare of {FEW} rows"),
        ("threads", "the tokenizer alone, its threads"),
        ("processes", "the tokenizer alone, processes"),
    ):
        peak = found.get(f"{name}: peak MiB")
        times = [f"{found[f'{name}: {unit}']:.0f}" for unit in ("seconds", "core seconds")]
        table.add_row(what, *times, "" if peak is None else f"{peak:.0f}")
    for rank, peaks in enumerate(ranks):
        for phase, peak in peaks.items():
            table.add_row(f"rank {rank} above an idle one, {phase}", "", "", f"{peak:.0f}")
    console.print(table)
    return found | {"ranks": ranks}


if __name__ == "__main__":
    main()
