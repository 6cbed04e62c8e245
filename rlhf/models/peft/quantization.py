"""Keep linear layers in 4 bits while a low-rank update of them trains.

Source: Dettmers et al. 2023 (arXiv:2305.14314): 4-bit NormalFloat in blocks of 64, whose scales are quantized
in turn. bitsandbytes computes the products. It is imported only when it is needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.models.on_disk import Keep

FORMAT: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": True}


@torch.no_grad()
def quantize(model: PreTrainedModel, names: list[str], device: torch.device) -> None:
    """Convert linear layers to 4 bits, one after the other, on the way to a device. The rest of the model
    follows. The layers cannot train any more.

    Args:
        names: the last parts of their names.
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
    model.__dict__["is_loaded_in_4bit"] = True  # where peft looks


@torch.no_grad()
def round_to_4_bits(model: PreTrainedModel, names: list[str], keep: Keep = lambda weight: weight) -> None:
    """Give linear layers, as plain weights, the values that they have after `quantize`.

    Args:
        keep: gets each weight that is made.
    """
    for _, _, linear in _linears(model, names):
        linear.weight.data = keep(_rounded(linear.weight).to(linear.weight.dtype))


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
