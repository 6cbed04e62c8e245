"""Parameter-efficient tuning: attach peft's tuners to a model in place, and merge them when it is published.

rlhf/models/peft/saved.py has the files on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import IA3Config, IA3Model, LoraConfig, LoraModel, get_peft_model_state_dict
from peft import PeftConfig as TunerConfig
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as IA3_MODULES
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf.config import STAGE, Complaint, ConfigError
from rlhf.distributed.compute import Compute
from rlhf.models.on_disk import MapWeight
from rlhf.models.packed_attention import hidden_states
from rlhf.models.packed_batch import Packed
from rlhf.models.peft.bottleneck import PEFT_TYPE, BottleneckConfig, BottleneckModel
from rlhf.models.peft.config import PeftConfig
from rlhf.models.peft.methods import PREFIX, VIRTUAL_TOKEN_METHODS
from rlhf.models.peft.quantization import quantize
from rlhf.models.peft.target_modules import last_layers, layer_name, linears, low_rank_targets, sublayer_ends
from rlhf.models.peft.virtual_tokens import (
    EMBEDDINGS,
    add_virtual_tokens,
    check_virtual_tokens,
    virtual_config,
    virtual_tokens,
)
from rlhf.training.engine import Gather
from rlhf.training.optimizer import round_into

TUNERS: dict[str, Callable[..., BaseTuner]] = {"LORA": LoraModel, "IA3": IA3Model, PEFT_TYPE: BottleneckModel}
"""peft's name of a method -> class of its tuner."""
FACTORS = ("lora_magnitude_vector", "ia3_l")
"""Parameters that are factors, by parts of their names. They stay fp32 in a bf16 model, because near 1 a step
of bf16 is 0.4%."""


class Adapter:
    """The trainable part that `attach` added to a model. The model is used as before. Only the added
    parameters train, or (freeze) the last layers."""

    def __init__(self, model: PreTrainedModel, tuner: BaseTuner | None, config: PeftConfig | None) -> None:
        """`config` is the argument of `attach`; None for an adapter that is already trained."""
        self._model, self._tuner, self._config = model, tuner, config
        self.in_4_bits: list[str] = []
        """Linear layers with 4-bit weights in training, by the last part of their names."""

    @contextmanager
    def merged(self) -> Iterator[None]:
        """While open, the adapter is merged into the weights, so that sampling is as fast as with a plain
        model.

        The merged weights are copies: adding the adapter and subtracting it again would change the frozen
        weights a little each time.
        """
        modules: list[Any] = [] if self._tuner is None else list(self._tuner.modules())
        layers: list[Any] = [module for module in modules if _can_fold(module)]
        frozen = [each for layer in layers for each in layer.get_base_layer().parameters()]
        originals = [each.data for each in frozen]
        try:
            with torch.no_grad():
                for layer in layers:
                    _fold(layer)
                    layer._disable_adapters = True
                    layer.forward = layer.get_base_layer().__call__  # peft's own path is slower
            yield
        finally:
            for each, original in zip(frozen, originals, strict=True):
                each.data = original
            for layer in layers:
                layer._disable_adapters = False
                layer.__dict__.pop("forward", None)

    @contextmanager
    def off(self) -> Iterator[None]:
        """While open, the model runs without the adapter. Only for methods that can share a backbone
        (`Method.shares`)."""
        modules = () if self._tuner is None else self._tuner.modules()
        layers: list[Any] = [module for module in modules if isinstance(module, LoraLayer)]
        assert layers, "nothing to turn off"
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in layers:
                layer._disable_adapters = False

    def merge(self, map_weight: MapWeight = lambda weight: weight) -> None:
        """Merge the adapter into the weights, so that a plain model can be published.

        Only for methods that can be merged (`Method.merges`).

        Args:
            map_weight: called with each new weight; its result goes into the model.
        """
        if self._tuner is not None:
            for layer in self._tuner.modules():
                if isinstance(layer, LoraLayer | IA3Layer):
                    assert _can_fold(layer), "an adapter on 4-bit weights would be lost: `attach_to_merge`"
                    _fold(layer, map_weight)
            self._tuner.unload()
            self._tuner = None

    def saved_config(self) -> dict[str, Any] | None:
        """The content of peft's adapter_config.json; None if all weights were trained."""
        content: dict[str, Any]
        if self._tuner is not None:
            (config,) = self._tuner.peft_config.values()
            content = config.to_dict()
            return content
        virtual = virtual_tokens(self._model)
        if virtual is not None:
            content = virtual.config.to_dict()
            return content
        if self._config is not None and self._config.method == "freeze":
            return {"peft_type": "FREEZE", "layers": self._config.layers}
        return None

    def weights(self) -> dict[str, Tensor]:
        """Trained weights by their names in the published file: peft's names, or (freeze) the model's own."""
        if self._tuner is not None:
            weights = get_peft_model_state_dict(self._tuner.model)
            return {PREFIX + name: each for name, each in weights.items()}
        virtual = virtual_tokens(self._model)
        if virtual is not None:
            return {EMBEDDINGS: virtual.embeddings().detach()}
        last = {id(p) for block in last_layers(self._model, self._config) for p in block.parameters()}
        return {name: p.detach() for name, p in self._model.named_parameters() if id(p) in last}


def _can_fold(module: nn.Module) -> bool:
    """Whether a layer's adapter can be merged into its weights. It cannot if these have 4 bits: they are too
    coarse."""
    if not isinstance(module, LoraLayer | IA3Layer):
        return False
    weight: Any = module.get_base_layer().weight
    return bool(weight.is_floating_point())


@torch.no_grad()
def _fold(layer: Any, map_weight: MapWeight = lambda weight: weight) -> None:
    """Replace a layer's weights by copies that have its adapters merged in."""
    base = layer.get_base_layer()
    if isinstance(layer, LoraLinear):
        base.weight.data = map_weight(_folded(layer))
        return
    dtype, parameters = base.weight.dtype, list(base.parameters())
    for each in parameters:
        each.data = each.data.float()
    layer.merge(safe_merge=not base.weight.is_meta)  # a meta tensor has no values to check
    layer.merged_adapters.clear()  # the caller restores the weights, or removes the adapter
    for each in parameters:
        each.data = map_weight(_rounded(each.data, dtype))


def _folded(layer: Any) -> Tensor:
    """A linear layer's weight with its low-rank updates. DoRA uses the same norms as in training."""
    weight = layer.get_base_layer().weight
    total = weight.detach().float()
    for name in layer.active_adapters:
        a = layer.lora_A[name].weight.detach()
        b = layer.lora_B[name].weight.detach()
        left, right = (a.T, b.T) if layer.fan_in_fan_out else (b, a)
        total = torch.addmm(total, left.float(), right.float(), alpha=layer.scaling[name])
        if name in layer.lora_variant:
            magnitude = layer.lora_magnitude_vector[name]
            norms = magnitude.get_weight_norm(weight.detach(), b @ a, layer.scaling[name])
            factors = (magnitude.weight.detach() / norms).float()
            total *= factors if layer.fan_in_fan_out else factors[:, None]
    return _rounded(total, weight.dtype)


def _rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Round as the optimizer rounds its fp32 masters. Rounding to nearest would lose small updates."""
    rounded = torch.empty_like(weight, dtype=dtype)
    round_into(rounded, weight)
    return rounded


def loads_on(config: PeftConfig, compute: Compute) -> torch.device:
    """The device to load a model to before `attach`. For QLoRA it is the CPU, which maps the files, so that
    the GPU only gets the 4-bit weights."""
    return torch.device("cpu") if config.method == "qlora" else compute.loads_on


def attach(model: PreTrainedModel, config: PeftConfig, device: torch.device | None = None) -> Adapter:
    """Prepare the model for training by `config`: all parameters, an adapter on frozen weights, or the last
    layers.

    A published adapter that is already in the model stays there, frozen. The new adapter is added to it.

    Args:
        device: the device to which QLoRA moves the model; None leaves it in place, as other methods do.

    Raises:
        ConfigError: the method does not support this kind of model.
    """
    if config.method == "none":
        model.requires_grad_(True)
        return Adapter(model, None, config)
    if config.method in VIRTUAL_TOKEN_METHODS.values():
        add_virtual_tokens(model, virtual_config(model, config))
        return Adapter(model, None, config)
    if config.method == "freeze":
        model.requires_grad_(False)
        for block in last_layers(model, config):
            block.requires_grad_(True)
        return Adapter(model, None, config)
    tuner = tuner_config(model, config)
    if config.method == "qlora":
        quantize(model, low_rank_targets(model, config), device or model.device)
    return Adapter(model, inject(model, tuner, "default"), config)


@torch.no_grad()
def check_adapters_used(model: PreTrainedModel) -> None:
    """Refuse adapters that a forward pass does not use, because the model's code (for example a kernel) reads
    the weights directly. They would learn nothing, without any error.

    Raises:
        ConfigError: an adapter is not used; the message names the layers.
    """
    if model.device.type == "cpu" and model.config._attn_implementation.startswith("flash"):
        return  # the model moves to a GPU later
    layers: dict[str, Any] = {
        path: layer for path, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)
    }
    missed = set(map(layer_name, layers))  # by kind of layer, because a router may skip an expert

    def hook_for(path: str) -> Callable[..., None]:
        return lambda *_: missed.discard(layer_name(path))

    handles = [layer.register_forward_pre_hook(hook_for(path)) for path, layer in layers.items()]
    try:
        if layers:
            hidden_states(model, Packed([torch.arange(8)], model.device))
    finally:
        for handle in handles:
            handle.remove()
    if missed:
        raise ConfigError(
            Complaint(
                f"{STAGE}.peft",
                f"{type(model).__name__} would not use an adapter of {', '.join(sorted(missed))}, so it "
                "would learn nothing.",
                f"Name only other layers in {STAGE}.peft.target_modules, or use {STAGE}.peft=freeze or none.",
            )
        )


def check_attachable(model: PreTrainedModel, config: PeftConfig) -> None:
    """Refuse any model that `attach` would refuse. The model does not change; it may be on the meta device.

    Raises:
        ConfigError: the method does not support this kind of model.
    """
    if config.method in VIRTUAL_TOKEN_METHODS.values():
        check_virtual_tokens(model, config.method)
    elif config.method == "freeze":
        last_layers(model, config)
    elif config.method != "none":
        tuner_config(model, config)


def tuner_config(model: PreTrainedModel, config: PeftConfig) -> TunerConfig:
    """peft's config for a method that adds parameters to layers.

    Raises:
        ConfigError: the method does not support this kind of model.
    """
    if config.method == "ia3":
        kind = model.config.get_text_config().model_type
        if kind not in IA3_MODULES:
            why = f"peft does not know which layers of a {kind} model to scale."
            raise ConfigError(Complaint(f"{STAGE}.peft=ia3", why, f"Use {STAGE}.peft=lora or dora."))
        return IA3Config(fan_in_fan_out=_is_transposed(model))
    if config.method == "adapter":
        return BottleneckConfig(size=config.size, target_modules=sublayer_ends(model, config))
    if config.method == "qlora" and _is_transposed(model):
        why = f"bitsandbytes cannot hold the weights of {type(model).__name__} in 4 bits."
        raise ConfigError(Complaint(f"{STAGE}.peft=qlora", why, f"Use {STAGE}.peft=lora."))
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=low_rank_targets(model, config),
        use_dora=config.method == "dora",
        fan_in_fan_out=_is_transposed(model),
    )


def _is_transposed(model: PreTrainedModel) -> bool:
    """Whether linear layers have transposed weights, as GPT-2's do."""
    return any(isinstance(layer, Conv1D) for _, layer in linears(model))


def inject(model: PreTrainedModel, config: TunerConfig, name: str) -> BaseTuner:
    """Wrap layers of the model in a tuner's layers. `name` is the adapter's name in peft."""
    assert config.peft_type is not None
    tuner = TUNERS[config.peft_type](model, config, name)
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:  # peft makes them fp32 and casts inputs; our optimizer has fp32 masters
            parameter.data = parameter.data.to(model.dtype)
            if any(factor in path for factor in FACTORS):
                parameter.data = parameter.data.float()
    for layer in tuner.modules():
        if isinstance(layer, BaseTunerLayer):  # peft's `set_adapter` would also make all of them trainable
            layer._active_adapter = list(getattr(layer, layer.adapter_layer_names[0]))
    return tuner


def has_adapters(model: nn.Module) -> bool:
    """Whether the model has adapters or virtual tokens."""
    return virtual_tokens(model) is not None or any(isinstance(m, BaseTunerLayer) for m in model.modules())


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """While open, the model runs without its adapters and virtual tokens."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    virtual = virtual_tokens(model)
    try:
        for layer in layers:
            layer.forward = layer.get_base_layer().__call__
        if virtual is not None:
            virtual.is_disabled = True
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
        if virtual is not None:
            virtual.is_disabled = False


@torch.no_grad()
def merged_weights(
    model: nn.Module,
    gathered: Gather = lambda modules: nullcontext(),
) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a model with its name, with adapters merged into copies. The model does not change.

    Args:
        gathered: as of `Access.weights`. A yielded weight is valid until the next iteration.

    Raises:
        ConfigError: an adapter cannot be merged in this way.
    """
    if virtual_tokens(model) is not None:
        raise ConfigError(
            "generation=vllm: virtual tokens are not weights of the model, so vLLM cannot use them. "
            "Use generation=local."
        )
    adapted: dict[str, Any] = {}
    own: set[str] = set()
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            if not isinstance(layer, LoraLinear) or layer.lora_variant:
                kind = "DoRA" if isinstance(layer, LoraLinear) else type(layer).__name__
                raise ConfigError(
                    f"generation=vllm: {name}: an adapter of {kind} cannot be merged into a weight for vLLM. "
                    "Use generation=local."
                )
            adapted[name] = layer
            own |= {f"{name}.{each}" for each, _ in layer.named_parameters() if "base_layer" not in each}
    for name in [name for name, _ in model.named_parameters()]:
        owner, adapts, part = name.partition(".base_layer.")
        if not adapts and name not in own:
            path, _, part = name.rpartition(".")
            with gathered([model.get_submodule(path)]):
                yield name, model.get_parameter(name).detach()
        elif adapts:
            layer = adapted[owner]
            with gathered([*layer.modules()]):
                is_unmerged = part == "weight" and not layer.disable_adapters  # else `merged` merged it
                yield (
                    f"{owner}.{part}",
                    _folded(layer) if is_unmerged else layer.get_parameter(f"base_layer.{part}").detach(),
                )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all): numbers of parameters."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
