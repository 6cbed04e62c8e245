"""Parameter-efficient tuning: peft's tuners put into a model in place, and merged when it is published."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, LoraModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.config import ConfigError, PeftConfig
from rlhf.models.load import BaseModelFiles, load_causal_lm
from rlhf.training import load_trainable

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
"""peft's names of an adapter's files, and of what stands before its weights' names in them."""
HEAD = f"{PREFIX}score.weight"


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
                    for name in layer.active_adapters:
                        weight.data = weight.data + layer.get_delta_weight(name)
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

    def save(self, directory: Path, head: Tensor, base: str) -> None:
        """Write it as peft does for a sequence-classification model; without an adapter, nothing.

        Args:
            head: the score head [1, H] that was trained with it.
            base: `weights_digest` of the model that it was trained on. peft's name for it is `revision`.
        """
        if self._tuner is None:
            return
        (config,) = self._tuner.peft_config.values()
        told = config.to_dict() | {"task_type": "SEQ_CLS", "modules_to_save": ["score"], "revision": base}
        weights = get_peft_model_state_dict(self._tuner.model)
        directory.mkdir()
        (directory / CONFIG).write_text(json.dumps(told, default=sorted, indent=2, sort_keys=True))
        save_file({HEAD: head.detach(), **{PREFIX + name: each for name, each in weights.items()}},
                  directory / WEIGHTS)  # fmt: skip


def attach(model: PreTrainedModel, config: PeftConfig) -> Adapter:
    """Make model train what config says: all parameters, or an adapter beside frozen ones.

    A published adapter that is in there already stays, frozen; the new one adds to it.
    """
    if config.method == "none":
        model.requires_grad_(True)
        return Adapter(None)
    targets = _inner_linears(model) if config.target_modules == "all-linear" else config.target_modules
    lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets)
    return Adapter(_inject(model, lora, "default"))


def published_base(directory: Path) -> str | None:
    """The `base` of the adapter that was saved in directory; None without one."""
    path = directory / CONFIG
    return json.loads(path.read_bytes())["revision"] if path.exists() else None


def attach_published(model: PreTrainedModel, directory: Path) -> tuple[Adapter, Tensor]:
    """Put a saved adapter into the model that it was trained on, all frozen; the score head saved with it."""
    config = LoraConfig.from_pretrained(str(directory))
    config.modules_to_save = None  # the head
    weights = load_file(directory / WEIGHTS)
    head = weights.pop(HEAD)
    with torch.random.fork_rng(devices=[]):  # what peft draws is overwritten
        tuner = _inject(model, config, "published")
    weights = {name.removeprefix(PREFIX): weight for name, weight in weights.items()}
    assert weights.keys() == get_peft_model_state_dict(model, adapter_name="published").keys()
    set_peft_model_state_dict(model, weights, adapter_name="published")
    del model.peft_config  # seeing it, peft would warn of the adapter that `attach` adds
    model.requires_grad_(False)
    return Adapter(tuner), head


def _inject(model: PreTrainedModel, config: LoraConfig, name: str) -> LoraModel:
    tuner = LoraModel(model, config, name)
    for parameter in model.parameters():
        if parameter.requires_grad:  # peft makes them fp32 and converts all that passes; our masters are fp32
            parameter.data = parameter.data.to(model.dtype)
    for layer in tuner.modules():
        if isinstance(layer, LoraLayer):
            layer._active_adapter = list(layer.r)  # peft's own way would let all of them train
    return tuner


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
    names = (name for name, layer in backbone.named_modules() if isinstance(layer, nn.Linear))
    adapted = (name.partition(".lora_")[0].removesuffix(".base_layer") for name in names)
    return sorted({name.rpartition(".")[2] for name in adapted})
