"""Linear layers with 4-bit weights, while a low-rank update of them trains.

Source: Dettmers et al. 2023 (arXiv:2305.14314): 4-bit NormalFloat in blocks of 64, whose scales are quantized
too. bitsandbytes computes the products. It is imported only when it is needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.models.on_disk import MapWeight

FORMAT: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": True}


@torch.no_grad()
def quantize(model: PreTrainedModel, names: list[str], device: torch.device) -> None:
    """Convert linear layers to 4 bits, one by one, while they move to a device. Then move the rest of the
    model, and freeze it.

    Args:
        names: last parts of the layers' names.
    """
    import bitsandbytes

    kinds: Any = bitsandbytes.nn
    for parent, name, linear in _linears(model, names):
        held = kinds.Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=model.dtype,
            device="meta", **FORMAT,
        )  # fmt: skip
        weight = kinds.Params4bit(linear.weight.data, requires_grad=False, module=held, **FORMAT)
        held.weight, held.bias = weight.to(device), linear.bias
        setattr(parent, name, held)
    module: nn.Module = model  # transformers' own `to` hides its signature from type checkers
    module.to(device).requires_grad_(False)
    model.__dict__["is_loaded_in_4bit"] = True  # peft reads this


@torch.no_grad()
def round_to_4_bits(
    model: PreTrainedModel, names: list[str], map_weight: MapWeight = lambda weight: weight
) -> None:
    """Give linear layers plain weights with the values that they have after `quantize`.

    Args:
        map_weight: called with each new weight; its result goes into the model.
    """
    for _, _, linear in _linears(model, names):
        linear.weight.data = map_weight(_rounded(linear.weight).to(linear.weight.dtype))


def _rounded(weight: Tensor) -> Tensor:
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(weight.data.contiguous(), **FORMAT)
    rounded: Tensor = functional.dequantize_4bit(codes, state)
    return rounded


def _linears(model: PreTrainedModel, names: list[str]) -> list[tuple[nn.Module, str, nn.Linear]]:
    return [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, nn.Linear) and name in names
    ]
