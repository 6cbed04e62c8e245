"""The cost of a stage: as the stage computes it, or as it follows from the stage's fields."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from rlhf.costs.setup import CostContext
from rlhf.costs.stage_cost import StageCost, joined
from rlhf.costs.training import training_cost
from rlhf.data.prepared import LengthStats
from rlhf.data.roles import TRAINING
from rlhf.data.schema import PairRow, Split
from rlhf.models.start import directory_of
from rlhf.pipeline.fields import Mark, fields_of, peft_of
from rlhf.pipeline.graph import root_of, starts_from
from rlhf.pipeline.stage import Stage


def cost_of(stage: Stage, on: CostContext, chain: Mapping[str, Stage]) -> StageCost:
    """What a stage needs in memory, phase by phase, and the work it does.

    Args:
        on: model, hardware, and the lengths of its data.
        chain: all stages; other stages' knobs may matter too.
    """
    own = stage.cost(on, chain)
    cost = _from_fields(stage, starting(stage, on, chain)) if own is None else own
    return replace(cost, keeps_last=True) if stage.has_open_end() else cost


def starting(stage: Stage, on: CostContext, chain: Mapping[str, Stage]) -> CostContext:
    """The context, with the shape of the user's own model if the stage starts from one."""
    start = starts_from(stage)
    return on if start is None else on.starting(directory_of(root_of(*start, chain)[1]))


def _from_fields(stage: Stage, on: CostContext) -> StageCost:
    """The cost of a stage that trains: each training row once an epoch, the held-out rows twice. Empty for
    other stages."""
    peft, roles, keys = peft_of(stage), stage.reads().roles, dict(stage)
    batch_keys, memory_keys = (fields_of(type(stage), mark) for mark in (Mark.BATCH, Mark.MEMORY))
    if peft is None or not (roles and batch_keys and memory_keys):
        return StageCost()
    pairs = PairRow in stage.mount.roles[stage.mount.own_role(roles[0])].row_types

    def rows(split: Split) -> LengthStats:
        lengths = on.sizes(roles[0], split).cut(keys.get("max_tokens", math.inf))
        return joined(lengths, lengths) if pairs else lengths

    train, held_out = map(rows, TRAINING)
    return training_cost(
        on, peft, train, held_out, batch_rows=keys[batch_keys[0]], epochs=keys.get("epochs", 1),
        micro_batch_tokens=keys[memory_keys[0]], has_logits=stage.makes == "policy",
        checkpointing=keys.get("activation_checkpointing", False),
        longest=train.longest // 2 if pairs else train.longest,
    )  # fmt: skip
