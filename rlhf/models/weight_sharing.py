"""One set of frozen weights under several models.

While only adapters and heads train, PPO's policy, reference, critic and reward model can stand on the same
backbone. Each keeps a tree of modules of its own, with its own adapters in it, so nothing has to be switched
between one model's pass and another's; only the weights are held once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class Backbone:
    """A causal model for others to share the weights of, without an adapter."""

    directory: Path
    """Where it was read."""
    model: PreTrainedModel


def sharing(module: ModuleT, own: Iterable[nn.Parameter] = ()) -> ModuleT:
    """A second tree of modules on the very same weights, frozen in it.

    Its parameters are new objects on the old storage. So what one tree points elsewhere for a while
    (`Adapter.merged`) stays as it is in the other; what is written into a weight is seen by both.

    Args:
        own: parameters that are copied instead.
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

    Its buffers stay where they are: they are small. Nothing is ever copied back, because nothing changes.

    Returns:
        What opens a context in which the weights are on `device`.
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
