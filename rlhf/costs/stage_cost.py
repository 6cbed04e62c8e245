"""The cost of a stage: memory phase by phase, and its work. Time is work divided by speed.

Source of the operation counts: Kaplan et al. 2020 (arXiv:2001.08361), section 2.1: 2 a parameter and token
forward, twice that backward. Half of the latter is for gradients of weights, which frozen ones do not need.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from rlhf.costs.hardware import GIB, Machine, Speed
from rlhf.costs.memory import MemoryPhase
from rlhf.costs.peft_costs import COSTS
from rlhf.costs.setup import CostContext
from rlhf.data.prepared import LengthStats
from rlhf.models.peft.methods import MethodName

Activity = Literal["read", "train", "decode", "optimizer", "load", "network", "host", "checkpoint"]
EFFICIENCY: dict[Activity, float] = {"read": 0.39, "train": 0.43, "decode": 0.4}
"""Share of the measured matmul speed that each activity reaches; fitted to the table of docs/planner.md."""
FP32_EFFICIENCY: dict[Activity, float] = {"read": 0.72, "train": 0.65, "decode": 0.75}
"""The same of fp32 on a CPU, whose matmuls are slower, so that the rest of the work is a smaller share."""
OPTIMIZER_BYTES = 40
"""A trained parameter and step: gradients read twice; master, both moments and weight read and written."""
PCIE_GBYTES = 25.0
"""Between a GPU and its host, a second: PCIe 4.0 x16, of 31.5 by the standard."""
LAYER_SECONDS = 2e-4
"""Of one layer on one decoded token, whatever its size: the host's work between two kernels."""
VLLM_LAYER_SECONDS = 2e-5
"""The same with vLLM's CUDA graphs, with what the ranks of a tensor-parallel group add up."""
SLOW = 3.0
"""A GPU may take so many times as long as computed: two published runs are in between (docs/planner.md). A
CPU's speed is measured."""
ROW_SECONDS = 2e-3
"""Of the host on one answer of a rollout: encoding, decoding and scoring its text, rows of tables. Of a tiny
model on a CPU, sampling 512 answers and scoring them takes 0.7 s in all."""
HAND_OVER_SECONDS = 2e-3
"""Of the host on one weight that is handed to vLLM: assumed. A layer has about twelve."""
LAYER_WEIGHTS = 12
WAKE_SECONDS = 1.0
"""Of vLLM's going to sleep and waking, once a rollout: assumed."""
FP32 = 4


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
    tokens: float = 0.0
    """Tokens of all rows that it learns from, prompts included, once for each time that they are learned or
    sampled anew."""
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

    def at_most(self) -> StageCost:
        """The same work, as slow as a GPU may be at it."""
        work = [
            each if each.activity == "load" else each._replace(seconds=SLOW * each.seconds)
            for each in self.work
        ]
        return replace(self, work=work)

    def throughput(self, ranks: int) -> float:
        """Tokens a second and rank, without what loading takes."""
        seconds = sum(task.seconds for task in self.work if task.activity != "load")
        return self.tokens / seconds / ranks if seconds else 0.0

    def with_checkpoints(self, machine: Machine, every_seconds: float | None) -> StageCost:
        """The cost with what writing checkpoints takes, one each so many seconds."""
        if every_seconds is None or not self.checkpoint:
            return self
        count = self.seconds / every_seconds
        seconds = count * self.checkpoint_seconds(machine)
        how = f"{count:.2g} x {self.checkpoint:.3g} B at {machine.disk / 1e9:.2g} GB/s a node"
        return replace(self, work=[*self.work, Task("checkpoint", seconds, how)])

    def checkpoint_seconds(self, machine: Machine) -> float:
        """What writing a checkpoint takes, which each host writes its part of."""
        return self.checkpoint / (machine.disk * machine.nodes)

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

    def efficiency(self, activity: Activity) -> float:
        """Share of the matmul speed that the activity reaches."""
        is_fp32 = self.on.on_cpu and self.on.dtype_bytes == FP32
        return (FP32_EFFICIENCY if is_fp32 else EFFICIENCY)[activity]

    def rate(self, activity: Activity) -> float:
        """Operations a second."""
        return self.efficiency(activity) * self.speed.gflops * 1e9

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
        self, rows: float, batch_rows: float, prompts: LengthStats, answers: LengthStats, *, what: str
    ) -> list[Task]:
        """Prompts are read; then each token of a batch reads all weights once, until the longest answer ends.

        Args:
            rows: over all ranks.
            batch_rows: that a rank decodes together.
        """
        if self.on.vllm is not None and not self.on.on_cpu:
            return self._decode_by_vllm(rows, prompts, answers, what=what)
        shape, new_tokens = self.on.shape, answers.mean
        batches = math.ceil(rows / self.on.ranks / max(1.0, batch_rows))
        steps = batches * answers.longest
        weights = self.on.dtype_bytes * (shape.linear + shape.experts + shape.head)
        mine = rows / self.on.ranks
        work = mine * new_tokens * (self.forward(prompts.mean + new_tokens / 2) + 2 * shape.head)
        seconds = steps * (weights / (self.speed.gbytes * 1e9) + shape.layers * LAYER_SECONDS)
        seconds += work / self.rate("decode")
        how = f"{what}: {steps:.0f} times {weights:.3g} B of weights, and {work:.3g} operations"
        tokens = self.on.computed(rows * prompts.mean, prompts)
        read = self.read(tokens, prompts.mean, predicted=rows, what=f"{what}: prompts")
        return [read, Task("decode", seconds, how)]

    def _decode_by_vllm(
        self, rows: float, prompts: LengthStats, answers: LengthStats, *, what: str
    ) -> list[Task]:
        """Each group of ranks answers its share, as many rows together as its cache and settings let it. A
        row that ends makes room for another; at the end all wait for the longest."""
        on, shape, vllm = self.on, self.on.shape, self.on.vllm
        assert vllm is not None
        new_tokens = answers.mean
        group, length = vllm.tensor_parallel, prompts.mean + new_tokens
        mine, row_bytes = rows * group / on.ranks, on.dtype_bytes * shape.kv_elements
        room = vllm.kv_cache_gib * GIB * min(group, shape.kv_heads) / (row_bytes * length)
        together = max(1.0, min(float(vllm.max_num_seqs), room, mine))
        steps = max(1.0, mine / together) * new_tokens + answers.longest - new_tokens
        read: float = on.dtype_bytes * (shape.linear + shape.experts + shape.head)
        read = (read + together * row_bytes * (prompts.mean + new_tokens / 2)) / group
        work = mine * new_tokens * (self.forward(prompts.mean + new_tokens / 2) + 2 * shape.head) / group
        seconds = steps * (read / (self.speed.gbytes * 1e9) + shape.layers * VLLM_LAYER_SECONDS)
        seconds += work / self.rate("decode")
        how = f"{what}: {steps:.0f} times {read:.3g} B of weights and cache, {together:.0f} rows together"
        tokens = self.read(rows * prompts.mean, prompts.mean, predicted=rows, what=f"{what}: prompts")
        return [tokens, Task("decode", seconds, f"{how}, and {work:.3g} operations")]

    def rollouts(self, count: float, rows: float, *, what: str) -> list[Task]:
        """The host's work on so many rollouts of so many answers in all, and on handing weights to vLLM."""
        if self.on.on_cpu:
            return []  # measured together with the rest
        tasks = [Task("host", rows * ROW_SECONDS, f"{what}: {rows:.0f} answers x {ROW_SECONDS:g} s")]
        if self.on.vllm is None:
            return tasks
        shape, b = self.on.shape, self.on.dtype_bytes
        weights = LAYER_WEIGHTS * shape.layers
        copied = b * shape.parameters * (1 + 1 / self.on.vllm.tensor_parallel) / (self.speed.gbytes * 1e9)
        each = weights * HAND_OVER_SECONDS + copied + WAKE_SECONDS
        how = f"({weights} x {HAND_OVER_SECONDS:g} s + {copied:.2g} s of copies + {WAKE_SECONDS:g} s to wake)"
        return [*tasks, Task("host", count * each, f"weights to vLLM: {count:.0f} x {how}")]

    def load(self, models: float, *, what: str) -> Task:
        """Models from and to disk; each host reads what its ranks hold of them."""
        size = models * self.on.dtype_bytes * self.on.shape.parameters
        machine, share = self.on.machine, self.on.shard_ranks if self.on.shards_weights else 1
        rate = machine.disk * max(1, share // machine.ranks_here)
        return Task("load", size / rate, f"{what}: {size:.3g} B at {rate / 1e9:.2g} GB/s")

    def gathering(self, passes: float, *, what: str) -> list[Task]:
        """Sharded weights are gathered once for each pass."""
        on = self.on
        size = passes * on.dtype_bytes * on.shape.parameters * _of_others(on.shard_ranks)
        return self._sent({on.shard_ranks: size if on.shards_weights else 0.0}, what)

    def exchanging(self, passes: float, steps: float, trained: float, *, what: str) -> list[Task]:
        """Training: sharded weights are gathered forward and backward; gradients are added up over ranks in
        fp32, of `none` and `zero1` once a step, else in each pass.

        Args:
            passes: forward and backward, of each rank.
            trained: parameters.
        """
        on, sizes = self.on, {}
        share, gradients = on.shard_ranks, FP32 * trained
        if on.zero in ("none", "zero1"):
            sizes[on.ranks] = steps * 2 * gradients * _of_others(on.ranks)
        else:
            weights = 2 * passes * on.shape.parameters if on.shards_weights else steps * trained
            sizes[share] = (passes * gradients + on.dtype_bytes * weights) * _of_others(share)
            if share < on.ranks:  # replicas' shards
                sizes[on.ranks] = passes * 2 * gradients / share * _of_others(on.ranks // share)
        return self._sent(sizes, what)

    def _sent(self, sizes: Mapping[int, float], what: str) -> list[Task]:
        """Time of the network, as if computing waited for it; nothing if nothing is sent.

        Args:
            sizes: ranks of a group -> bytes that each of them gets.
        """
        if not any(sizes.values()):
            return []
        machine, seconds = self.on.machine, 0.0
        for ranks, size in sizes.items():
            seconds += size / (machine.link if ranks <= machine.ranks_here else machine.network)
        return [Task("network", seconds, f"{what}: {sum(sizes.values()):.3g} B a rank")]

    def _task(self, activity: Activity, operations: float, how: str) -> Task:
        seconds = operations / self.on.ranks / self.rate(activity)
        share = f"{self.efficiency(activity):g} of {self.speed.gflops:.0f} GFLOP/s"
        return Task(activity, seconds, f"({how}) / {self.on.ranks} ranks / {share}")


def _of_others(ranks: int) -> float:
    """The part that one of so many ranks has not itself."""
    return (ranks - 1) / ranks


def joined(*parts: LengthStats) -> LengthStats:
    """Of rows that stand one behind the other, such as a prompt and its answer."""
    return LengthStats(
        max(part.rows for part in parts),
        sum(part.mean for part in parts),
        math.sqrt(sum(part.deviation**2 for part in parts)),
        sum(part.longest for part in parts),
        sum(part.shared_prefix for part in parts),
    )


def one_after_the_other(costs: Sequence[StageCost]) -> StageCost:
    """Of parts that are not in memory together."""
    return StageCost(
        [phase for each in costs for phase in each.phases],
        [task for each in costs for task in each.work],
        longest=max((each.longest for each in costs), default=0),
        sampled=max((each.sampled for each in costs), default=0),
        context=min((each.context for each in costs), default=math.inf),
        checkpoint=max((each.checkpoint for each in costs), default=0.0),
        artifact=sum(each.artifact for each in costs),
    )
