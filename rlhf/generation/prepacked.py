"""Weights laid out once for many small products: on CPUs most of decoding is reading them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one parent, as transformers names them, that get one input: one product does for all."""


@contextmanager
def prepacked(model: nn.Module, rows: int) -> Iterator[None]:
    """While open, the linear layers of a bf16 model on a CPU run on copies in oneDNN's own layout.

    torch would rearrange each weight in every call, which for a few rows takes longer than to multiply. The
    weights must not change meanwhile. Other models run as they are.

    Args:
        rows: tokens that most calls will bring.
    """
    groups = _groups(model) if _has_layout() else []
    try:
        for layers in groups:
            product = _Product(layers, rows)
            for place, layer in enumerate(layers):
                layer.forward = product.part(place)
        yield
    finally:
        for layer in (layer for layers in groups for layer in layers):
            layer.__dict__.pop("forward", None)


def _groups(model: nn.Module) -> list[list[Any]]:
    """All layers that can be laid out, those of `TOGETHER` together; an adapter may stand around each."""
    groups: list[list[Any]] = []
    seen: set[nn.Module] = set()
    for parent in model.modules():
        inner = {name: getattr(child, "base_layer", child) for name, child in parent.named_children()}
        rest = {name: layer for name, layer in inner.items() if _is_packable(layer) and layer not in seen}
        seen |= set(rest.values())
        for names in TOGETHER:
            if rest.keys() >= set(names) and len({rest[name].bias is None for name in names}) == 1:
                groups.append([rest.pop(name) for name in names])
        groups += [[layer] for layer in rest.values()]
    return groups


def _is_packable(layer: nn.Module) -> bool:
    if type(layer) is not nn.Linear:
        return False
    return layer.weight.device.type == "cpu" and layer.weight.dtype == torch.bfloat16


class _Product:
    """x [..., in] -> [..., out] for each of several layers; computed when the first of them is asked."""

    def __init__(self, layers: list[nn.Linear], rows: int) -> None:
        weight = torch.cat([layer.weight.detach() for layer in layers])
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        self.sizes = [layer.out_features for layer in layers]
        self.x: Tensor | None = None
        self.left: dict[int, Tensor] = {}

    def part(self, place: int) -> Any:
        """The forward pass of one of the layers."""

        def forward(x: Tensor) -> Tensor:
            if x is not self.x or place not in self.left:
                product = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
                self.x, self.left = x, dict(enumerate(product.split(self.sizes, dim=-1)))
            result = self.left.pop(place)
            if not self.left:
                self.x = None
            return result

        return forward


def _has_layout() -> bool:
    """Whether torch has oneDNN, and the CPU bf16 arithmetic that it needs."""
    ops = torch.ops.mkldnn
    return torch.backends.mkldnn.is_available() and bool(ops._is_mkldnn_bf16_supported())
