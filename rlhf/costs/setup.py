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
from rlhf.distributed.compute import Zero
from rlhf.models.base import ATTENTION, ModelConfig, UnknownShapeError
from rlhf.models.peft.config import PeftConfig
from rlhf.models.peft.methods import METHODS

if TYPE_CHECKING:
    from rlhf.generation.vllm import VllmConfig

LocalSampling = Literal["whole", "layers"]
"""Sharded weights are gathered whole for a rollout, which is fast; or layer by layer in each pass."""
Sizes = Callable[[str, Split], LengthStats]
"""(role, split) -> how many rows there are, and their lengths."""
LARGEST_BATCH = 2.5
"""Standard deviations by which the largest of some hundred batches passes the mean one."""
DRAWN_BATCHES = 100
"""At most, to find the largest pass of padded rows."""


@dataclass(frozen=True)
class CostContext:
    """Everything that costs are computed from, except the stage's own keys."""

    shape: ModelShape
    dtype_bytes: int
    zero: Zero
    machine: Machine
    sizes: Sizes
    vllm: VllmConfig | None = None
    """vLLM's settings; None for the local engine."""
    has_sampled: bool = False
    """An earlier stage of the run has sampled, so vLLM holds its memory from the beginning."""
    pads: bool = False
    """Rows are padded to the longest of a pass, not packed."""
    local_sampling: LocalSampling = "whole"
    """How the local engine samples from sharded weights. The preflight chooses."""
    answer_tokens: float | None = None
    """Tokens of a mean sampled answer; None: each is as long as it may be."""

    @property
    def on_cpu(self) -> bool:
        """Tensors are in the host's memory."""
        return self.machine.kind == "cpu"

    @property
    def ranks(self) -> int:
        """Ranks on all nodes."""
        return self.machine.ranks

    @property
    def shards_weights(self) -> bool:
        """No rank has the whole model."""
        return self.zero not in ("none", "zero1", "zero2")

    @property
    def shard_ranks(self) -> int:
        """Ranks over which `zero=` shards: all of them, or with hsdp those of a node; 1 without sharding."""
        if self.zero == "none":
            return 1
        return min(self.machine.ranks_here, self.ranks) if self.zero == "hsdp" else self.ranks

    def answers(self, longest: int) -> LengthStats:
        """Sampled answers of at most so many tokens."""
        mean = min(float(longest), self.answer_tokens or longest)
        return LengthStats(0, mean, min(mean, longest - mean) / 2, longest)

    def gathers_a_rollout(self, new_tokens: int) -> int:
        """How often sharded weights are gathered to sample: once, or for each token."""
        by_layers = self.vllm is None and self.local_sampling == "layers"
        return new_tokens if by_layers and self.shards_weights else 1

    def pass_tokens(self, rows: float, lengths: LengthStats, most: int) -> float:
        """Tokens of a rank's largest forward pass, padding included, where so many rows are a batch over all
        ranks."""
        if self.pads:
            return largest_padded(max(1, math.ceil(rows / self.ranks)), lengths, most)
        tokens = self._real_tokens(rows, lengths, most)
        return max(float(lengths.longest), self.computed(tokens, lengths))

    def computed(self, tokens: float, lengths: LengthStats) -> float:
        """Of so many tokens in rows of such lengths, those that go through a model: on CPUs what packed rows
        begin with alike does once."""
        shares = self.on_cpu and not self.pads and lengths.mean > 0
        return tokens * (1 - lengths.shared_prefix / lengths.mean) if shares else tokens

    def _real_tokens(self, rows: float, lengths: LengthStats, most: int) -> float:
        mine = rows / self.ranks
        batch = mine * lengths.mean + LARGEST_BATCH * math.sqrt(mine) * lengths.deviation
        return max(float(lengths.longest), min(float(most), batch))

    def passes(self, rows: float, lengths: LengthStats, most: int) -> int:
        """Forward passes of one rank for a batch."""
        tokens = rows / self.ranks * lengths.mean
        return max(1, math.ceil(tokens / max(1.0, self._real_tokens(rows, lengths, most))))

    def starting(self, directory: Path | None) -> CostContext:
        """Where a model of the user's is trained or run instead of the base model: as large as that, where
        its config does not tell."""
        try:
            return self if directory is None else replace(self, shape=shape_in(directory))
        except UnknownShapeError:
            return self

    def tuned(self, peft: PeftConfig) -> CostContext:
        """Where a model is tuned like this: rows behind virtual tokens are padded."""
        return replace(self, pads=self.pads or METHODS[peft.method].pads)


@cache
def largest_padded(rows: int, lengths: LengthStats, most: int) -> int:
    """Rows times the longest row, of the largest pass that batches of so many rows are split into.

    Texts are many short ones and a few long ones: the lengths are drawn from the log-normal distribution of
    that mean and deviation, and one of them is the longest there is.
    """
    chance, largest = Random(0), 0
    variance = math.log1p((lengths.deviation / max(1.0, lengths.mean)) ** 2)
    middle = math.log(max(1.0, lengths.mean)) - variance / 2
    for batch in range(max(1, min(DRAWN_BATCHES, lengths.rows // rows))):
        drawn = [chance.lognormvariate(middle, math.sqrt(variance)) for _ in range(rows)]
        tokens = [min(lengths.longest, max(1, round(each))) for each in drawn]
        if batch == 0:
            tokens[0] = lengths.longest
        passes = token_budget_batches(tokens, most)  # the longest rows first, in each too
        largest = max(largest, *(len(each) * tokens[each[0]] for each in passes))
    return largest


def pads_rows(model: ModelConfig, shape: ModelShape) -> bool:
    """Whether rows are padded: by `model.attention`, or because the model cannot take packed rows."""
    return model.attention != ATTENTION and not (model.attention == "auto" and shape.can_pack)
