"""A causal language model's sizes, from its config alone: no weights are read or made."""

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

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""What transformers calls them, of whatever architecture."""


PERSISTENT = 10**5
"""Elements of the largest tensor that ZeRO-3 keeps whole on every rank: DeepSpeed's default."""


class Linears(NamedTuple):
    """The linear layers of one name, added up."""

    name: str
    """As `target_modules` knows it."""
    sides: int
    """Inputs plus outputs: a low-rank update has rank times as many parameters."""
    outputs: int


@dataclass(frozen=True)
class ModelShape:
    """Counts of parameters, and sizes in elements."""

    parameters: int
    """All; an output layer that is tied to the embeddings counts once."""
    is_tied: bool
    """Whether embeddings and output layer are the same weights."""
    layers: int
    hidden: int
    intermediate: int
    """Of the MLP; of a mixture of experts, of those that a token passes through."""
    is_gated: bool
    """The MLP multiplies two projections (SwiGLU), not one."""
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    context: int
    """Tokens that prompt and response may have together."""
    linear: int
    """Parameters of the linear layers inside the backbone: those that a LoRA adapter stands beside."""
    linears: tuple[Linears, ...]
    """The same layers by their names, without those that a low-rank update leaves out."""
    experts: int
    """Parameters of a mixture's experts that one token passes through, where they are no linear layers."""
    normalized: int
    """Elements a token and layer that are normalised."""
    has_fused_norm: bool
    """LayerNorm, which keeps its input; an RMSNorm of transformers computes in fp32, and keeps that."""
    layer: int
    """Parameters of the largest decoder layer."""
    outside: int
    """Parameters outside the decoder layers: embeddings, last norm, an output layer of its own."""
    largest: int
    """Parameters of the largest weight."""
    small: int
    """Parameters of tensors with at most `PERSISTENT` elements, which ZeRO-3 does not shard."""
    full_layers: int
    """Layers whose cache holds keys and values of all tokens; others attend to a window. At least one: what
    is counted with it is the least that a row needs."""
    is_lean: bool
    """On CPUs `LeanDecoder` decodes it, from copies of bf16 weights."""
    can_pack: bool
    """Rows can be laid end to end, as far as the model's kind tells: whether one leaks into the next is only
    seen when it runs."""

    @property
    def head(self) -> int:
        """Parameters of the output layer."""
        return self.vocabulary * self.hidden

    @property
    def own_head(self) -> int:
        """Parameters of an output layer that is not the embeddings: a reward model or critic has none."""
        return 0 if self.is_tied else self.head

    def updated(self, targets: str | Sequence[str]) -> list[Linears]:
        """Those that `target_modules` names."""
        return [each for each in self.linears if targets == "all-linear" or each.name in targets]

    @property
    def kv_elements(self) -> int:
        """Keys and values of one token, over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_size


def shape_of(config: PreTrainedConfig) -> ModelShape:
    """Count from a config. Code of the model's own is not run.

    Raises:
        UnknownShapeError: it is not a transformer's config.
    """
    return counted(skeleton(config))


def counted(model: PreTrainedModel) -> ModelShape:
    """Count a model's parameters; its weights may be on the meta device.

    Raises:
        UnknownShapeError: it is no transformer.
    """
    from torch import nn

    from rlhf.generation.cpu_decoder import is_lean_kind
    from rlhf.generation.sampler import growing_cache
    from rlhf.models.packed_attention import may_pack
    from rlhf.models.peft.target_modules import backbone_of, excluded_layers

    config, text = model.config, model.config.get_text_config()
    for name in SIZES:
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
    per_token = [_normalized(name, module, heads, kv_heads) for name, module in norms.items()]
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
        linears=tuple(_added_up(name, each) for name, each in linears.items() if name not in left_out),
        experts=_experts(text, backbone),
        normalized=sum(per_token) // layers,
        has_fused_norm=any(isinstance(module, nn.LayerNorm) for module in norms.values()),
        layer=max(each_layer),
        outside=parameters - sum(each_layer),
        largest=max(each.numel() for each in model.parameters()),
        small=sum(each.numel() for each in model.parameters() if each.numel() <= PERSISTENT),
        full_layers=_full_layers(text),
        is_lean=is_lean_kind(model, growing_cache(model)),
        can_pack=may_pack(model),
    )


@cache
def shape_in(directory: Path) -> ModelShape:
    """The shape of the model in a directory. Code of the model's own is not run.

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

    found: dict[str, list[Any]] = {}
    for name, layer in backbone.named_modules():
        if type(layer).__name__ in ("Linear", "Conv1D"):
            found.setdefault(layer_name(name), []).append(layer)
    return found


def _added_up(name: str, layers: Sequence[Any]) -> Linears:
    from torch import nn

    # GPT-2's Conv1D holds its weight the other way round
    shapes = [
        layer.weight.shape if isinstance(layer, nn.Linear) else layer.weight.T.shape for layer in layers
    ]
    return Linears(name, sum(map(sum, shapes)), sum(shape[0] for shape in shapes))


def _full_layers(text: PreTrainedConfig) -> int:
    if getattr(text, "kv_lora_rank", None):
        return 1  # a latent cache (DeepSeek's MLA), which is much smaller than heads of keys and values
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * int(text.num_hidden_layers)
    return max(1, kinds.count("full_attention"))


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Norm")


def _normalized(name: str, module: nn.Module, heads: int, kv_heads: int) -> int:
    """Elements a token that pass through; a norm of queries or keys is applied to each head."""
    size = sum(each.numel() for part, each in module.named_parameters() if part == "weight")
    if name.endswith("q_norm"):
        return size * heads
    return size * kv_heads if name.endswith("k_norm") else size


def _experts(text: PreTrainedConfig, backbone: nn.Module) -> int:
    """transformers holds all experts' projections of a layer in one tensor [experts, outputs, inputs]."""
    held = [each for each in backbone.parameters() if each.dim() == 3]
    if not held or not getattr(text, "num_experts_per_tok", None):
        return 0
    return sum(each[0].numel() for each in held) * int(text.num_experts_per_tok)


def _intermediate(text: PreTrainedConfig, hidden: int) -> int:
    """Of the MLP that one token passes through; where the config is silent, four times the hidden size."""
    experts = getattr(text, "num_experts_per_tok", None)
    size = getattr(text, "moe_intermediate_size", None) if experts else None
    for name in ("intermediate_size", "ffn_dim", "n_inner"):
        size = size or getattr(text, name, None)
    if isinstance(size, list):  # of each layer (Gemma 3n): the widest, for memory is asked layer by layer
        size = max(size)
    return int(size or 4 * hidden) * int(experts or 1)
