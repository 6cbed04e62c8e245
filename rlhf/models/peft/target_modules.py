"""The parts of a model that a method of tuning is about, by their names or by what they are.

Complaints name the keys of `PeftConfig`; whoever knows the stage puts its name before them.
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

from rlhf.config import ConfigError
from rlhf.models.peft.bottleneck import NAMES
from rlhf.models.peft.config import PeftConfig
from rlhf.models.peft.methods import METHODS

MAMBA = ("bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "mamba", "mamba2", "nemotron_h", "zamba2")
READ_PAST: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(MAMBA, ("out_proj",)),
    **dict.fromkeys(("falcon_mamba", "mamba"), ("out_proj", "dt_proj")),
    "jamba": ("dt_proj",),
}
"""A kind of model -> its linear layers whose weight its code (of Mamba, a kernel on GPUs) reads past any
adapter on them: that would train nothing."""


def backbone_of(model: PreTrainedModel) -> nn.Module:
    """The model without its head."""
    # Llama 4's text model calls it `model`, and says that it is `language_model`
    name = model.base_model_prefix if hasattr(model, model.base_model_prefix) else "model"
    found: nn.Module = getattr(model, name)
    return found


def update_targets(model: PreTrainedModel, config: PeftConfig) -> list[str]:
    """The linear layers that a low-rank update is of, by the last part of their names.

    Raises:
        ConfigError: there is none, or none of a name.
    """
    names, left_out = _inner_linears(model), cannot_be_updated(model)
    known = [name for name in names if name not in left_out]
    if config.target_modules == "all-linear" and known:
        return known
    for name in config.target_modules:
        if name in left_out:
            raise ConfigError(
                f"target_modules={config.target_modules}: {name} of {type(model).__name__} cannot be updated "
                f"({left_out[name]}). Leave it out; all-linear takes {', '.join(known) or 'nothing'}."
            )
    unknown = [name for name in config.target_modules if name not in known]
    if config.target_modules == "all-linear" or unknown:
        # output layer and embeddings may be tied: merged, an update of one would change the other
        raise ConfigError(
            f"target_modules={config.target_modules}: "
            + (f"{', '.join(unknown)} not among the" if known else "no")
            + f" linear layers inside {type(model).__name__}"
            + (f" ({', '.join(known)})." if known else ". Use freeze, prompt, prefix or none.")
        )
    return config.target_modules


def last_layers(model: PreTrainedModel, config: PeftConfig | None) -> list[nn.Module]:
    """Those that `freeze` leaves to train; none with another method.

    Raises:
        ConfigError: there are fewer.
    """
    if config is None or config.method != "freeze":
        return []
    blocks = _layers(model)
    if len(blocks) < config.layers:
        raise ConfigError(
            f"layers={config.layers}: {type(model).__name__} has {len(blocks)} layers that could be told "
            "apart. Train fewer, or use method=none."
        )
    return blocks[-config.layers :]


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    layers: list[nn.Module] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    return layers


def sublayer_ends(model: PreTrainedModel, config: PeftConfig) -> list[str]:
    """The last linear layers of a layer's attention and feed-forward part, which get bottlenecks behind
    them, by their names in it.

    Raises:
        ConfigError: they cannot be told apart.
    """
    size, ends = model.config.get_text_config().hidden_size, []
    for name, part in (_layers(model) or [model])[0].named_children():
        names = [inner for inner, linear in linears(part) if getattr(linear, "out_features", 0) == size]
        ends += [f"{name}.{names[-1]}".rstrip(".")] if names else []
    if len(ends) != 2:
        raise ConfigError(
            f"method=adapter: attention and feed-forward of {type(model).__name__} could not be told apart "
            f"(found {', '.join(ends) or 'none'}). Use lora or dora."
        )
    return ends if config.placement == "houlsby" else ends[1:]


def cannot_be_updated(model: PreTrainedModel) -> dict[str, str]:
    """The linear layers of the backbone that no low-rank update can be of, and why; by the last part of their
    names."""
    found: dict[str, str] = {}
    for path, layer in linears(backbone_of(model)):
        name = layer_name(path)
        if name in found:
            continue
        if name in READ_PAST.get(model.config.get_text_config().model_type, ()):
            found[name] = "its weight is read past an adapter"
        elif not _is_linear(layer):
            found[name] = f"a {type(layer).__name__} gives more than a linear layer"
        elif _means_experts(model, name):
            found[name] = "peft means the experts by that"
    return found


@torch.no_grad()
def _is_linear(layer: nn.Module) -> bool:
    """Whether a layer gives what a linear one does: a router that is made of one gives more."""
    if not isinstance(layer, nn.Linear) or type(layer).forward is nn.Linear.forward:
        return True
    memo = {id(each): nn.Parameter(each.to("meta"), requires_grad=False) for each in layer.parameters()}
    try:
        found = copy.deepcopy(layer, memo)(torch.empty(1, layer.in_features, device="meta"))
    except (IndexError, RuntimeError, TypeError, ValueError):
        return False
    return isinstance(found, torch.Tensor) and found.shape == (1, layer.out_features)


def _means_experts(model: PreTrainedModel, name: str) -> bool:
    """Whether peft, reading a published adapter, would put updates of that name beside all experts' weights
    in one, as which transformers 5 holds what were linear layers in 4."""
    config = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # it wants those that are in the same weight, too
        return True
    return not config.target_modules


def in_one(model: PreTrainedModel) -> list[str]:
    """Parts of the backbone that are no linear layers but hold matrices of several, such as experts."""
    return sorted(
        {
            layer_name(path)
            for path, module in backbone_of(model).named_modules()
            if not isinstance(module, nn.modules.conv._ConvNd)
            and any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))
        }
    )


def described_targets(model: PreTrainedModel, config: PeftConfig) -> str | None:
    """What `all-linear` takes of a model, and what it leaves, in a line; None with another choice."""
    if "target_modules" not in METHODS[config.method].knobs or config.target_modules != "all-linear":
        return None
    reasons: dict[str, list[str]] = {}
    for name in in_one(model):
        reasons.setdefault("weights of three dimensions", []).append(name)
    for name, why in cannot_be_updated(model).items():
        reasons.setdefault(why, []).append(name)
    left = "; ".join(f"not {', '.join(names)} ({why})" for why, names in reasons.items())
    taken = f"{config.method} updates {', '.join(update_targets(model, config))}"
    return "; ".join([taken, *([left] if left else [])]) + "."


def _inner_linears(model: PreTrainedModel) -> list[str]:
    """Every linear layer of the backbone; not the output layer or a score head."""
    return sorted({layer_name(path) for path, _ in linears(backbone_of(model))})


def layer_name(path: str) -> str:
    """What layers of one kind have in common: the last part of their paths, with the one before it where
    that is a number (Gemma 3n's `altup_projections.0`)."""
    *_, before, last = ("", *path.split("."))
    return f"{before}.{last}" if last.isdigit() else last


def linears(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's own linear layers, by the names that they have without adapters."""
    for name, layer in module.named_modules():
        is_added = any(part in name for part in (".lora_", f".{NAMES}"))
        if isinstance(layer, nn.Linear | Conv1D) and not is_added:
            yield name.partition(".base_layer")[0], layer
