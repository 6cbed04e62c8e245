"""The parts of a model that a method of tuning is about, by their names or by what they are.

Complaints name the keys of `PeftConfig`; whoever knows the stage puts its name before them.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from rlhf.config import ConfigError, PeftConfig
from rlhf.models.bottleneck import NAMES

MAMBA = ("bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "mamba", "mamba2", "nemotron_h", "zamba2")
READ_PAST = {**dict.fromkeys(MAMBA, "out_proj"), "jamba": "dt_proj"}
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
    known = _inner_linears(model)
    if config.target_modules == "all-linear" and known:
        return known
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


def _inner_linears(model: PreTrainedModel) -> list[str]:
    """Every linear layer of the backbone that an adapter can stand beside; not the output layer or a score
    head."""
    names = {layer_name(path) for path, _ in linears(backbone_of(model))}
    return sorted(names - {READ_PAST.get(model.config.get_text_config().model_type)})


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
