"""Several models that share one set of frozen weights.

If only adapters and heads train, PPO's policy, reference, critic and reward model can use the same backbone.
Each model has its own tree of modules with its own adapters, so nothing is switched between the passes of two
models. The weights are in memory once.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf.distributed.compute import Compute
from rlhf.training.engine import FULL_MODEL, Access
from rlhf.training.make_engine import shard_frozen

Placement = Literal["replicated", "sharded", "offloaded"]
"""Where the weights of a frozen model are: a full copy on each rank, sharded over the ranks, or in the host's
memory while the model is not in use."""
ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class Backbone:
    """A causal model without adapters, whose weights other models share."""

    directory: Path
    """The directory from which the model was loaded."""
    model: PreTrainedModel


def shared_copy(module: ModuleT, own: Iterable[nn.Parameter] = ()) -> ModuleT:
    """A second tree of modules that shares the weights, frozen in the copy.

    The copy's parameters are new objects on the same storage. So if one tree replaces a weight for some time
    (`Adapter.merged`), the other keeps the old weight. A write in place changes both.

    Args:
        own: parameters to copy instead of sharing them.
    """
    copied = {id(parameter) for parameter in own}
    memo = {
        id(parameter): nn.Parameter(parameter.detach(), requires_grad=False)
        for parameter in module.parameters()
        if id(parameter) not in copied
    }
    return copy.deepcopy(module, memo)


def offload(model: nn.Module, device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """Move the weights of a frozen model to the host's memory.

    Its buffers are small and stay on the device. Nothing is copied back, because the weights do not change.

    Returns:
        A function that opens a context. While it is open, the weights are on `device`.
    """
    parameters = list(model.parameters())
    on_host = [parameter.detach().to("cpu") for parameter in parameters]
    if device.type == "cuda":
        on_host = [weight.pin_memory() for weight in on_host]  # for faster copies

    def put(weights: list[torch.Tensor]) -> None:
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.data = weight

    @contextmanager
    def on_device() -> Iterator[None]:
        put([weight.to(device, non_blocking=True, copy=True) for weight in on_host])
        try:
            yield
        finally:
            put(on_host)

    put(on_host)
    return on_device


def load_frozen(
    load: Callable[[torch.device], ModuleT],
    compute: Compute,
    placement: Placement | None = None,
    check: Callable[[ModuleT], None] = lambda model: None,
) -> tuple[ModuleT, Access]:
    """Load a frozen model to its placement.

    Args:
        load: loads the model to a device.
        placement: None for that of the weights that train: sharded if those are, otherwise replicated.
        check: called with the full model, before it is sharded.
    """
    gc.collect()  # frees earlier models, whose hooks are reference cycles
    placement = placement or ("sharded" if compute.shards_weights else "replicated")
    model = load(torch.device("cpu") if placement == "sharded" else compute.device)
    model.requires_grad_(False)
    check(model)
    if placement == "sharded":
        return model, shard_frozen(model, compute)
    return model, Access(offload(model, compute.device)) if placement == "offloaded" else FULL_MODEL
