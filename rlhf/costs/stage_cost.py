"""The cost of a stage: memory phase by phase, and its work. Time is work divided by speed.

Source of the operation counts: Kaplan et al. 2020 (arXiv:2001.08361), section 2.1: 2 a parameter and token
forward, twice that backward. Half of the latter is for gradients of weights, which frozen ones do not need.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from rlhf.costs.hardware import Speed
from rlhf.costs.memory import MemoryPhase
from rlhf.costs.peft_costs import COSTS
from rlhf.costs.setup import CostContext
from rlhf.data.prepared import LengthStats
from rlhf.models.peft.methods import MethodName

Activity = Literal["read", "train", "decode", "optimizer", "load"]
EFFICIENCY: dict[Activity, float] = {"read": 0.39, "train": 0.43, "decode": 0.4}
"""Share of the measured matmul speed that each activity reaches; fitted to the table of docs/planner.md."""
OPTIMIZER_BYTES = 40
"""A trained parameter and step: gradients read twice; master, both moments and weight read and written."""
PCIE_GBYTES = 25.0
"""Between a GPU and its host, a second: PCIe 4.0 x16, of 31.5 by the standard."""
LAYER_SECONDS = 2e-4
"""Of one layer on one decoded token, whatever its size: the host's work between two kernels."""
LOAD_BYTES = 0.3e9
"""A second, of what is read from and written to disk."""


class Task(NamedTuple):
    """Work of one kind."""

    activity: Activity
    seconds: float
    how: str


@dataclass(frozen=True)
class StageCost:
    """What a stage needs."""

    phases: list[MemoryPhase] = field(default_factory=list)
    work: list[Task] = field(default_factory=list)
    artifact: float = 0.0
    """Bytes that it publishes."""
    checkpoint: float = 0.0
    """Bytes of one checkpoint."""
    longest: int = 0
    """Tokens of the longest sequence that may go through a model."""
    sampled: int = 0
    """Tokens of the longest one that is sampled, its prompt included."""
    context: float = math.inf
    """Tokens that the model can read which the stage trains or asks, where it is not the base model."""

    @property
    def seconds(self) -> float:
        """All work."""
        return sum(task.seconds for task in self.work)

    def peak(self, *, on_host: bool | None = None) -> MemoryPhase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.size(on_host=on_host))


@dataclass(frozen=True)
class ThroughputModel:
    """Turns counts of tokens into tasks."""

    on: CostContext

    @property
    def speed(self) -> Speed:
        """Of one rank."""
        return self.on.machine.speed

    def forward(self, length: float) -> float:
        """Operations of a token that is one of so many: linear layers, and attention to all of them."""
        shape = self.on.shape
        return 2 * (shape.linear + shape.experts) + 4 * shape.layers * shape.heads * shape.head_size * length

    def read(self, tokens: float, length: float, *, predicted: float = 0.0, what: str) -> Task:
        """A pass without gradients; of `predicted` tokens the output layer too."""
        work = tokens * self.forward(length) + 2 * predicted * self.on.shape.head
        how = f"{what}: {tokens:.3g} tokens x {self.forward(length):.3g} operations"
        return self._task("read", work, how + self._with_logits(2 * predicted))

    def train(
        self,
        tokens: float,
        length: float,
        method: MethodName,
        *,
        predicted: float = 0.0,
        checkpointing: bool,
        what: str,
    ) -> Task:
        """Forward and backward; logits are computed twice, checkpointed layers too."""
        is_full = COSTS[method].keeps == "all"
        times = (3 if is_full else 2) + (1 if checkpointing else 0)
        head = (4 if is_full else 3) * 2 * predicted * self.on.shape.head
        work = tokens * times * self.forward(length) + head
        how = f"{what}: {tokens:.3g} tokens x {times} x {self.forward(length):.3g} operations"
        return self._task("train", work, how + self._with_logits(head / self.on.shape.head))

    def _with_logits(self, times: float) -> str:
        return f" + {times:.3g} x {self.on.shape.head:.3g} for logits" if times else ""

    def optimize(self, parameters: float, steps: float) -> Task:
        """Memory is read and written once a step; the host's at the speed of what leads there."""
        share = self.on.ranks if self.on.zero != "none" else 1
        rate = PCIE_GBYTES if self.on.zero == "zero3_offload" else self.speed.gbytes
        seconds = steps * OPTIMIZER_BYTES * parameters / share / (rate * 1e9)
        how = f"{steps:.0f} x {parameters / share:.3g} parameters x {OPTIMIZER_BYTES} B / {rate:.0f} GB/s"
        return Task("optimizer", seconds, how)

    def decode(
        self, rows: float, batch_rows: float, prompts: LengthStats, new_tokens: float, *, what: str
    ) -> list[Task]:
        """Prompts are read; then each token of a batch reads all weights once.

        Args:
            rows: over all ranks.
            batch_rows: that a rank decodes together.
        """
        shape = self.on.shape
        batches = math.ceil(rows / self.on.ranks / max(1.0, batch_rows))
        steps = batches * new_tokens
        weights = self.on.dtype_bytes * (shape.linear + shape.experts + shape.head)
        mine = rows / self.on.ranks
        work = mine * new_tokens * (self.forward(prompts.mean + new_tokens / 2) + 2 * shape.head)
        seconds = steps * (weights / (self.speed.gbytes * 1e9) + shape.layers * LAYER_SECONDS)
        seconds += work / (EFFICIENCY["decode"] * self.speed.gflops * 1e9)
        how = f"{what}: {steps:.0f} times {weights:.3g} B of weights, and {work:.3g} operations"
        tokens = self.on.computed(rows * prompts.mean, prompts)
        read = self.read(tokens, prompts.mean, predicted=rows, what=f"{what}: prompts")
        return [read, Task("decode", seconds, how)]

    def load(self, models: float, *, what: str) -> Task:
        """Models from and to disk."""
        size = models * self.on.dtype_bytes * self.on.shape.parameters
        return Task("load", size / LOAD_BYTES, f"{what}: {size:.3g} B")

    def _task(self, activity: Activity, operations: float, how: str) -> Task:
        rate = EFFICIENCY[activity] * self.speed.gflops * 1e9
        seconds = operations / self.on.ranks / rate
        share = f"{EFFICIENCY[activity]:g} of {self.speed.gflops:.0f} GFLOP/s"
        return Task(activity, seconds, f"({how}) / {self.on.ranks} ranks / {share}")


def joined(*parts: LengthStats) -> LengthStats:
    """Of rows that stand one behind the other, such as a prompt and its answer."""
    return LengthStats(
        max(part.rows for part in parts),
        sum(part.mean for part in parts),
        math.sqrt(sum(part.deviation**2 for part in parts)),
        sum(part.longest for part in parts),
        sum(part.shared_prefix for part in parts),
    )


def exactly(tokens: int) -> LengthStats:
    """Answers that all have so many tokens: the most that are allowed."""
    return LengthStats(0, float(tokens), 0.0, tokens)


def one_after_the_other(costs: Sequence[StageCost]) -> StageCost:
    """Of parts that are not in memory together."""
    return StageCost(
        [phase for each in costs for phase in each.phases],
        [task for each in costs for task in each.work],
        longest=max((each.longest for each in costs), default=0),
        sampled=max((each.sampled for each in costs), default=0),
        context=min((each.context for each in costs), default=math.inf),
    )
