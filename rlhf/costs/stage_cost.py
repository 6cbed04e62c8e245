"""The cost of a stage: memory by phase, and work. Time is work divided by speed.

Operation counts follow Kaplan et al. 2020 (arXiv:2001.08361), section 2.1: 2 per parameter and token forward,
4 backward. Half of the backward operations compute gradients of weights, which frozen weights do not need.
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
"""Share of the measured matmul speed that each activity reaches, fitted to the table of docs/planner.md."""
FP32_EFFICIENCY: dict[Activity, float] = {"read": 0.72, "train": 0.65, "decode": 0.75}
"""The same for fp32 on a CPU: matmuls are slower there, so other work takes a smaller share of the time."""
OPTIMIZER_BYTES = 40
"""Bytes per trained parameter and step: gradients read twice; master, both moments and weight read and
written."""
PCIE_GBYTES = 25.0
"""GB/s between a GPU and its host: PCIe 4.0 x16, whose standard gives 31.5."""
LAYER_SECONDS = 2e-4
"""Seconds of the host's work between kernels, per layer of any size and decoded token."""
VLLM_LAYER_SECONDS = 2e-5
"""The same with vLLM's CUDA graphs, including the all-reduce of a tensor-parallel group."""
MAX_GPU_SLOWDOWN = 3.0
"""Factor from the computed time of a GPU to its longest expected time: two published runs are in between
(docs/planner.md). A CPU's speed is measured, so this does not apply to CPUs."""
ROW_SECONDS = 2e-3
"""Seconds of the host's work per answer of a rollout: encode, decode and score its text, write table rows.
With a tiny model on a CPU, sampling and scoring 512 answers takes 0.7 s."""
HAND_OVER_SECONDS = 2e-3
"""Seconds of the host's work per weight that is handed to vLLM: assumed."""
LAYER_WEIGHTS = 12
"""Approximate number of weights in a layer."""
WAKE_SECONDS = 1.0
"""Seconds per rollout for vLLM to go to sleep and wake: assumed."""
FP32 = 4


class Task(NamedTuple):
    """Work of one activity."""

    activity: Activity
    seconds: float
    formula: str
    """The calculation of `seconds`, as text with numbers."""


@dataclass(frozen=True)
class StageCost:
    """Memory, time and disk space that a stage needs."""

    phases: list[MemoryPhase] = field(default_factory=list)
    work: list[Task] = field(default_factory=list)
    artifact: float = 0.0
    """Bytes of the published artifact."""
    checkpoint: float = 0.0
    """Bytes of one checkpoint."""
    keeps_last: bool = False
    """Whether its last checkpoint stays, for a longer run."""
    tokens: float = 0.0
    """Tokens of all rows that the stage learns from, prompts included. A row counts once per epoch or
    rollout."""
    longest: int = 0
    """Tokens of the longest sequence that may go through a model."""
    sampled: int = 0
    """Tokens of the longest sampled sequence, its prompt included."""
    context: float = math.inf
    """Context length, in tokens, of the model that the stage trains or runs, if it is not the base model."""

    @property
    def seconds(self) -> float:
        """Seconds of all work."""
        return sum(task.seconds for task in self.work)

    def at_worst(self) -> StageCost:
        """The cost with the longest expected time of a GPU (`MAX_GPU_SLOWDOWN`)."""
        work = [
            each if each.activity == "load" else each._replace(seconds=MAX_GPU_SLOWDOWN * each.seconds)
            for each in self.work
        ]
        return replace(self, work=work)

    def throughput(self, ranks: int) -> float:
        """Tokens per second and rank, without the time of loading."""
        seconds = sum(task.seconds for task in self.work if task.activity != "load")
        return self.tokens / seconds / ranks if seconds else 0.0

    def with_checkpoints(self, machine: Machine, every_seconds: float | None) -> StageCost:
        """The cost with the time of writing a checkpoint every `every_seconds`; None for no checkpoints."""
        if every_seconds is None or not self.checkpoint:
            return self
        count = self.seconds / every_seconds
        seconds = count * self.checkpoint_seconds(machine)
        formula = f"{count:.2g} x {self.checkpoint:.3g} B at {machine.disk / 1e9:.2g} GB/s a node"
        return replace(self, work=[*self.work, Task("checkpoint", seconds, formula)])

    def checkpoint_seconds(self, machine: Machine) -> float:
        """Seconds to write a checkpoint; each host writes its part."""
        return self.checkpoint / (machine.disk * machine.nodes)

    def peak(self, *, on_host: bool | None = None) -> MemoryPhase:
        """The phase that needs most memory."""
        return max(self.phases, key=lambda phase: phase.size(on_host=on_host))


@dataclass(frozen=True)
class ThroughputModel:
    """Computes tasks, and so times, from numbers of tokens."""

    on: CostContext

    @property
    def speed(self) -> Speed:
        """Speed of one rank."""
        return self.on.machine.speed

    def efficiency(self, activity: Activity) -> float:
        """Share of the matmul speed that the activity reaches."""
        is_fp32 = self.on.on_cpu and self.on.dtype_bytes == FP32
        return (FP32_EFFICIENCY if is_fp32 else EFFICIENCY)[activity]

    def rate(self, activity: Activity) -> float:
        """Operations per second of one rank."""
        return self.efficiency(activity) * self.speed.gflops * 1e9

    def forward(self, length: float) -> float:
        """Operations of a forward pass per token: linear layers, and attention to `length` tokens."""
        shape = self.on.shape
        return 2 * (shape.linear + shape.experts) + 4 * shape.layers * shape.heads * shape.head_size * length

    def read(self, tokens: float, length: float, *, predicted: float = 0.0, what: str) -> Task:
        """A pass without gradients, over all ranks.

        Args:
            tokens: tokens that go through the layers.
            length: mean tokens of a row.
            predicted: tokens for which the output layer runs.
            what: name of the work, for the calculation's text.
        """
        work = tokens * self.forward(length) + 2 * predicted * self.on.shape.head
        formula = f"{what}: {tokens:.3g} tokens x {self.forward(length):.3g} operations"
        return self._task("read", work, formula + self._with_logits(2 * predicted))

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
        """Forward and backward passes; logits and checkpointed layers are computed twice."""
        is_full = COSTS[method].keeps == "all"
        times = (3 if is_full else 2) + (1 if checkpointing else 0)
        head = (4 if is_full else 3) * 2 * predicted * self.on.shape.head
        work = tokens * times * self.forward(length) + head
        formula = f"{what}: {tokens:.3g} tokens x {times} x {self.forward(length):.3g} operations"
        return self._task("train", work, formula + self._with_logits(head / self.on.shape.head))

    def _with_logits(self, times: float) -> str:
        return f" + {times:.3g} x {self.on.shape.head:.3g} for logits" if times else ""

    def optimize(self, parameters: float, steps: float) -> Task:
        """Optimizer steps, limited by memory bandwidth; with offloading by that of PCIe."""
        share = self.on.ranks if self.on.zero != "none" else 1
        rate = PCIE_GBYTES if self.on.sharding.offloads else self.speed.gbytes
        seconds = steps * OPTIMIZER_BYTES * parameters / share / (rate * 1e9)
        formula = f"{steps:.0f} x {parameters / share:.3g} parameters x {OPTIMIZER_BYTES} B / {rate:.0f} GB/s"
        return Task("optimizer", seconds, formula)

    def decode(
        self, rows: float, batch_rows: float, prompts: LengthStats, answers: LengthStats, *, what: str
    ) -> list[Task]:
        """Prompts are read. Then each token of a batch reads all weights once, until the longest answer ends.

        Args:
            rows: answers over all ranks.
            batch_rows: rows that a rank decodes together.
        """
        if self.on.vllm is not None and not self.on.on_cpu:
            return self._decode_by_vllm(rows, prompts, answers, what=what)
        shape, new_tokens = self.on.shape, answers.mean
        batches = math.ceil(rows / self.on.ranks / max(1.0, batch_rows))
        steps = batches * answers.longest
        weights = self.on.dtype_bytes * (shape.linear + shape.experts + shape.head)
        rank_rows = rows / self.on.ranks
        work = rank_rows * new_tokens * (self.forward(prompts.mean + new_tokens / 2) + 2 * shape.head)
        seconds = steps * (weights / (self.speed.gbytes * 1e9) + shape.layers * LAYER_SECONDS)
        seconds += work / self.rate("decode")
        formula = f"{what}: {steps:.0f} times {weights:.3g} B of weights, and {work:.3g} operations"
        tokens = self.on.computed(rows * prompts.mean, prompts)
        read = self.read(tokens, prompts.mean, predicted=rows, what=f"{what}: prompts")
        return [read, Task("decode", seconds, formula)]

    def _decode_by_vllm(
        self, rows: float, prompts: LengthStats, answers: LengthStats, *, what: str
    ) -> list[Task]:
        """Decoding with vLLM on GPUs.

        Each tensor-parallel group answers its share. Its cache and settings limit how many rows it decodes
        together. When a row ends, another starts; at the end all wait for the longest.
        """
        on, shape, vllm = self.on, self.on.shape, self.on.vllm
        assert vllm is not None
        new_tokens = answers.mean
        group, length = vllm.tensor_parallel, prompts.mean + new_tokens
        group_rows, row_bytes = rows * group / on.ranks, on.dtype_bytes * shape.kv_elements
        cache_rows = vllm.kv_cache_gib * GIB * min(group, shape.kv_heads) / (row_bytes * length)
        together = max(1.0, min(float(vllm.max_num_seqs), cache_rows, group_rows))
        steps = max(1.0, group_rows / together) * new_tokens + answers.longest - new_tokens
        read: float = on.dtype_bytes * (shape.linear + shape.experts + shape.head)
        read = (read + together * row_bytes * (prompts.mean + new_tokens / 2)) / group
        work = (
            group_rows * new_tokens * (self.forward(prompts.mean + new_tokens / 2) + 2 * shape.head) / group
        )
        seconds = steps * (read / (self.speed.gbytes * 1e9) + shape.layers * VLLM_LAYER_SECONDS)
        seconds += work / self.rate("decode")
        formula = f"{what}: {steps:.0f} times {read:.3g} B of weights and cache, {together:.0f} rows together"
        tokens = self.read(rows * prompts.mean, prompts.mean, predicted=rows, what=f"{what}: prompts")
        return [tokens, Task("decode", seconds, f"{formula}, and {work:.3g} operations")]

    def rollouts(self, count: float, rows: float, *, what: str) -> list[Task]:
        """The host's work on rollouts, and the hand-over of weights to vLLM; nothing on CPUs.

        Args:
            count: number of rollouts.
            rows: answers of all rollouts.
        """
        if self.on.on_cpu:
            return []  # included in the measured speed
        tasks = [Task("host", rows * ROW_SECONDS, f"{what}: {rows:.0f} answers x {ROW_SECONDS:g} s")]
        if self.on.vllm is None:
            return tasks
        shape, b = self.on.shape, self.on.dtype_bytes
        weights = LAYER_WEIGHTS * shape.layers
        copied = b * shape.parameters * (1 + 1 / self.on.vllm.tensor_parallel) / (self.speed.gbytes * 1e9)
        each = weights * HAND_OVER_SECONDS + copied + WAKE_SECONDS
        formula = (
            f"({weights} x {HAND_OVER_SECONDS:g} s + {copied:.2g} s of copies + {WAKE_SECONDS:g} s to wake)"
        )
        return [*tasks, Task("host", count * each, f"weights to vLLM: {count:.0f} x {formula}")]

    def load(self, models: float, *, what: str) -> Task:
        """Reading or writing models on disk; each host reads what its ranks hold."""
        size = models * self.on.dtype_bytes * self.on.shape.parameters
        machine, share = self.on.machine, self.on.shard_ranks if self.on.shards_weights else 1
        rate = machine.disk * max(1, share // machine.ranks_here)
        return Task("load", size / rate, f"{what}: {size:.3g} B at {rate / 1e9:.2g} GB/s")

    def gathering(self, passes: float, *, what: str) -> list[Task]:
        """Network time of gathering sharded weights once per pass."""
        on = self.on
        size = passes * on.dtype_bytes * on.shape.parameters * _remote_share(on.shard_ranks)
        return self._network_tasks({on.shard_ranks: size if on.shards_weights else 0.0}, what)

    def exchanging(self, passes: float, steps: float, trained: float, *, what: str) -> list[Task]:
        """Network time of training.

        Sharded weights are gathered in the forward and the backward pass. Gradients are summed over ranks in
        fp32: once per step under `none` and `zero1`, else in each pass.

        Args:
            passes: forward and backward passes of each rank.
            trained: trained parameters.
        """
        on, sizes = self.on, {}
        share, gradients = on.shard_ranks, FP32 * trained
        if not on.sharding.gradients:
            sizes[on.ranks] = steps * 2 * gradients * _remote_share(on.ranks)
        else:
            weights = 2 * passes * on.shape.parameters if on.shards_weights else steps * trained
            sizes[share] = (passes * gradients + on.dtype_bytes * weights) * _remote_share(share)
            if share < on.ranks:  # replicas' shards
                sizes[on.ranks] = passes * 2 * gradients / share * _remote_share(on.ranks // share)
        return self._network_tasks(sizes, what)

    def _network_tasks(self, sizes: Mapping[int, float], what: str) -> list[Task]:
        """Network time, without overlap with computing; empty if nothing is sent.

        Args:
            sizes: number of ranks in a group -> bytes that each of them receives.
        """
        if not any(sizes.values()):
            return []
        machine, seconds = self.on.machine, 0.0
        for ranks, size in sizes.items():
            seconds += size / (machine.link if ranks <= machine.ranks_here else machine.network)
        return [Task("network", seconds, f"{what}: {sum(sizes.values()):.3g} B a rank")]

    def _task(self, activity: Activity, operations: float, formula: str) -> Task:
        seconds = operations / self.on.ranks / self.rate(activity)
        share = f"{self.efficiency(activity):g} of {self.speed.gflops:.0f} GFLOP/s"
        return Task(activity, seconds, f"({formula}) / {self.on.ranks} ranks / {share}")


def _remote_share(ranks: int) -> float:
    """Share of sharded data that a rank has to receive from the other ranks."""
    return (ranks - 1) / ranks


def joined(*parts: LengthStats) -> LengthStats:
    """Lengths of rows made of several parts, such as a prompt and its answer."""
    return LengthStats(
        max(part.rows for part in parts),
        sum(part.mean for part in parts),
        math.sqrt(sum(part.deviation**2 for part in parts)),
        sum(part.longest for part in parts),
        sum(part.shared_prefix for part in parts),
    )


def sequential_cost(costs: Sequence[StageCost]) -> StageCost:
    """Total cost of parts that run one after the other and are not in memory together."""
    return StageCost(
        [phase for each in costs for phase in each.phases],
        [task for each in costs for task in each.work],
        longest=max((each.longest for each in costs), default=0),
        sampled=max((each.sampled for each in costs), default=0),
        context=min((each.context for each in costs), default=math.inf),
        checkpoint=max((each.checkpoint for each in costs), default=0.0),
        artifact=sum(each.artifact for each in costs),
    )
