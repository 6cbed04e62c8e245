"""What the planner and the check before a run count with."""

from __future__ import annotations

from pathlib import Path

from transformers import (
    Qwen3Config,
)

from helpers.experiments import build
from rlhf.costs.hardware import Machine, Speed
from rlhf.costs.model_shape import shape_of
from rlhf.costs.setup import CostContext, Sizes
from rlhf.data.prepared import LengthStats
from rlhf.pipeline.preflight import (
    Attempt,
    Disk,
    PreflightResult,
    preflight,
)
from rlhf.training.checkpoint import CheckpointConfig

EIGHT_BILLION = Qwen3Config(
    hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, vocab_size=151936, max_position_embeddings=40960,
)  # fmt: skip
EIGHT = shape_of(EIGHT_BILLION)
GIB = 2**30
LARGE = 1e15
"""Bytes of a disk on which everything fits."""
NO_CHECKPOINTS = CheckpointConfig(every_steps=None, every_minutes=None, background=False, keep=1, resume=True)


def gpus(gib: float, ranks: int = 1, host: float = 1000.0) -> CostContext:
    machine = Machine("cuda", "a test", gib * GIB, host * GIB, 0.6 * GIB, ranks, Speed(300_000.0, 2000.0))
    lengths = LengthStats(rows=1000, mean=400.0, deviation=100.0, longest=900)
    return CostContext(shape_of(EIGHT_BILLION), 2, "none", machine, lambda role, split: lengths)


def check(tmp_path: Path, on: CostContext, stage: str, *overrides: str) -> PreflightResult:
    found = build(*overrides)
    return preflight(
        [found.stages[stage]],
        found.stages,
        on,
        Disk(tmp_path, LARGE),
        NO_CHECKPOINTS,
        attempts={stage: Attempt()},
    )


def with_prompts_of(on: CostContext, tokens: int) -> Sizes:
    short = LengthStats(rows=1000, mean=float(tokens), deviation=0.0, longest=tokens)
    return lambda role, split: short if role == "evaluate" else on.sizes(role, split)


def no_gates(stage: str) -> list[str]:
    return [f"{stage}.gates.{name}=null" for name in build().stages[stage].gates]
