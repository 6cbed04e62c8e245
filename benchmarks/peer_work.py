"""Input and output of a peer's runner.

It uses only the standard library: a runner starts with the Python of the peer's own environment, without
`rlhf`.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from time import perf_counter, process_time
from typing import Literal

CLOCKS = {"wall": perf_counter, "cpu": process_time}
"""cpu: CPU seconds of the process, which other work on the machine hardly changes."""


@dataclass(frozen=True)
class Work:
    """PPO steps to take, in units that every trainer has."""

    model: str
    """A causal language model and its tokenizer, written by `save_pretrained`."""
    reward: str
    """A one-label sequence-classification model with the same tokenizer: scores, and starts the critic."""
    batches: list[list[list[int]]]
    """Token ids of each prompt by PPO step, already in the chat template."""
    new_tokens: int
    honour_stop: bool
    """False: every response has `new_tokens` tokens, even if it contains a stop token."""
    stop_id: int
    temperature: float
    epochs: int
    minibatch_episodes: int
    lr: float
    kl_coef: float
    gamma: float
    lam: float
    clip: float
    value_clip: float
    peft: Literal["none", "lora"]
    lora_rank: int
    lora_alpha: int
    precision: Literal["auto", "bf16", "fp32"]
    """auto: the peer's default."""
    threads: int
    seed: int
    lr_schedule: Literal["constant", "linear"] = "constant"
    """linear: decays to 0 over the steps, without a warm-up."""
    adam_eps: float = 1e-8
    missing_stop_penalty: float = 0.0
    """Subtracted from the score of a response without a stop token; raw score units."""
    evaluate_every: int = 0
    """Steps between reported evaluations; one is before the first step. 0: none."""
    held_out: list[list[int]] = field(default_factory=list)
    """Prompts of the evaluations, as token ids like those of `batches`."""
    algorithm: Literal["ppo", "grpo", "rloo"] = "ppo"
    answers: int = 1
    """Answers to each prompt, in adjacent rows."""
    clock: Literal["wall", "cpu"] = "wall"
    lengths: list[list[int]] | None = None
    """Tokens of each answer by step, its end included (forced_lengths.py); None for natural lengths."""
    never: list[int] = field(default_factory=list)
    """Tokens that may not occur within an answer of a forced length."""
    checkpointing: bool = True
    """Whether TRL's GRPO and RLOO use gradient checkpointing, their default."""

    @property
    def episodes(self) -> int:
        """Episodes per step; for peers it is constant during a run."""
        sizes = {len(batch) * self.answers for batch in self.batches}
        if len(sizes) != 1 or min(sizes) % self.minibatch_episodes:
            raise ValueError(
                f"batches: {sorted(sizes)} answers. All steps need the same number, a multiple of "
                f"minibatch_episodes={self.minibatch_episodes}."
            )
        return sizes.pop()

    def response_tokens(self, unpadded: list[int], pad_id: int) -> int:
        """Number of tokens up to and including each response's first stop token, which may be the padding
        token.

        Args:
            unpadded: number of tokens other than padding in each response, cut after its stop token.
        """
        if not self.honour_stop:
            return len(unpadded) * self.new_tokens
        hidden_stops = sum(number < self.new_tokens for number in unpadded) if pad_id == self.stop_id else 0
        return sum(unpadded) + hidden_stops


@dataclass
class Report:
    """Measurements and results; every list has one entry per PPO step."""

    precision: str
    """Description of the precisions."""
    clock: Literal["wall", "cpu"] = "wall"
    asked: list[float] = field(default_factory=list)
    """Times at which the trainer asked for each step's prompts, and at last the time of the end; the clock is
    paused in `paused`."""
    new_tokens: list[int] = field(default_factory=list)
    """Response tokens up to and including the first stop token."""
    score_mean: list[float] = field(default_factory=list)
    """Mean score of the reward model; TRL's includes `missing_stop_penalty`."""
    kl: list[float] = field(default_factory=list)
    """KL divergence from the reference, nats per response; empty if the trainer does not report it."""
    evaluations: list[tuple[int, list[list[int]]]] = field(default_factory=list)
    """(finished steps, response ids up to and including the first stop token) of each evaluation."""
    pauses: float = 0.0
    """Seconds of all pauses so far."""

    def ask(self) -> None:
        """Record that the trainer asks for the next step's prompts, or has finished."""
        self.asked.append(CLOCKS[self.clock]() - self.pauses)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside counts for no step."""
        start = CLOCKS[self.clock]()
        yield
        self.pauses += CLOCKS[self.clock]() - start

    def as_json(self, episodes: list[int], packages: list[str]) -> str:
        """The line that the benchmark reads; `episodes` of each step."""
        fields = asdict(self)
        fields["seconds"] = [later - earlier for earlier, later in pairwise(fields.pop("asked"))]
        fields["episodes"] = episodes
        fields["versions"] = {name: version(name) for name in packages}
        fields["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        lengths = {len(fields[name]) for name in ("seconds", "episodes", "new_tokens", "score_mean")}
        assert len(lengths) == 1, fields
        return json.dumps(fields)


def run_peer(measure: Callable[[Work], Report], packages: list[str]) -> None:
    """Do the work of the file on the command line; only the report goes to stdout."""
    work = Work(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    with contextlib.redirect_stdout(sys.stderr):
        report = measure(work)
    print(report.as_json([work.episodes] * len(work.batches), packages))
