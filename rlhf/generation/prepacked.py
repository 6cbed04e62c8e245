"""Weights laid out once for many small products: on CPUs most of decoding is reading them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def prepacked(model: nn.Module, rows: int) -> Iterator[None]:
    """While open, the linear layers of a bf16 model on a CPU run on copies in oneDNN's own layout.

    torch would rearrange each weight in every call, which for a few rows takes longer than to multiply. The
    weights must not change meanwhile. Other models run as they are.

    Args:
        rows: tokens that most calls will bring.
    """
    layers: list[Any] = [
        layer
        for layer in model.modules()
        if type(layer) is nn.Linear
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype == torch.bfloat16
    ]
    if not layers or not _has_layout():
        yield
        return
    try:
        for layer in layers:
            layer.forward = _Product(layer, rows)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


class _Product:
    """x [..., in] -> [..., out]."""

    def __init__(self, layer: nn.Linear, rows: int) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)
        self.bias = None if layer.bias is None else layer.bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return result


def _has_layout() -> bool:
    """Whether torch has oneDNN, and the CPU bf16 arithmetic that it needs."""
    ops = torch.ops.mkldnn
    return torch.backends.mkldnn.is_available() and bool(ops._is_mkldnn_bf16_supported())
