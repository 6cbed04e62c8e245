"""Weights laid out once for many small products: on CPUs most of decoding is reading them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional


class Product:
    """Linear layers of one input as one product: x [..., in] -> [..., all their outputs].

    bf16 weights on a CPU are copied into oneDNN's own layout, as they are now: torch would rearrange each of
    them in every call, which for a few rows takes longer than to multiply. Others are used where they are.
    """

    def __init__(self, layers: Sequence[nn.Linear], rows: int) -> None:
        """`rows` is how many most calls will bring."""
        self._layers, self._packed = layers, None
        if all(is_packable(layer) for layer in layers):
            weight = torch.cat([layer.weight.detach() for layer in layers])
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
            biases = [
                layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach()
                for layer in layers
            ]
            self._bias = torch.cat(biases) if any(layer.bias is not None for layer in layers) else None

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed is None:
            parts = [functional.linear(x, layer.weight, layer.bias) for layer in self._layers]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return product

    def plus(self, other: Tensor, x: Tensor) -> Tensor:
        """other + self(x), in one go where that is possible."""
        if self._packed is None:
            return self(x).add_(other)
        total: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self._packed, self._bias, "add")
        return total


def is_packable(layer: nn.Module) -> bool:
    """Whether oneDNN has a layout for it, and torch the bf16 arithmetic that it needs."""
    if type(layer) is not nn.Linear or not torch.backends.mkldnn.is_available():
        return False
    is_bf16 = layer.weight.device.type == "cpu" and layer.weight.dtype == torch.bfloat16
    return is_bf16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextmanager
def prepacked(model: nn.Module, rows: int) -> Iterator[None]:
    """While open, a model's linear layers run as `Product`s, one each, where that is more than they are.

    The weights must not change meanwhile.

    Args:
        rows: tokens that most calls will bring.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and is_packable(layer)]
    try:
        for layer in layers:
            layer.__dict__["forward"] = Product([layer], rows)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
