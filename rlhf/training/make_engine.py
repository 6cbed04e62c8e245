"""The engine that `zero=` asks for; and models that do not train, sharded by the same library."""

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
    """The engine that `zero=` asks for.

    Args:
        groups: parameters (those that do not require gradients are left out) and how each group is trained.
        resume: the manifest of the checkpoint that will be loaded. DeepSpeed must know its number of ranks.
        in_turns: passes run different parts of the model in turns, so weights are not fetched in advance.

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
    made = _engine(model, groups, compute, universal=universal, in_turns=in_turns)
    return_freed_memory()  # of what was held while it was built: its holes fit no larger block
    return made


def _engine(model: nn.Module, groups: Groups, compute: Compute, *, universal: bool, in_turns: bool) -> Engine:
    if compute.zero == "none":
        return PlainEngine(model, groups, compute)
    if compute.uses_fsdp:
        from rlhf.training.fsdp import FsdpEngine

        return FsdpEngine(model, groups, compute)
    from rlhf.training.deepspeed import ZeroEngine

    return ZeroEngine(model, groups, compute, universal=universal, in_turns=in_turns)


def shard_frozen(model: nn.Module, compute: Compute) -> Access:
    """Spread a model that does not train over the ranks. Each copies its slices to its device: of weights in
    mapped files, it reads no others."""
    if compute.uses_fsdp:
        from rlhf.training.fsdp import shard_frozen as shard
    else:
        from rlhf.training.deepspeed import shard_frozen as shard
    return shard(model.requires_grad_(False), compute)
