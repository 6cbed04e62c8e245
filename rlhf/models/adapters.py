"""Parameter-efficient tuning: peft's tuners put into a model in place, and merged when it is published."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, LoraModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.config import ConfigError, PeftConfig
from rlhf.models.load import BaseModelFiles, load_causal_lm
from rlhf.training import load_trainable


class Adapter:
    """What `attach` put into a model. Afterwards the model is used as before; only the adapter trains."""

    def __init__(self, tuner: LoraModel | None) -> None:
        self._tuner = tuner

    @contextmanager
    def folded_in(self) -> Iterator[None]:
        """While open, the model runs on weights that hold the adapter, as fast as a plain one: for sampling.

        They are copies: adding and subtracting the adapter would change the frozen ones a little each time.
        """
        modules: list[Any] = [] if self._tuner is None else list(self._tuner.modules())
        layers: list[Any] = [module for module in modules if isinstance(module, LoraLayer)]
        frozen = [layer.get_base_layer().weight for layer in layers]
        originals = [weight.data for weight in frozen]
        try:
            with torch.no_grad():
                for layer, weight in zip(layers, frozen, strict=True):
                    weight.data = weight.data + layer.get_delta_weight("default")
                    layer._disable_adapters = True
                    layer.forward = layer.get_base_layer().__call__  # peft's own way there costs time
            yield
        finally:
            for layer, weight, original in zip(layers, frozen, originals, strict=True):
                weight.data = original
                layer._disable_adapters = False
                layer.__dict__.pop("forward", None)

    def merge(self) -> None:
        """Fold the adapter into the weights, so that the model publishes as a plain one."""
        if self._tuner is not None:
            self._tuner.merge_and_unload()
            self._tuner = None


def attach(model: PreTrainedModel, config: PeftConfig) -> Adapter:
    """Make model train what config says: all parameters, or an adapter beside frozen ones."""
    if config.method == "none":
        model.requires_grad_(True)
        return Adapter(None)
    targets = _inner_linears(model) if config.target_modules == "all-linear" else config.target_modules
    lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets)
    tuner = LoraModel(model, lora, "default")
    for parameter in model.parameters():
        if parameter.requires_grad:  # peft makes them fp32 and converts all that passes; our masters are fp32
            parameter.data = parameter.data.to(model.dtype)
    return Adapter(tuner)


def merged(
    base: BaseModelFiles, directory: Path, config: PeftConfig, weights: dict[str, Tensor]
) -> PreTrainedModel:
    """A plain causal model with trained weights, on the CPU: the one in `directory`, its adapter folded in.

    Args:
        weights: what `Engine.trainable_state` gathered of a model that `attach` had prepared in the same way.
    """
    dtype = next(iter(weights.values())).dtype
    model = load_causal_lm(directory, base.config, dtype)
    adapter = attach(model, config)
    load_trainable(model, weights)
    adapter.merge()
    return model


@torch.no_grad()
def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a model, as it is called and as it would be without adapters: theirs are folded into
    copies, the model stays as it is.

    Raises:
        ConfigError: an adapter of a kind that cannot be folded in this way.
    """
    adapted: dict[str, Any] = {}
    own: set[str] = set()
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            if not isinstance(layer, LoraLinear):
                kind = type(layer).__name__
                raise ConfigError(f"{name}: an adapter of {kind} cannot be folded into a weight for vLLM.")
            adapted[name] = layer
            own |= {f"{name}.{each}" for each, _ in layer.named_parameters() if "base_layer" not in each}
    for name, parameter in model.named_parameters():
        owner, adapts, part = name.partition(".base_layer.")
        if not adapts and name not in own:
            yield name, parameter.detach()
        elif adapts:
            yield f"{owner}.{part}", _folded(adapted[owner]) if part == "weight" else parameter.detach()


def _folded(layer: Any) -> Tensor:
    """An adapted linear layer's weight with its update, rounded once."""
    weight: Tensor = layer.get_base_layer().weight.detach()
    if layer.disable_adapters:  # it is in there: `Adapter.folded_in`
        return weight
    total = weight.float()
    for adapter in layer.active_adapters:
        update = layer.lora_B[adapter].weight.float() @ layer.lora_A[adapter].weight.float()
        total = total + layer.scaling[adapter] * (update.T if layer.fan_in_fan_out else update)
    return total.to(weight.dtype)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trained, all) parameters."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def _inner_linears(model: PreTrainedModel) -> list[str]:
    """Every linear layer of the backbone; neither the output layer nor a score head."""
    backbone = getattr(model, model.base_model_prefix)
    names = {
        name.rpartition(".")[2] for name, layer in backbone.named_modules() if isinstance(layer, nn.Linear)
    }
    return sorted(names)
