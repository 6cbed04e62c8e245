"""Decoding of a Llama-like model on a CPU, in as few torch operations as possible.

With few rows, most time goes into reading weights and starting operations. A layer of transformers starts
about 45 operations, a layer here 20: queries, keys and values are one product, and so are gate and up;
residuals are added within products; queries and keys are rotated together. Dimensions: B rows, G key/value
heads, D size of a head, H hidden size, K tokens in the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    Cache,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from rlhf.models.peft.virtual_tokens import virtual_tokens

MODEL_CLASSES = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM)
"""Classes of the models that `LeanDecoder` supports. SmolLM2 is a Llama, Qwen 2.5 is a Qwen 2."""
ATTENTION_CLASSES = (LlamaAttention, MistralAttention, Qwen2Attention)


class LeanDecoder:
    """Decodes with a model's current weights, after the model itself has read the prompts."""

    def __init__(self, model: PreTrainedModel, rows: int) -> None:
        """`is_lean` must hold for the model. `rows` is the typical number of rows of a call."""
        backbone: Any = model.model
        self._embed, self._rotary, self._norm = backbone.embed_tokens, backbone.rotary_emb, backbone.norm
        self._layers = [_Layer(layer, rows) for layer in backbone.layers]
        self._head = _product([model.lm_head], rows)

    def __call__(self, ids_B: Tensor, mask_BK: Tensor, positions_B: Tensor, cache: Cache) -> Tensor:
        """Add one token per row to the cache.

        Args:
            mask_BK: 1 where the cache has a token, including the new one.
            cache: the model's cache after the prompts.

        Returns:
            Logits [B, V] after the new token.
        """
        x_BH = self._embed(ids_B)
        cos_B1D, sin_B1D = self._rotary(x_BH, positions_B[:, None])
        sin_B1D[..., : sin_B1D.shape[-1] // 2].neg_()
        capacity, _ = cache.get_mask_sizes(1, 0)
        mask_bias_B1K = x_BH.new_full((len(ids_B), 1, capacity), float("-inf"))
        mask_bias_B1K[:, 0, : mask_BK.shape[1]].masked_fill_(mask_BK.bool(), 0.0)
        mask_bias = mask_bias_B1K.repeat_interleave(self._layers[0].groups, dim=0)
        for layer, layer_cache in zip(self._layers, cache.layers, strict=True):
            x_BH = layer(x_BH, cos_B1D, sin_B1D, mask_bias, layer_cache)
        return self._head(_normed(x_BH, self._norm))


class _Layer:
    def __init__(self, layer: Any, rows: int) -> None:
        attention = layer.self_attn
        self._qkv, self._out, self._gate_up, self._down = (_product(group, rows) for group in _linears(layer))
        self._before, self._between = layer.input_layernorm, layer.post_attention_layernorm
        self._activation, self._size, self._scale = layer.mlp.act_fn, attention.head_dim, attention.scaling
        self.groups = attention.config.num_key_value_heads
        """G, the number of key/value heads."""

    def __call__(
        self, x_BH: Tensor, cos_B1D: Tensor, sin_B1D: Tensor, mask_bias: Tensor, layer_cache: Any
    ) -> Tensor:
        """`sin_B1D` has its first half negated. `mask_bias` [B * G, 1, K] is added to scores."""
        rows, groups, size = len(x_BH), self.groups, self._size
        heads = self._qkv(_normed(x_BH, self._before)).view(rows, -1, size)
        qk, v = heads[:, :-groups], heads[:, -groups:]
        qk = torch.addcmul(qk * cos_B1D, qk.roll(size // 2, -1), sin_B1D)
        q = qk[:, :-groups].reshape(rows * groups, -1, size)
        keys, values = layer_cache.update(qk[:, -groups:, None], v[:, :, None])
        scores = torch.baddbmm(mask_bias, q, keys.flatten(0, 1).mT, alpha=self._scale)
        out = torch.bmm(scores.softmax(-1), values.flatten(0, 1))
        x_BH = self._out.plus(x_BH, out.view(rows, -1))
        gate, up = self._gate_up(_normed(x_BH, self._between)).chunk(2, dim=-1)
        return self._down.plus(x_BH, self._activation(gate).mul_(up))


def is_lean(model: PreTrainedModel, cache: Cache) -> bool:
    """Whether `LeanDecoder` computes the same as this model, adapters included.

    Args:
        cache: a new, empty cache for this model.
    """
    return model.device.type == "cpu" and virtual_tokens(model) is None and is_lean_kind(model, cache)


def is_lean_kind(model: PreTrainedModel, cache: Cache) -> bool:
    """Whether `LeanDecoder` supports this kind of model. The model may be on the meta device."""
    if not isinstance(model, MODEL_CLASSES):
        return False
    layers: list[Any] = list(model.model.layers)
    if any(getattr(layer_cache, "is_sliding", True) for layer_cache in cache.layers):
        return False
    if not all(type(layer.self_attn) in ATTENTION_CLASSES for layer in layers):
        return False
    linears = [linear for layer in layers for group in _linears(layer) for linear in group]
    return all(_plain(linear) is not None for linear in [model.lm_head, *linears])


def _linears(layer: Any) -> list[tuple[Any, ...]]:
    """The linear layers of a layer, in the order in which they run, grouped by their input."""
    attention, mlp = layer.self_attn, layer.mlp
    return [
        (attention.q_proj, attention.k_proj, attention.v_proj), (attention.o_proj,),
        (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,),
    ]  # fmt: skip


def _product(layers: Sequence[nn.Module], rows: int) -> Product:
    return Product([linear for linear in map(_plain, layers) if linear is not None], rows)


def _plain(layer: nn.Module) -> nn.Linear | None:
    """The plain linear layer that a call of this layer runs: the layer itself, or the one inside an adapter
    that is merged or turned off. None if there is no such layer."""
    if isinstance(layer, BaseTunerLayer):
        inner = layer.get_base_layer()
        if layer.__dict__.get("forward") != inner.__call__:
            return None
        layer = inner
    return layer if type(layer) is nn.Linear else None


def _normed(x: Tensor, norm: Any) -> Tensor:
    return functional.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


class Product:
    """Linear layers with the same input as one product: x [..., in] -> [..., all their outputs].

    bf16 weights on a CPU are copied into oneDNN's layout. Otherwise torch would rearrange them in every call,
    which for few rows takes longer than the product. Other weights are not copied.
    """

    def __init__(self, layers: Sequence[nn.Linear], rows: int) -> None:
        """`rows` is the typical number of rows of a call."""
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
        """other + self(x), in one operation if possible."""
        if self._packed is None:
            return self(x).add_(other)
        total: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self._packed, self._bias, "add")
        return total


def is_packable(layer: nn.Module) -> bool:
    """Whether oneDNN has its own layout for the layer's weight."""
    if type(layer) is not nn.Linear:
        return False
    is_bf16 = layer.weight.device.type == "cpu" and layer.weight.dtype == torch.bfloat16
    return is_bf16 and multiplies_bf16()


def multiplies_bf16() -> bool:
    """Whether oneDNN multiplies bf16 weights on this CPU."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
