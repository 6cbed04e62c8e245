"""A causal language model's sizes, from its config alone. No weights are read or created."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf.models.base import UnknownShapeError, context_length, skeleton

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

SIZE_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""Required config keys, which transformers uses for every architecture."""
MAX_PERSISTENT_ELEMENTS = 10**5
"""Most elements of a tensor that ZeRO-3 does not shard: DeepSpeed's default."""


class Linears(NamedTuple):
    """Totals over all linear layers of one name."""

    name: str
    """Layer name as in `target_modules`."""
    sides: int
    """Inputs plus outputs; times the rank, this is the parameters of a low-rank update."""
    outputs: int
    """Output features."""


@dataclass(frozen=True)
class ModelShape:
    """Parameter counts of a model, and sizes in elements."""

    parameters: int
    """All parameters; tied embeddings and output layer count once."""
    is_tied: bool
    """Whether embeddings and output layer are the same weights."""
    layers: int
    hidden: int
    intermediate: int
    """Width of the MLP; in a mixture of experts, summed over the experts that a token uses."""
    is_gated: bool
    """Whether the MLP multiplies two projections (SwiGLU)."""
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    context: int
    """Context length: most tokens of prompt and response together."""
    linear: int
    """Parameters of the backbone's linear layers, to which LoRA adds its adapters."""
    linears: tuple[Linears, ...]
    """The same layers by name, without those that a low-rank update excludes."""
    experts: int
    """Parameters of the experts that one token uses, if experts are not linear layers; else 0."""
    norm_elements: int
    """Elements per token and layer that pass through norms."""
    has_fused_norm: bool
    """Whether norms are LayerNorm, of which autograd keeps the input. transformers' RMSNorm
    computes in fp32, and autograd keeps fp32 tensors."""
    layer: int
    """Parameters of the largest decoder layer."""
    outside: int
    """Parameters outside the decoder layers: embeddings, last norm, an untied output layer."""
    largest: int
    """Parameters of the largest weight."""
    small: int
    """Parameters of tensors of at most `MAX_PERSISTENT_ELEMENTS`, which ZeRO-3 does not shard."""
    full_layers: int
    """Layers whose cache holds keys and values of all tokens; other layers attend to a window. At least 1, so
    that the cache of a row, a lower bound, is not 0."""
    is_lean: bool
    """Whether `LeanDecoder` decodes it on CPUs, from copies of bf16 weights."""
    can_pack: bool
    """Whether rows can be packed, judged by the model's class. Only a run shows whether one row leaks into
    the next."""

    @property
    def head(self) -> int:
        """Parameters of the output layer."""
        return self.vocabulary * self.hidden

    @property
    def own_head(self) -> int:
        """Parameters of an untied output layer, which a reward model or critic lacks; 0 if tied."""
        return 0 if self.is_tied else self.head

    def target_linears(self, targets: str | Sequence[str]) -> list[Linears]:
        """The linear layers that `target_modules` names."""
        return [each for each in self.linears if targets == "all-linear" or each.name in targets]

    @property
    def kv_elements(self) -> int:
        """Elements of one token's keys and values, over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_size


def shape_of(config: PreTrainedConfig) -> ModelShape:
    """The shape of the model of a config. The model's own code is not run.

    Raises:
        UnknownShapeError: it is not a transformer's config.
    """
    return shape_of_model(skeleton(config))


def shape_of_model(model: PreTrainedModel) -> ModelShape:
    """The shape of a model, whose weights may be on the meta device.

    Raises:
        UnknownShapeError: it is not a transformer.
    """
    from torch import nn

    from rlhf.generation.cpu_decoder import is_lean_kind
    from rlhf.generation.sampler import growing_cache
    from rlhf.models.packed_attention import may_pack
    from rlhf.models.peft.target_modules import backbone_of, excluded_layers

    config, text = model.config, model.config.get_text_config()
    for name in SIZE_KEYS:
        if getattr(text, name, None) is None:
            raise UnknownShapeError(f"{type(config).__name__} names no {name}")
        if int(getattr(text, name)) < 1:
            raise UnknownShapeError(f"{type(config).__name__} has {name}={getattr(text, name)}")
    backbone = backbone_of(model)
    linears, left_out = _linears(backbone), excluded_layers(model)
    heads = int(text.num_attention_heads)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    hidden, layers = int(text.hidden_size), int(text.num_hidden_layers)
    head_size = int(getattr(text, "head_dim", None) or hidden // heads)
    norms = {name: module for name, module in backbone.named_modules() if _is_norm(module)}
    each_layer = [
        sum(parameter.numel() for parameter in module.parameters())
        for module in backbone.modules()
        if type(module).__name__ in set(model._no_split_modules or ())
    ] or [sum(parameter.numel() for parameter in backbone.parameters()) // layers] * layers
    parameters = sum(parameter.numel() for parameter in model.parameters())
    per_token = [_norm_elements(name, module, heads, kv_heads) for name, module in norms.items()]
    return ModelShape(
        parameters=parameters,
        is_tied=model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        layers=layers,
        hidden=hidden,
        intermediate=_intermediate(text, hidden),
        is_gated=any("gate" in name for name, _ in backbone.named_modules()),
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        vocabulary=int(text.vocab_size),
        context=context_length(config),
        linear=sum(layer.weight.numel() for layers in linears.values() for layer in layers),
        linears=tuple(_sum_linears(name, each) for name, each in linears.items() if name not in left_out),
        experts=_experts(text, backbone),
        norm_elements=sum(per_token) // layers,
        has_fused_norm=any(isinstance(module, nn.LayerNorm) for module in norms.values()),
        layer=max(each_layer),
        outside=parameters - sum(each_layer),
        largest=max(each.numel() for each in model.parameters()),
        small=sum(each.numel() for each in model.parameters() if each.numel() <= MAX_PERSISTENT_ELEMENTS),
        full_layers=_full_layers(text),
        is_lean=is_lean_kind(model, growing_cache(model)),
        can_pack=may_pack(model),
    )


@cache
def shape_in(directory: Path) -> ModelShape:
    """The shape of the model in a directory. The model's own code is not run.

    Raises:
        UnknownShapeError: the config cannot be read, or the formulas do not hold for it.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UnknownShapeError(f"{directory}: {str(error).splitlines()[0]}") from None
    return shape_of(config)


def _linears(backbone: nn.Module) -> dict[str, list[Any]]:
    from rlhf.models.peft.target_modules import layer_name

    linears: dict[str, list[Any]] = {}
    for name, layer in backbone.named_modules():
        if type(layer).__name__ in ("Linear", "Conv1D"):
            linears.setdefault(layer_name(name), []).append(layer)
    return linears


def _sum_linears(name: str, layers: Sequence[Any]) -> Linears:
    from torch import nn

    # GPT-2's Conv1D stores its weight transposed
    shapes = [
        layer.weight.shape if isinstance(layer, nn.Linear) else layer.weight.T.shape for layer in layers
    ]
    return Linears(name, sum(map(sum, shapes)), sum(shape[0] for shape in shapes))


def _full_layers(text: PreTrainedConfig) -> int:
    if getattr(text, "kv_lora_rank", None):
        return 1  # a latent cache (DeepSeek's MLA) is much smaller than keys and values of all heads
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * int(text.num_hidden_layers)
    return max(1, kinds.count("full_attention"))


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Norm")


def _norm_elements(name: str, module: nn.Module, heads: int, kv_heads: int) -> int:
    """Elements per token that pass through a norm; a norm of queries or keys applies to each head."""
    size = sum(each.numel() for part, each in module.named_parameters() if part == "weight")
    if name.endswith("q_norm"):
        return size * heads
    return size * kv_heads if name.endswith("k_norm") else size


def _experts(text: PreTrainedConfig, backbone: nn.Module) -> int:
    """Expert parameters that one token uses. transformers stacks a layer's: [experts, outputs, inputs]."""
    stacked = [each for each in backbone.parameters() if each.dim() == 3]
    if not stacked or not getattr(text, "num_experts_per_tok", None):
        return 0
    return sum(each[0].numel() for each in stacked) * int(text.num_experts_per_tok)


def _intermediate(text: PreTrainedConfig, hidden: int) -> int:
    """MLP width that one token uses; four times the hidden size if the config does not tell."""
    experts = getattr(text, "num_experts_per_tok", None)
    size = getattr(text, "moe_intermediate_size", None) if experts else None
    for name in ("intermediate_size", "ffn_dim", "n_inner"):
        size = size or getattr(text, name, None)
    if isinstance(size, list):  # one per layer (Gemma 3n): the widest, because memory is counted per layer
        size = max(size)
    return int(size or 4 * hidden) * int(experts or 1)
