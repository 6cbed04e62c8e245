"""The context of a cost: hardware, model and lengths of data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Literal

from rlhf.costs.hardware import Machine
from rlhf.costs.model_shape import ModelShape, shape_in
from rlhf.data.prepared import LengthStats
from rlhf.data.schema import Split
from rlhf.distributed.batching import token_budget_batches
from rlhf.distributed.compute import SHARDINGS, Sharding, Zero
from rlhf.models.base import ATTENTION, ModelConfig, UnknownShapeError
from rlhf.models.peft.config import PeftConfig
from rlhf.models.peft.methods import METHODS

if TYPE_CHECKING:
    from rlhf.generation.vllm import VllmConfig

LocalSampling = Literal["whole", "layers"]
"""How sharded weights are gathered to sample. whole: once per rollout, which is fast; layers: layer by
layer in each pass."""
Sizes = Callable[[str, Split], LengthStats]
"""(role, split) -> number of rows and their lengths."""
LARGEST_BATCH_DEVIATIONS = 2.5
"""Standard deviations by which the largest of some hundred batches exceeds the mean batch."""
MAX_DRAWN_BATCHES = 100
"""Most batches that are drawn to find the largest pass of padded rows."""


@dataclass(frozen=True)
class CostContext:
    """All inputs of a cost, except the stage's own keys."""

    shape: ModelShape
    dtype_bytes: int
    zero: Zero
    machine: Machine
    sizes: Sizes
    vllm: VllmConfig | None = None
    """vLLM's settings; None for the local engine."""
    has_sampled: bool = False
    """Whether an earlier stage of the run has sampled, so that vLLM holds its memory from the beginning."""
    pads: bool = False
    """Whether rows are padded to the longest of a pass, not packed."""
    local_sampling: LocalSampling = "whole"
    """How the local engine samples from sharded weights. The preflight chooses."""
    answer_tokens: float | None = None
    """Mean tokens of a sampled answer; None: every answer has the maximum length."""

    @property
    def on_cpu(self) -> bool:
        """Whether tensors are in the host's memory."""
        return self.machine.kind == "cpu"

    @property
    def ranks(self) -> int:
        """Number of ranks on all nodes."""
        return self.machine.ranks

    @property
    def sharding(self) -> Sharding:
        """What `zero=` shards."""
        return SHARDINGS[self.zero]

    @property
    def shards_weights(self) -> bool:
        """Whether weights are sharded, so that no rank has the full model."""
        return self.sharding.weights

    @property
    def shard_ranks(self) -> int:
        """Ranks over which `zero=` shards: all ranks, or with hsdp those of a node; 1 without sharding."""
        if self.zero == "none":
            return 1
        return min(self.machine.ranks_here, self.ranks) if self.sharding.within_node else self.ranks

    def answers(self, longest: int) -> LengthStats:
        """Lengths of sampled answers of at most `longest` tokens."""
        mean = min(float(longest), self.answer_tokens or longest)
        return LengthStats(0, mean, min(mean, longest - mean) / 2, longest)

    def gathers_a_rollout(self, new_tokens: int) -> int:
        """Number of times that a rollout gathers sharded weights: once, or once per token."""
        by_layers = self.vllm is None and self.local_sampling == "layers"
        return new_tokens if by_layers and self.shards_weights else 1

    def pass_tokens(self, rows: float, lengths: LengthStats, max_tokens: int) -> float:
        """Tokens of a rank's largest forward pass, padding included.

        Args:
            rows: rows of a batch, over all ranks.
            max_tokens: largest number of real tokens in a pass.
        """
        if self.pads:
            return largest_padded_pass(max(1, math.ceil(rows / self.ranks)), lengths, max_tokens)
        tokens = self._real_tokens(rows, lengths, max_tokens)
        return max(float(lengths.longest), self.computed(tokens, lengths))

    def computed(self, tokens: float, lengths: LengthStats) -> float:
        """How many of these tokens go through the model: on CPUs a prefix that packed rows share is computed
        once."""
        shares = self.on_cpu and not self.pads and lengths.mean > 0
        return tokens * (1 - lengths.shared_prefix / lengths.mean) if shares else tokens

    def _real_tokens(self, rows: float, lengths: LengthStats, max_tokens: int) -> float:
        rank_rows = rows / self.ranks
        batch = rank_rows * lengths.mean + LARGEST_BATCH_DEVIATIONS * math.sqrt(rank_rows) * lengths.deviation
        return max(float(lengths.longest), min(float(max_tokens), batch))

    def passes(self, rows: float, lengths: LengthStats, max_tokens: int) -> int:
        """Number of forward passes of one rank for a batch of `rows` rows over all ranks."""
        tokens = rows / self.ranks * lengths.mean
        return max(1, math.ceil(tokens / max(1.0, self._real_tokens(rows, lengths, max_tokens))))

    def starting(self, directory: Path | None) -> CostContext:
        """This context with the model in a directory instead of the base model.

        The shape stays that of the base model if the directory is None or its config does not tell.
        """
        try:
            return self if directory is None else replace(self, shape=shape_in(directory))
        except UnknownShapeError:
            return self

    def tuned(self, peft: PeftConfig) -> CostContext:
        """This context with a tuning method: rows with virtual tokens are padded."""
        return replace(self, pads=self.pads or METHODS[peft.method].pads)


@cache
def largest_padded_pass(rows: int, lengths: LengthStats, max_tokens: int) -> int:
    """Tokens of the largest pass, padding included, when batches of `rows` rows are split into passes.

    Most texts are short and a few are long, so lengths are drawn from the log-normal distribution with the
    mean and deviation of `lengths`. One row of the first batch has the longest length.

    Args:
        max_tokens: largest number of real tokens in a pass.
    """
    random, largest = Random(0), 0
    variance = math.log1p((lengths.deviation / max(1.0, lengths.mean)) ** 2)
    middle = math.log(max(1.0, lengths.mean)) - variance / 2
    for batch in range(max(1, min(MAX_DRAWN_BATCHES, lengths.rows // rows))):
        drawn = [random.lognormvariate(middle, math.sqrt(variance)) for _ in range(rows)]
        tokens = [min(lengths.longest, max(1, round(each))) for each in drawn]
        if batch == 0:
            tokens[0] = lengths.longest
        passes = token_budget_batches(tokens, max_tokens)  # longest row first, in each pass too
        largest = max(largest, *(len(each) * tokens[each[0]] for each in passes))
    return largest


def pads_rows(model: ModelConfig, shape: ModelShape) -> bool:
    """Whether rows are padded: because of `model.attention`, or because the model cannot be packed."""
    return model.attention != ATTENTION and not (model.attention == "auto" and shape.can_pack)
