"""Makes the engine that `zero=` selects, and shards frozen models with the same library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from rlhf.config import ConfigError
from rlhf.distributed.compute import Compute
from rlhf.distributed.device import return_freed_memory
from rlhf.training.engine import Access, Engine, Groups, PlainEngine


def make_engine(
    model: nn.Module,
    groups: Groups,
    compute: Compute,
    resume: Mapping[str, Any] | None = None,
    *,
    in_turns: bool = False,
) -> Engine:
    """The engine that `zero=` selects.

    Args:
        groups: parameters and the config of each group. Parameters that require no gradients are left out.
        resume: the manifest of the checkpoint to be loaded. DeepSpeed must know its number of ranks.
        in_turns: passes run different parts of the model in turn, so weights are not gathered in advance.

    Raises:
        ConfigError: the checkpoint belongs to another engine.
    """
    if resume is not None and resume["zero"] != compute.zero:
        raise ConfigError(
            f"The checkpoint of step {resume['step']} was written with zero={resume['zero']}, which "
            f"zero={compute.zero} cannot read. Continue with zero={resume['zero']}, or start the stage again "
            "with checkpoint.resume=false."
        )
    universal = resume is not None and resume["world_size"] != compute.world_size
    engine = _engine(model, groups, compute, universal=universal, in_turns=in_turns)
    return_freed_memory()  # construction left gaps that no larger block fits
    return engine


def _engine(model: nn.Module, groups: Groups, compute: Compute, *, universal: bool, in_turns: bool) -> Engine:
    if compute.zero == "none":
        return PlainEngine(model, groups, compute)
    if compute.uses_fsdp:
        from rlhf.training.fsdp import FsdpEngine

        return FsdpEngine(model, groups, compute)
    from rlhf.training.deepspeed import ZeroEngine

    return ZeroEngine(model, groups, compute, universal=universal, in_turns=in_turns)


def shard_frozen(model: nn.Module, compute: Compute) -> Access:
    """Shard a model that does not train over the ranks. Each rank copies its slices to its device. From
    mapped files it reads only these slices."""
    if compute.uses_fsdp:
        from rlhf.training.fsdp import shard_frozen as shard
    else:
        from rlhf.training.deepspeed import shard_frozen as shard
    return shard(model.requires_grad_(False), compute)
