"""The parts of a model that a tuning method changes.

Complaints name the key `STAGE.peft`; `rlhf.config.in_user_keys` replaces STAGE by the stage's name.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from rlhf.config import STAGE, Complaint, ConfigError, did_you_mean
from rlhf.models.peft.bottleneck import MODULE_PREFIX
from rlhf.models.peft.config import PeftConfig
from rlhf.models.peft.methods import METHODS

MAMBA = ("bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "mamba", "mamba2", "nemotron_h", "zamba2")
BYPASSED_LAYERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(MAMBA, ("out_proj",)),
    **dict.fromkeys(("falcon_mamba", "mamba"), ("out_proj", "dt_proj")),
    "jamba": ("dt_proj",),
}
"""Model type -> linear layers whose weights the model's code reads directly (in Mamba, a GPU kernel does). An
adapter on such a layer would learn nothing."""


def backbone_of(model: PreTrainedModel) -> nn.Module:
    """The model without its head."""
    # Llama 4's text model has it as `model`, although its base_model_prefix is `language_model`
    name = model.base_model_prefix if hasattr(model, model.base_model_prefix) else "model"
    backbone: nn.Module = getattr(model, name)
    return backbone


def low_rank_targets(model: PreTrainedModel, config: PeftConfig) -> list[str]:
    """Names of the linear layers that get a low-rank update (the last part of each path).

    Raises:
        ConfigError: the model has no such layers, or a configured name is not one of them.
    """
    names, left_out, kind = _inner_linears(model), excluded_layers(model), type(model).__name__
    known = [name for name in names if name not in left_out]
    if not known:
        raise ConfigError(
            Complaint(
                f"{STAGE}.peft={config.method}",
                f"{kind} has no linear layers inside that an adapter can update.",
                f"Use {STAGE}.peft=freeze, prompt, prefix or none.",
            )
        )
    if config.target_modules == "all-linear":
        return known
    key = f"{STAGE}.peft.target_modules=[{','.join(config.target_modules)}]"
    fix = f"Leave it out, or use {STAGE}.peft.target_modules=all-linear, which takes {', '.join(known)}."
    head = model.get_output_embeddings()
    path = next((name for name, module in model.named_modules() if head is module), "")
    output_layer = path.rpartition(".")[2]
    for name in config.target_modules:
        if name in left_out:
            raise ConfigError(Complaint(key, f"{name} of {kind} cannot be updated ({left_out[name]}).", fix))
        if name == output_layer:
            why = (
                f"{name} is the output layer of {kind}. It is computed in pieces from its weight alone, and "
                "may be tied to the embeddings, which its update would change."
            )
            raise ConfigError(Complaint(key, why, fix))
        if name not in known:
            near = did_you_mean(name, known)
            raise ConfigError(Complaint(key, f"{name} is not a linear layer inside {kind}.{near}", fix))
    return config.target_modules


def last_layers(model: PreTrainedModel, config: PeftConfig | None) -> list[nn.Module]:
    """The last layers, which `freeze` trains; empty for another method.

    Raises:
        ConfigError: the model has fewer layers than `config.layers`.
    """
    if config is None or config.method != "freeze":
        return []
    blocks = _layers(model)
    if len(blocks) < config.layers:
        other = f"{STAGE}.peft.layers={len(blocks)} or less" if blocks else f"{STAGE}.peft=lora"
        raise ConfigError(
            Complaint(
                f"{STAGE}.peft.layers={config.layers}",
                f"{type(model).__name__} has {len(blocks)} layers that can be told apart.",
                f"Use {other}, or {STAGE}.peft=none.",
            )
        )
    return blocks[-config.layers :]


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    layers: list[nn.Module] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    return layers


def sublayer_ends(model: PreTrainedModel, config: PeftConfig) -> list[str]:
    """Names, within a layer, of the last linear layer of attention and of the feed-forward part. Bottlenecks
    come after these.

    Raises:
        ConfigError: the layer does not have exactly two such parts.
    """
    size, ends = model.config.get_text_config().hidden_size, []
    for name, part in (_layers(model) or [model])[0].named_children():
        names = [inner for inner, linear in linears(part) if getattr(linear, "out_features", 0) == size]
        ends += [f"{name}.{names[-1]}".rstrip(".")] if names else []
    if len(ends) != 2:
        raise ConfigError(
            Complaint(
                f"{STAGE}.peft=adapter",
                f"attention and feed-forward of {type(model).__name__} cannot be told apart (found: "
                f"{', '.join(ends) or 'none'}).",
                f"Use {STAGE}.peft=lora or dora.",
            )
        )
    return ends if config.placement == "houlsby" else ends[1:]


def excluded_layers(model: PreTrainedModel) -> dict[str, str]:
    """Linear layers of the backbone that cannot get a low-rank update: last part of the name -> reason."""
    reasons: dict[str, str] = {}
    for path, layer in linears(backbone_of(model)):
        name = layer_name(path)
        if name in reasons:
            continue
        if name in BYPASSED_LAYERS.get(model.config.get_text_config().model_type, ()):
            reasons[name] = "its weight is read past an adapter"
        elif not _is_linear(layer):
            reasons[name] = f"a {type(layer).__name__} gives more than a linear layer"
        elif _names_experts(model, name):
            reasons[name] = "peft means the experts by that"
    return reasons


@torch.no_grad()
def _is_linear(layer: nn.Module) -> bool:
    """Whether a layer returns one tensor like a linear layer. A router derived from `nn.Linear` returns
    more."""
    if not isinstance(layer, nn.Linear) or type(layer).forward is nn.Linear.forward:
        return True
    memo = {id(each): nn.Parameter(each.to("meta"), requires_grad=False) for each in layer.parameters()}
    try:
        output = copy.deepcopy(layer, memo)(torch.empty(1, layer.in_features, device="meta"))
    except (IndexError, RuntimeError, TypeError, ValueError):
        return False
    return isinstance(output, torch.Tensor) and output.shape == (1, layer.out_features)


def _names_experts(model: PreTrainedModel, name: str) -> bool:
    """Whether peft, when it reads a published adapter, would apply updates of this name to the experts'
    weights. In transformers 4 experts were linear layers; transformers 5 has one tensor for all experts."""
    config = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # peft demands the other names in the same fused weight, too
        return True
    return not config.target_modules


def fused_weights(model: PreTrainedModel) -> list[str]:
    """Names of the backbone's modules that hold several matrices in one 3-D weight, such as experts."""
    return sorted(
        {
            layer_name(path)
            for path, module in backbone_of(model).named_modules()
            if not isinstance(module, nn.modules.conv._ConvNd)
            and any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))
        }
    )


def targets_summary(model: PreTrainedModel, config: PeftConfig) -> str | None:
    """One line for the user: which layers `all-linear` updates, and which it leaves out. None if the config
    names the layers, or if the method has no target modules."""
    if "target_modules" not in METHODS[config.method].knobs or config.target_modules != "all-linear":
        return None
    reasons: dict[str, list[str]] = {}
    for name in fused_weights(model):
        reasons.setdefault("weights of three dimensions", []).append(name)
    for name, why in excluded_layers(model).items():
        reasons.setdefault(why, []).append(name)
    left = "; ".join(f"not {', '.join(names)} ({why})" for why, names in reasons.items())
    taken = f"{config.method} updates {', '.join(low_rank_targets(model, config))}"
    return "; ".join([taken, *([left] if left else [])]) + "."


def _inner_linears(model: PreTrainedModel) -> list[str]:
    """Names of the backbone's linear layers, without the output layer or a score head."""
    return sorted({layer_name(path) for path, _ in linears(backbone_of(model))})


def layer_name(path: str) -> str:
    """The name that layers of one kind share: the last part of the path. If that is a number, also the part
    before it (Gemma 3n's `altup_projections.0`)."""
    *_, before, last = ("", *path.split("."))
    return f"{before}.{last}" if last.isdigit() else last


def linears(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's own linear layers with their paths, as they are without adapters."""
    for name, layer in module.named_modules():
        is_added = any(part in name for part in (".lora_", f".{MODULE_PREFIX}"))
        if isinstance(layer, nn.Linear | Conv1D) and not is_added:
            yield name.partition(".base_layer")[0], layer
