"""Costs of the stages that train on fixed data: SFT, reward model, DPO."""

from __future__ import annotations

import math
from dataclasses import replace

from rlhf.costs.memory import (
    FP32,
    Allocation,
    MemoryPhase,
    Trained,
    activations,
    amount,
    billions,
    frozen_runs,
    frozen_weights,
    loading,
    logits,
    over,
    reading,
)
from rlhf.costs.peft_costs import COSTS
from rlhf.costs.setup import CostContext
from rlhf.costs.stage_cost import StageCost, ThroughputModel
from rlhf.data.prepared import LengthStats
from rlhf.distributed.batching import num_batches
from rlhf.models.peft.config import PeftConfig
from rlhf.models.peft.methods import METHODS


def training_cost(
    on: CostContext,
    peft: PeftConfig,
    train: LengthStats,
    held_out: LengthStats,
    *,
    batch_rows: int,
    epochs: float,
    micro_batch_tokens: int,
    checkpointing: bool,
    has_logits: bool,
    longest: int,
) -> StageCost:
    """Cost of training one model with one engine.

    Args:
        train: lengths of the sequences that go through the model.
        held_out: the same for held-out rows.
        has_logits: the output layer predicts each token; else a scalar head reads the last token.
        longest: tokens of the longest row.
    """
    on = on.tuned(peft)
    trained = Trained(on, peft, scalars=0 if has_logits else 1)
    tokens = on.pass_tokens(batch_rows, train, micro_batch_tokens)
    passes = on.passes(batch_rows, train, micro_batch_tokens)
    states = [*trained.weights("model"), trained.optimizer(), *trained.buffers()]
    graph = activations(on, tokens, longest, peft, checkpointing=checkpointing)
    heads = [logits(on, learns=True)] if has_logits and train.rows else []
    running = [*states, *trained.gathered()]
    phases = [
        loading(on, trained),
        MemoryPhase("forward and backward", [*running, *trained.gradients(passes=passes), graph, *heads]),
        MemoryPhase("optimizer step", [*states, *trained.gradients(passes=passes, at_step=True)]),
        MemoryPhase("publishing", [*states, *publishing_memory(on, trained.parameters)]),
    ]
    if held_out.rows:
        read = reading(on, on.pass_tokens(held_out.rows, held_out, micro_batch_tokens))
        if has_logits:
            phases.append(MemoryPhase("evaluating", [*running, read, *heads]))
        else:
            phases.append(MemoryPhase("ranking", [*frozen_runs(on, "published model", is_scalar=True), read]))
    worker, steps = ThroughputModel(on), num_batches(train.rows, batch_rows, epochs)
    all_tokens, held_tokens = epochs * train.rows * train.mean, held_out.rows * held_out.mean
    learned, read_tokens = on.computed(all_tokens, train), 2 * on.computed(held_tokens, held_out)
    training = worker.train(
        learned, train.mean, peft.method, predicted=all_tokens if has_logits else 0.0,
        checkpointing=checkpointing, what="training",
    )  # fmt: skip
    work = [
        worker.load(3, what="model, published model"),
        training,
        *worker.exchanging(steps * passes, steps, trained.parameters, what="training"),
        worker.optimize(trained.parameters, steps),
        worker.read(
            read_tokens, held_out.mean, predicted=2 * held_tokens if has_logits else 0.0,
            what="held-out rows",
        ),
    ]  # fmt: skip
    return StageCost(
        phases, work, artifact=artifact_bytes(on, peft, is_scalar=not has_logits),
        checkpoint=3 * FP32 * trained.parameters, tokens=all_tokens,
        longest=longest + COSTS[peft.method].added_tokens(on.shape, peft), context=on.shape.context,
    )  # fmt: skip


def publishing_memory(on: CostContext, parameters: float) -> list[Allocation]:
    """Memory of publishing, while the engine still exists.

    Each rank gathers one weight at a time and holds the content of one file on the host. Rank 0 then maps the
    files, which is not counted.
    """
    from rlhf.training.trained import FILE_BYTES

    b = on.dtype_bytes
    own = min(FILE_BYTES, b * parameters / on.ranks)
    formula = (
        f"trained: {billions(parameters)} x {b} B{over(on.ranks)}, at most a file of {amount(FILE_BYTES)}"
    )
    parts = [Allocation("weights", own, formula, True)]
    if on.shards_weights:
        formula = f"the largest weight, gathered to write it: {billions(on.shape.largest)} x {b} B"
        parts.append(Allocation("weights", b * min(on.shape.largest, parameters), formula))
    return parts


def artifact_bytes(on: CostContext, peft: PeftConfig, *, is_scalar: bool = False) -> float:
    """Bytes of the artifact on disk: the model if the method merges, and the trained adapter."""
    adapter = 0 if peft.method == "none" else on.dtype_bytes * COSTS[peft.method].published(on.shape, peft)
    model = frozen_weights(on, "published", is_scalar=is_scalar).size
    return adapter + (model if METHODS[peft.method].merges else 0)


def with_replayed(train: LengthStats, replay: LengthStats, fraction: float) -> LengthStats:
    """Lengths of rows when replayed rows are mixed in; the number of rows stays.

    Args:
        fraction: share of replayed tokens in all tokens.
    """
    replayed = train.mean * fraction / (1 - fraction)  # tokens per row
    return train._replace(
        mean=train.mean + replayed, longest=max(train.longest, replay.longest),
        deviation=math.sqrt(train.deviation**2 + replayed / replay.mean * replay.deviation**2),
    )  # fmt: skip


def with_reference(
    cost: StageCost,
    on: CostContext,
    train: LengthStats,
    held_out: LengthStats,
    *,
    passes: int,
    others: float,
    micro_batch_tokens: int,
) -> StageCost:
    """The cost with that of a frozen reference, which reads all rows before the trained model is loaded.

    Args:
        passes: number of times that the reference reads all rows.
        others: further tokens that it reads.
    """
    worker = ThroughputModel(on)
    read = on.pass_tokens(train.rows, train, micro_batch_tokens)
    phase = MemoryPhase(
        "reference", [*frozen_runs(on, "reference"), reading(on, read), logits(on, learns=False)]
    )
    tokens = passes * sum(each.rows * each.mean for each in (train, held_out)) + others
    reference = [
        worker.load(1, what="reference"),
        worker.read(
            on.computed(tokens, train), train.mean, predicted=tokens,
            what="the reference's log-probabilities" + (", and KTO's reference point" * bool(others)),
        ),
    ]  # fmt: skip
    return replace(cost, phases=[phase, *cost.phases], work=[*reference, *cost.work])
