"""Parameter-efficient tuning: put peft's tuners into a model in place, and merge them when it is published.

What is written to disk: rlhf/models/peft/saved.py.
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
from rlhf.models.on_disk import Keep
from rlhf.models.packed_attention import hidden_states
from rlhf.models.packed_batch import Packed
from rlhf.models.peft.bottleneck import KIND, BottleneckConfig, BottleneckModel
from rlhf.models.peft.config import PeftConfig
from rlhf.models.peft.methods import KINDS, PREFIX
from rlhf.models.peft.quantization import quantize
from rlhf.models.peft.target_modules import last_layers, layer_name, linears, sublayer_ends, update_targets
from rlhf.models.peft.virtual_tokens import (
    EMBEDDINGS,
    add_virtual_tokens,
    check_virtual_tokens,
    virtual_config,
    virtual_tokens,
)
from rlhf.training.engine import Gather
from rlhf.training.optimizer import round_into

TUNERS: dict[str, Callable[..., BaseTuner]] = {"LORA": LoraModel, "IA3": IA3Model, KIND: BottleneckModel}
"""peft's name of a method -> its tuner."""
FACTORS = ("lora_magnitude_vector", "ia3_l")
"""Parameters that are factors. They stay fp32 in a bf16 model, because near 1 a step of bf16 is 0.4%."""


class Adapter:
    """What `attach` put into a model. The model is used as before. Only the added parameters train, or
    (freeze) the last layers."""

    def __init__(self, model: PreTrainedModel, tuner: BaseTuner | None, config: PeftConfig | None) -> None:
        """`config` is the argument of `attach`; None for an adapter that was trained before."""
        self._model, self._tuner, self._config = model, tuner, config
        self.in_4_bits: list[str] = []
        """Linear layers that had 4-bit weights during the training, by the last part of their names."""

    @contextmanager
    def merged(self) -> Iterator[None]:
        """While open, the adapter is merged into the weights, so that sampling is as fast as with a plain
        model.

        The merged weights are copies. Adding and subtracting the adapter would change the frozen weights a
        little each time.
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
                    layer.forward = layer.get_base_layer().__call__  # peft's own way there costs time
            yield
        finally:
            for each, original in zip(frozen, originals, strict=True):
                each.data = original
            for layer in layers:
                layer._disable_adapters = False
                layer.__dict__.pop("forward", None)

    @contextmanager
    def off(self) -> Iterator[None]:
        """While open, the model is the one that it was before. Only for methods that share the weights
        (`METHODS`)."""
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

    def merge(self, keep: Keep = lambda weight: weight) -> None:
        """Merge the adapter into the weights, so that a plain model can be published.

        Only for methods that merge (`METHODS`).

        Args:
            keep: gets each weight that is made.
        """
        if self._tuner is not None:
            for layer in self._tuner.modules():
                if isinstance(layer, LoraLayer | IA3Layer):
                    assert _can_fold(layer), "an adapter on 4-bit weights would be lost: `attach_to_merge`"
                    _fold(layer, keep)
            self._tuner.unload()
            self._tuner = None

    def described(self) -> dict[str, Any] | None:
        """The content of peft's adapter_config.json; None if all weights were trained."""
        described: dict[str, Any]
        if self._tuner is not None:
            (config,) = self._tuner.peft_config.values()
            described = config.to_dict()
            return described
        virtual = virtual_tokens(self._model)
        if virtual is not None:
            described = virtual.config.to_dict()
            return described
        if self._config is not None and self._config.method == "freeze":
            return {"peft_type": "FREEZE", "layers": self._config.layers}
        return None

    def weights(self) -> dict[str, Tensor]:
        """The trained weights by their names in the published file: peft's names, or the model's own."""
        if self._tuner is not None:
            weights = get_peft_model_state_dict(self._tuner.model)
            return {PREFIX + name: each for name, each in weights.items()}
        virtual = virtual_tokens(self._model)
        if virtual is not None:
            return {EMBEDDINGS: virtual.embeddings().detach()}
        last = {id(p) for block in last_layers(self._model, self._config) for p in block.parameters()}
        return {name: p.detach() for name, p in self._model.named_parameters() if id(p) in last}


def _can_fold(module: nn.Module) -> bool:
    """Whether a layer's adapter can be merged into its weights. 4-bit weights are too coarse."""
    if not isinstance(module, LoraLayer | IA3Layer):
        return False
    weight: Any = module.get_base_layer().weight
    return bool(weight.is_floating_point())


@torch.no_grad()
def _fold(layer: Any, keep: Keep = lambda weight: weight) -> None:
    """Replace a layer's weights by copies with its adapters merged in."""
    base = layer.get_base_layer()
    if isinstance(layer, LoraLinear):
        base.weight.data = keep(_folded(layer))
        return
    dtype, parameters = base.weight.dtype, list(base.parameters())
    for each in parameters:
        each.data = each.data.float()
    layer.merge(safe_merge=not base.weight.is_meta)  # of which nothing can be asked
    layer.merged_adapters.clear()  # the caller puts the weights back, or takes the adapter out
    for each in parameters:
        each.data = keep(_rounded(each.data, dtype))


def _folded(layer: Any) -> Tensor:
    """A linear layer's weight with its low-rank updates. For DoRA with the norms that are used in
    training."""
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
    """Round as the optimizer rounds its masters. Rounding to nearest would lose an adapter that learned
    little."""
    rounded = torch.empty_like(weight, dtype=dtype)
    round_into(rounded, weight)
    return rounded


def loads_on(config: PeftConfig, compute: Compute) -> torch.device:
    """The device that a model is loaded to before `attach`. QLoRA's stays in its files, which the host maps:
    so its device only gets the weights in 4 bits."""
    return torch.device("cpu") if config.method == "qlora" else compute.loads_on


def attach(model: PreTrainedModel, config: PeftConfig, device: torch.device | None = None) -> Adapter:
    """Make the model train what config says: all parameters, an adapter on frozen ones, or the last layers.

    A published adapter that is in the model already stays there, frozen. The new one is added to it.

    Args:
        device: where QLoRA takes the model; None is where the model is. Other methods leave it there.

    Raises:
        ConfigError: the method does not know this kind of model.
    """
    if config.method == "none":
        model.requires_grad_(True)
        return Adapter(model, None, config)
    if config.method in KINDS.values():
        add_virtual_tokens(model, virtual_config(model, config))
        return Adapter(model, None, config)
    if config.method == "freeze":
        model.requires_grad_(False)
        for block in last_layers(model, config):
            block.requires_grad_(True)
        return Adapter(model, None, config)
    tuner = tuner_config(model, config)
    if config.method == "qlora":
        quantize(model, update_targets(model, config), device or model.device)
    return Adapter(model, inject(model, tuner, "default"), config)


@torch.no_grad()
def check_reached(model: PreTrainedModel) -> None:
    """Refuse adapters that no pass uses, because the model's code (for example a kernel) reads the weights
    directly. They would learn nothing, without any error.

    Raises:
        ConfigError: with the names of the layers.
    """
    if model.device.type == "cpu" and model.config._attn_implementation.startswith("flash"):
        return  # it is yet to move to a GPU
    layers: dict[str, Any] = {
        path: layer for path, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)
    }
    missed = set(map(layer_name, layers))  # by kind: a router may leave out an expert

    def noted(path: str) -> Callable[..., None]:
        return lambda *_: missed.discard(layer_name(path))

    handles = [layer.register_forward_pre_hook(noted(path)) for path, layer in layers.items()]
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
    """Refuse what `attach` would refuse. The model does not change; its weights may be on the meta device.

    Raises:
        ConfigError: the method does not know this kind of model.
    """
    if config.method in KINDS.values():
        check_virtual_tokens(model, config.method)
    elif config.method == "freeze":
        last_layers(model, config)
    elif config.method != "none":
        tuner_config(model, config)


def tuner_config(model: PreTrainedModel, config: PeftConfig) -> TunerConfig:
    """peft's config of a method that adds something to layers.

    Raises:
        ConfigError: the method does not know this kind of model.
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
        target_modules=update_targets(model, config),
        use_dora=config.method == "dora",
        fan_in_fan_out=_is_transposed(model),
    )


def _is_transposed(model: PreTrainedModel) -> bool:
    """Whether linear layers have transposed weights, as GPT-2's do."""
    return any(isinstance(layer, Conv1D) for _, layer in linears(model))


def inject(model: PreTrainedModel, config: TunerConfig, name: str) -> BaseTuner:
    """Wrap layers of the model in a tuner's layers, under an adapter name."""
    assert config.peft_type is not None
    tuner = TUNERS[config.peft_type](model, config, name)
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:  # peft makes them fp32 and converts all that passes; our masters are fp32
            parameter.data = parameter.data.to(model.dtype)
            if any(factor in path for factor in FACTORS):
                parameter.data = parameter.data.float()
    for layer in tuner.modules():
        if isinstance(layer, BaseTunerLayer):  # peft's own way would let all of them train
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
            virtual.are_left_out = True
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
        if virtual is not None:
            virtual.are_left_out = False


@torch.no_grad()
def merged_weights(
    model: nn.Module,
    gathered: Gather = lambda modules: nullcontext(),
) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a model with its name, adapters merged into copies. The model does not change.

    Args:
        gathered: as of `Access.weights`. A yielded weight is valid until the next one is asked for.

    Raises:
        ConfigError: there is an adapter that cannot be merged in this way.
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
                is_out = part == "weight" and not layer.disable_adapters  # else `merged` put it there
                yield (
                    f"{owner}.{part}",
                    _folded(layer) if is_out else layer.get_parameter(f"base_layer.{part}").detach(),
                )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trained, all) parameters."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
