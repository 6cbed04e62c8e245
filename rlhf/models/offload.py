"""Frozen models whose weights are in the host's memory, and on the device only while they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn


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
