"""What the benchmark hands to a peer's runner, and what it wants back.

Only the standard library: a runner starts with the Python of the peer's own environment, without `rlhf`.
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
"""cpu: seconds in which the process computed, which other work on the machine hardly changes."""


@dataclass(frozen=True)
class Work:
    """PPO steps to do, in units that every trainer has."""

    model: str
    """A causal language model and its tokenizer, written by `save_pretrained`."""
    reward: str
    """A one-label sequence-classification model with the same tokenizer: scores, and starts the critic."""
    batches: list[list[list[int]]]
    """Per PPO step, the token ids of each prompt, already in the chat template."""
    new_tokens: int
    honour_stop: bool
    """False: every response has `new_tokens` tokens, whatever is in it."""
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
    """auto: what the peer does by itself."""
    threads: int
    seed: int
    lr_schedule: Literal["constant", "linear"] = "constant"
    """linear: falls to 0 over the steps, without a warm-up."""
    adam_eps: float = 1e-8
    missing_stop_penalty: float = 0.0
    """Taken from the score of a response that did not stop by itself; raw score units."""
    evaluate_every: int = 0
    """Steps between the samplings that are reported; one comes before the first step too. 0: none."""
    held_out: list[list[int]] = field(default_factory=list)
    """What is answered then, as token ids like those of batches."""
    algorithm: Literal["ppo", "grpo", "rloo"] = "ppo"
    answers: int = 1
    """To each prompt, side by side."""
    clock: Literal["wall", "cpu"] = "wall"
    lengths: list[list[int]] | None = None
    """Per step, the tokens of each answer, its end included (forced_lengths.py); None for natural ones."""
    never: list[int] = field(default_factory=list)
    """Tokens that may not stand within an answer of a forced length."""
    checkpointing: bool = True
    """Whether TRL's GRPO and RLOO compute activations twice, as they do by default."""

    @property
    def episodes(self) -> int:
        """Episodes of one step; the peers fix it for the whole run."""
        sizes = {len(batch) * self.answers for batch in self.batches}
        if len(sizes) != 1 or min(sizes) % self.minibatch_episodes:
            raise ValueError(
                f"batches: {sorted(sizes)} answers. All steps need the same number, a multiple of "
                f"minibatch_episodes={self.minibatch_episodes}."
            )
        return sizes.pop()

    def response_tokens(self, unpadded: list[int], pad_id: int) -> int:
        """Up to and including the first stop token of each response, which may itself be the padding.

        Args:
            unpadded: tokens other than padding of each response, cut behind its stop token.
        """
        if not self.honour_stop:
            return len(unpadded) * self.new_tokens
        hidden_stops = sum(number < self.new_tokens for number in unpadded) if pad_id == self.stop_id else 0
        return sum(unpadded) + hidden_stops


@dataclass
class Report:
    """What the steps took and made; every list has one entry per PPO step."""

    precision: str
    """What was computed in which precision, in words."""
    clock: Literal["wall", "cpu"] = "wall"
    asked: list[float] = field(default_factory=list)
    """When the trainer asked for the step's prompts, then when it was done with all; the clock stands still
    while `paused`."""
    new_tokens: list[int] = field(default_factory=list)
    """Response tokens up to and including the first stop token."""
    score_mean: list[float] = field(default_factory=list)
    """Of the reward model's scores; TRL's are told after `missing_stop_penalty` is taken."""
    kl: list[float] = field(default_factory=list)
    """Nats a response, from the reference; empty where the trainer does not tell."""
    evaluations: list[tuple[int, list[list[int]]]] = field(default_factory=list)
    """(steps done, response ids up to and including the first stop token) of each sampling."""
    pauses: float = 0.0
    """Seconds so far."""

    def ask(self) -> None:
        """The trainer asks for the next step's prompts, or is done with all."""
        self.asked.append(CLOCKS[self.clock]() - self.pauses)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What runs inside belongs to no step."""
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
    """Do the work in the file that the command line names; nothing but the report goes to stdout."""
    work = Work(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    with contextlib.redirect_stdout(sys.stderr):
        report = measure(work)
    print(report.as_json([work.episodes] * len(work.batches), packages))
