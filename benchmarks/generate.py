"""Our sampling against transformers' `model.generate`, with answers of different lengths.

    python benchmarks/generate.py                            # natural lengths
    python benchmarks/generate.py --lengths geometric        # drawn beforehand, the same for both
    python benchmarks/generate.py --model tiny               # small sizes too: does it run?

Both have the same weights and prompts, one batch, temperature 1, no top-k or top-p. They run in one process
and take turns, each going first in every other pair; a few tokens of each warm up before. A pair's ratio is
that of new tokens per second, the stop token included. Our time includes each token's log-probability and the
answers as text.

Natural lengths are those of the `skewed` workload (workloads.py): HH's first turns, answered by a model tuned
on HH's answers. Two samplings differ in length, so the ratios of pairs vary. With `--lengths geometric` each
answer's length is drawn beforehand, from an exponential distribution cut at --new-tokens, and the text does
not end an answer. transformers gets a stopping criterion per row. Ours draws tokens by inverting their
distribution function, so it gets the random number 0, which always draws the first token of the vocabulary:
the stop token here.

Peak memory is measured in a separate process for each engine. The timed process has this project's setting of
the C library's allocator (`rlhf.distributed.device.keep_freed_memory`), from which transformers gains too;
the separate process of transformers has not.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch
from look import new_console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging
from workloads import make_work

from rlhf.data.schema import Message
from rlhf.distributed.compute import Compute, make_compute
from rlhf.distributed.device import Precision
from rlhf.generation.policy_model import PolicyModel
from rlhf.generation.sampler import generate
from rlhf.models.base import ModelConfig

HERE = Path(__file__).parent
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FIRST_ID = 0
GREEDY_TOKENS = 64
TINY: dict[str, Any] = {"prompts": 16, "new_tokens": 32, "pairs": 2, "mean_length": 12}
console = new_console()


@dataclass(frozen=True)
class Task:
    """The work of both engines."""

    model: str
    prompts: list[list[Message]]
    prompt_ids: list[list[int]]
    stop_ids: list[int]
    pad_id: int
    new_tokens: int
    mean_length: float | None
    """Mean of the drawn lengths; None for natural lengths."""

    def lengths(self, seed: int) -> Tensor | None:
        """Lengths as int64 [prompts], each from 1 to new_tokens."""
        if self.mean_length is None:
            return None
        beyond_1 = torch.empty(len(self.prompts)).exponential_(
            1 / (self.mean_length - 1), generator=torch.Generator().manual_seed(seed)
        )
        return (1 + beyond_1.round().long()).clamp(max=self.new_tokens)


class Sampler(Protocol):
    """An engine with its model."""

    def sample(self, seed: int, new_tokens: int) -> list[list[int]]:
        """An answer to each prompt, up to and including its stop token."""

    def greedy(self, new_tokens: int) -> list[list[int]]:
        """Answers of the likeliest token at each step."""


class Ours:
    """rlhf.generation."""

    def __init__(self, task: Task, compute: Compute) -> None:
        self._task = task
        self._policy = PolicyModel.load(Path(task.model), ModelConfig(kind="local", path=task.model), compute)

    def sample(self, seed: int, new_tokens: int) -> list[list[int]]:
        """Sample with `PolicyModel.sample`, as PPO does; with drawn lengths, with the function that it
        calls."""
        lengths = self._task.lengths(seed)
        if lengths is not None:
            return self._sample_lengths(lengths.clamp(max=new_tokens), seed)
        return self._answers(1.0, new_tokens, torch.Generator().manual_seed(seed))

    def greedy(self, new_tokens: int) -> list[list[int]]:
        """Temperature 0."""
        return self._answers(0.0, new_tokens, torch.Generator())

    def _answers(self, temperature: float, new_tokens: int, generator: torch.Generator) -> list[list[int]]:
        rollout, _ = self._policy.sample(
            self._task.prompts, max_new_tokens=new_tokens, temperature=temperature, generator=generator,
            batch_rows=len(self._task.prompts),
        )  # fmt: skip
        return [ids.tolist() for ids in rollout.response_ids]

    def _sample_lengths(self, lengths: Tensor, seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        # from the upper half, so that the first token is drawn only by the number 0
        uniform_BR = 0.5 + 0.5 * torch.rand(len(lengths), int(lengths.max()), generator=generator)
        uniform_BR[torch.arange(len(lengths)), lengths - 1] = 0.0
        rollout = generate(
            self._policy.model, list(map(torch.tensor, self._task.prompt_ids)),
            max_new_tokens=int(lengths.max()), temperature=1.0, stop_ids=[FIRST_ID],
            pad_id=self._policy.pad_id, uniform_BR=uniform_BR, batch_rows=len(lengths),
        )  # fmt: skip
        assert rollout.response_lengths.tolist() == lengths.tolist(), "the lengths that were asked for"
        return [ids.tolist() for ids in rollout.response_ids]


class RowLengths(StoppingCriteria):
    """Ends each row at its own length."""

    def __init__(self, prompt_tokens: int, lengths: Tensor) -> None:
        self._ends = prompt_tokens + lengths

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids.shape[1] >= self._ends.to(input_ids.device)


class Transformers:
    """`model.generate`, on prompts padded on the left."""

    def __init__(self, task: Task, compute: Compute) -> None:
        self._task = task
        model: Any = AutoModelForCausalLM.from_pretrained(task.model, dtype=compute.dtype)
        self._model = model.to(compute.device)
        self._model.eval()
        width = max(map(len, task.prompt_ids))
        rows = [[task.pad_id] * (width - len(ids)) + ids for ids in task.prompt_ids]
        masks = [[0] * (width - len(ids)) + [1] * len(ids) for ids in task.prompt_ids]
        self._ids = torch.tensor(rows, device=compute.device)
        self._mask = torch.tensor(masks, device=compute.device)

    def sample(self, seed: int, new_tokens: int) -> list[list[int]]:
        """Sample; with drawn lengths no token ends a row."""
        torch.manual_seed(seed)
        settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        lengths = self._task.lengths(seed)
        if lengths is None:
            return self._generate(settings, new_tokens, self._task.stop_ids)
        lengths = lengths.clamp(max=new_tokens)
        criterion = RowLengths(self._ids.shape[1], lengths)
        rows = self._generate(settings, new_tokens, None, StoppingCriteriaList([criterion]))
        return [row[:length] for row, length in zip(rows, lengths.tolist(), strict=True)]

    def greedy(self, new_tokens: int) -> list[list[int]]:
        """Greedy answers (do_sample=False)."""
        return self._generate({"do_sample": False}, new_tokens, self._task.stop_ids)

    def margin(self, ids: list[int]) -> float:
        """How much likelier the likeliest next token is than the second, in nats."""
        with torch.no_grad():
            logits = self._model(torch.tensor([ids], device=self._ids.device)).logits[0, -1]
        first, second = logits.log_softmax(-1).topk(2).values.tolist()
        return float(first - second)

    def _generate(
        self,
        settings: dict[str, Any],
        new_tokens: int,
        stop_ids: list[int] | None,
        criteria: StoppingCriteriaList | None = None,
    ) -> list[list[int]]:
        # in the model's place, so that nothing of its own config is merged in
        self._model.generation_config = GenerationConfig(
            max_new_tokens=new_tokens, eos_token_id=stop_ids, pad_token_id=self._task.pad_id, **settings
        )
        found = self._model.generate(
            input_ids=self._ids, attention_mask=self._mask, stopping_criteria=criteria
        )
        return [up_to_stop(row, stop_ids or []) for row in found[:, self._ids.shape[1] :].tolist()]


ENGINES: dict[str, type[Ours] | type[Transformers]] = {"rlhf": Ours, "transformers": Transformers}


def up_to_stop(ids: list[int], stop_ids: list[int]) -> list[int]:
    """The row up to and including its first stop token."""
    ends = [place for place, token in enumerate(ids, 1) if token in stop_ids]
    return ids[: ends[0]] if ends else ids


def make_task(options: argparse.Namespace) -> Task:
    """The workload's first batch."""
    work = make_work(
        "skewed", options.directory.resolve(), steps=1, peft="none", precision=options.precision,
        model=options.model, episodes=options.prompts, new_tokens=options.new_tokens,
        natural=options.lengths == "natural",
    )  # fmt: skip
    torch.set_num_threads(work["threads"])
    config = ModelConfig(kind="local", path=work["model"])
    policy = PolicyModel.load(Path(work["model"]), config, plain_compute("fp32"))
    return Task(
        work["model"], work["prompts"][0], work["batches"][0], policy.stop_ids, policy.pad_id,
        options.new_tokens, options.mean_length if options.lengths == "geometric" else None,
    )  # fmt: skip


def plain_compute(precision: str) -> Compute:
    """Device and precision, without this project's process settings."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Compute(device, str(DTYPES[precision]).removeprefix("torch."))


def compare_greedy(task: Task) -> None:
    """Compare both engines in fp32, token by token."""
    ours, theirs = Ours(task, plain_compute("fp32")), Transformers(task, plain_compute("fp32"))
    tokens = min(task.new_tokens, GREEDY_TOKENS)
    answers, others = ours.greedy(tokens), theirs.greedy(tokens)
    equal = sum(answer == other for answer, other in zip(answers, others, strict=True))
    console.print(
        f"greedy, fp32, at most {tokens} tokens: {equal} of {len(answers)} answers are equal token for token "
        f"({sum(map(len, answers))} tokens, {len(set(map(len, answers)))} different lengths)"
    )
    margins = [
        theirs.margin(prompt + answer[: shared_tokens(answer, other)])
        for prompt, answer, other in zip(task.prompt_ids, answers, others, strict=True)
        if answer != other
    ]
    if margins:
        console.print(f"where the others part, the likeliest token leads by at most {max(margins):.1e} nats")


def shared_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix of two rows."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def timed(engine: Sampler, seed: int, new_tokens: int) -> tuple[float, list[int]]:
    """Seconds, and the answers' lengths."""
    start = time.perf_counter()
    answers = engine.sample(seed, new_tokens)
    return time.perf_counter() - start, list(map(len, answers))


def compare_speed(task: Task, compute: Compute, num_pairs: int) -> None:
    """Take turns, and show each pair."""
    engines: dict[str, Sampler] = {name: engine(task, compute) for name, engine in ENGINES.items()}
    for engine in engines.values():
        engine.sample(0, min(8, task.new_tokens))
    columns = [f"{name} {unit}" for name in engines for unit in ("seconds", "new tokens", "tokens/s")]
    table = Table("pair", "mean and longest answer", *columns, "ratio", box=None)
    ratios = []
    for pair in range(1, num_pairs + 1):
        order = list(engines) if pair % 2 else list(reversed(engines))
        found = {name: timed(engines[name], pair, task.new_tokens) for name in order}
        speeds = {name: sum(lengths) / seconds for name, (seconds, lengths) in found.items()}
        ratios.append(speeds["rlhf"] / speeds["transformers"])
        lengths = found["rlhf"][1]
        cells = [f"{sum(lengths) / len(lengths):.0f}, {max(lengths)}"]
        for name in engines:
            cells += [f"{found[name][0]:.2f}", str(sum(found[name][1])), f"{speeds[name]:.0f}"]
        table.add_row(str(pair), *cells, f"{ratios[-1]:.2f}")
    console.print(table)
    console.print(f"median: {median(ratios):.2f} times the new tokens/s of transformers")


def measure_memory(task: Task, precision: str) -> None:
    """Measure each engine in a separate process."""
    peaks = {}
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        json.dump(asdict(task), file)
        file.flush()
        for name in ENGINES:
            command = [sys.executable, __file__, "--precision", precision, "--alone", name, file.name]
            result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            peaks[name] = json.loads(result.stdout.splitlines()[-1])["peak_bytes"]
    console.print(
        f"peak memory of a process: rlhf {peaks['rlhf'] / 1e9:.2f} GB, transformers "
        f"{peaks['transformers'] / 1e9:.2f} GB, ratio {peaks['rlhf'] / peaks['transformers']:.2f}"
    )


def run_alone(task: Task, name: str, precision: Precision) -> None:
    """Sample once with one engine and print its memory; ours with its process settings."""
    compute = make_compute("auto", precision)[0] if name == "rlhf" else plain_compute(precision)
    ENGINES[name](task, compute).sample(1, task.new_tokens)
    if compute.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(compute.device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak_bytes": peak}))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=["embedded", "tiny"], default="embedded")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    parser.add_argument("--lengths", choices=["natural", "geometric"], default="natural")
    parser.add_argument("--mean-length", type=float, default=64, help="of the drawn lengths, before the cut")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--directory", type=Path, default=HERE / ".work", help="for models")
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    if parser.parse_known_args(arguments)[0].model == "tiny":
        parser.set_defaults(**TINY)
    options = parser.parse_args(arguments)
    if options.mean_length <= 1:
        parser.error("--mean-length must be more than 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    options = parse(arguments)
    logging.disable_progress_bar()
    if options.alone:
        name, file = options.alone
        run_alone(Task(**json.loads(Path(file).read_text(encoding="utf-8"))), name, options.precision)
        return
    options.directory.mkdir(parents=True, exist_ok=True)
    task = make_task(options)
    compare_greedy(task)
    compute, how = make_compute("auto", options.precision)
    console.print(
        f"{len(task.prompts)} prompts, at most {task.new_tokens} new tokens, {options.lengths} lengths, "
        f"{how}; transformers {version('transformers')}, torch {version('torch')}"
    )
    compare_speed(task, compute, options.pairs)
    measure_memory(task, next(name for name, dtype in DTYPES.items() if dtype == compute.dtype))


if __name__ == "__main__":
    main()
