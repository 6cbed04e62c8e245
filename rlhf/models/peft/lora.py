"""peft's LoRA layer, where the second matrix product adds the update."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import Linear
from torch import Tensor, nn


class LowRankLinear(Linear):
    """Computes the same as peft's layer. peft's own code writes two more tensors of the output's size in the
    forward pass, and one more in the backward pass."""

    @classmethod
    def replace(cls, layers: nn.Module) -> None:
        """Make peft's plain LoRA layers inside compute in this way."""
        for layer in layers.modules():
            if type(layer) is Linear and not layer.lora_variant:
                layer.__class__ = cls

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        is_sharded = any(
            hasattr(each, "ds_id") for each in self.lora_B.parameters()
        )  # gathered by call alone
        if args or options or self.disable_adapters or self.merged or is_sharded:
            result: Tensor = super().forward(x, *args, **options)
            return result
        x_NI = x.flatten(0, -2)
        result = self.base_layer(x_NI)
        for name in names:
            inner: Tensor = self.lora_A[name](x_NI)
            weight: Any = self.lora_B[name].weight
            result.addmm_(inner, weight.T, alpha=self.scaling[name])
        return result.view(*x.shape[:-1], -1)
