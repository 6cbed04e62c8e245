"""What the stages that see fixed data need: SFT and the reward model."""

from __future__ import annotations

from rlhf.costs.memory import (
    FP32,
    Allocation,
    MemoryPhase,
    Trained,
    activations,
    billions,
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
    """One engine that trains one model.

    Args:
        train: of the sequences that go through the model.
        has_logits: the output layer predicts each token; else a scalar head reads the last.
        longest: tokens of one row.
    """
    on = on.tuned(peft)
    trained = Trained(on, peft, scalars=0 if has_logits else 1)
    tokens = on.pass_tokens(batch_rows, train, micro_batch_tokens)
    passes = on.passes(batch_rows, train, micro_batch_tokens)
    states = [*trained.weights("model"), trained.optimizer(), *trained.buffers()]
    graph = activations(on, tokens, longest, peft, checkpointing=checkpointing)
    heads = [logits(on, learns=True)] if has_logits and train.rows else []
    phases = [
        loading(on, trained),
        MemoryPhase("forward and backward", [*states, *trained.gradients(passes=passes), graph, *heads]),
        MemoryPhase("optimizer step", [*states, *trained.gradients(passes=passes, at_step=True)]),
        MemoryPhase("publishing", [*states, *published(on, trained.parameters, is_scalar=not has_logits)]),
    ]
    if held_out.rows:
        read = reading(on, on.pass_tokens(held_out.rows, held_out, micro_batch_tokens))
        if has_logits:
            phases.append(MemoryPhase("evaluating", [*states, read, *heads]))
        else:
            phases.append(
                MemoryPhase("ranking", [frozen_weights(on, "published model", is_scalar=True), read])
            )
    worker, steps = ThroughputModel(on), num_batches(train.rows, batch_rows, epochs)
    all_tokens, held_tokens = epochs * train.rows * train.mean, held_out.rows * held_out.mean
    learned, read_tokens = on.computed(all_tokens, train), 2 * on.computed(held_tokens, held_out)
    work = [
        worker.load(3, what="model, published model"),
        worker.train(
            learned, train.mean, peft.method, predicted=all_tokens if has_logits else 0.0,
            checkpointing=checkpointing, what="training",
        ),
        worker.optimize(trained.parameters, steps),
        worker.read(
            read_tokens, held_out.mean, predicted=2 * held_tokens if has_logits else 0.0,
            what="held-out rows",
        ),
    ]  # fmt: skip
    return StageCost(
        phases, work, artifact=artifact_bytes(on, peft, is_scalar=not has_logits),
        checkpoint=3 * FP32 * trained.parameters,
        longest=longest + COSTS[peft.method].added_tokens(on.shape, peft), context=on.shape.context,
    )  # fmt: skip


def published(on: CostContext, parameters: float, *, is_scalar: bool = False) -> list[Allocation]:
    """On the host, while the engine is still there: a copy of what trained, and the model to write. Rank 0's
    alone, so a share of it for each rank there."""
    how = f"trained: {billions(parameters)} x {on.dtype_bytes} B"
    here, written = on.machine.ranks_here, frozen_weights(on, "published", is_scalar=is_scalar).size
    return [
        Allocation("weights", on.dtype_bytes * parameters / here, how + over(here), True),
        Allocation("weights", written / here, f"the model that is written{over(here)}", True),
    ]


def artifact_bytes(on: CostContext, peft: PeftConfig, *, is_scalar: bool = False) -> float:
    """On disk: the model where the method merges, and what trained beside it."""
    beside = 0 if peft.method == "none" else on.dtype_bytes * COSTS[peft.method].published(on.shape, peft)
    model = frozen_weights(on, "published", is_scalar=is_scalar).size
    return beside + (model if METHODS[peft.method].merges else 0)
