"""Several models on one set of frozen weights.

If only adapters and heads train, PPO's policy, reference, critic and reward model can use the same backbone.
Each has its own tree of modules with its own adapters. So nothing is switched between the passes of two
models. Only the weights are in memory once.
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
from rlhf.training.engine import WHOLE, Access
from rlhf.training.make_engine import shard_frozen

Placement = Literal["replicated", "sharded", "offloaded"]
"""Where a model that does not train is: whole on each rank, spread over the ranks, or in the host's memory
while it is not used."""
ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class Backbone:
    """A causal model without an adapter, whose weights other models share."""

    directory: Path
    """The directory that it was read from."""
    model: PreTrainedModel


def sharing(module: ModuleT, own: Iterable[nn.Parameter] = ()) -> ModuleT:
    """A second tree of modules on the same weights, where they are frozen.

    Its parameters are new objects with the old storage. So if one tree replaces a weight for some time
    (`Adapter.merged`), the other one keeps it. If a weight is written in place, both see it.

    Args:
        own: parameters that are copied and not shared.
    """
    copied = {id(parameter) for parameter in own}
    memo = {
        id(parameter): nn.Parameter(parameter.detach(), requires_grad=False)
        for parameter in module.parameters()
        if id(parameter) not in copied
    }
    return copy.deepcopy(module, memo)


def offload(model: nn.Module, device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """Move the weights of a model that does not train to the host's memory.

    Its buffers are small and stay on the device. Nothing is copied back, because nothing changes.

    Returns:
        A function that opens a context in which the weights are on `device`.
    """
    parameters = list(model.parameters())
    on_host = [parameter.detach().to("cpu") for parameter in parameters]
    if device.type == "cuda":
        on_host = [weight.pin_memory() for weight in on_host]  # copies several times as fast

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


def frozen(
    load: Callable[[torch.device], ModuleT],
    compute: Compute,
    placement: Placement | None = None,
    check: Callable[[ModuleT], None] = lambda model: None,
) -> tuple[ModuleT, Access]:
    """A model that does not train, where it belongs.

    Args:
        load: reads it to a device.
        placement: None for as the weights that train: sharded where these are.
        check: is called with the whole model, before it is sharded.
    """
    gc.collect()  # models before it: hooks hold themselves in cycles
    placement = placement or ("sharded" if compute.shards_weights else "replicated")
    model = load(torch.device("cpu") if placement == "sharded" else compute.device)
    model.requires_grad_(False)
    check(model)
    if placement == "sharded":
        return model, shard_frozen(model, compute)
    return model, Access(offload(model, compute.device)) if placement == "offloaded" else WHOLE
