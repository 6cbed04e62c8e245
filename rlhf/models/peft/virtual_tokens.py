"""Virtual tokens before every row, for prefix, prompt and P-tuning, with peft's encoders.

In each layer, virtual tokens are keys and values before those of a row. Prefix tuning (Li and Liang 2021,
arXiv:2101.00190) learns these keys and values. In prompt tuning (Lester et al. 2021, arXiv:2104.08691) and
P-tuning (Liu et al. 2021, arXiv:2103.10385) the model computes them from learned embeddings. They do not
depend on the rows, so they are computed once for all rows of a pass. The rows are padded, with one sequence
per row: if they were laid end to end, only the first would see the virtual tokens.
Dimensions: B rows, N virtual tokens, A key/value heads, D size of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import (
    PrefixEncoder,
    PrefixTuningConfig,
    PromptEmbedding,
    PromptEncoder,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from peft.config import PromptLearningConfig
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from rlhf.config import STAGE, Complaint, ConfigError
from rlhf.models.base import ATTENTION
from rlhf.models.peft.config import PeftConfig
from rlhf.models.peft.methods import VIRTUAL_TOKEN_METHODS
from rlhf.models.peft.target_modules import backbone_of

EMBEDDINGS = "prompt_embeddings"
"""peft's name of the published tensor: [N, layers * 2 * A * D] for prefix tuning, otherwise [N, hidden
size]."""


class VirtualTokens(nn.Module):
    """Learned tokens that a model puts before every row."""

    def __init__(self, model: PreTrainedModel, config: PromptLearningConfig) -> None:
        """With `config.inference_mode` there is only the published tensor, without the encoder that computed
        it."""
        super().__init__()
        assert config.num_layers is not None
        self.config, self.num_layers, self.is_disabled = config, config.num_layers, False
        self._cached: list[tuple[Tensor, Tensor]] | None = None
        self.encoder: PrefixEncoder | PromptEmbedding | PromptEncoder
        if isinstance(config, PrefixTuningConfig):
            self.encoder = PrefixEncoder(config)
        elif isinstance(config, PromptTuningConfig):
            self.encoder = PromptEmbedding(config, model.get_input_embeddings())
        else:
            self.encoder = PromptEncoder(config)

    def embeddings(self) -> Tensor:
        """The published tensor."""
        embedding = self.encoder.embedding
        count = torch.arange(self.config.num_virtual_tokens, device=embedding.weight.device)
        # call the module: a sharding engine gathers its weights only around a call
        made: Tensor = embedding(count) if self.config.inference_mode else self.encoder(count)
        return made

    def keys_and_values(self, backbone: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, each [1, A, N, D]."""
        if self._cached is not None:
            return self._cached
        embeddings = self.embeddings()
        if not isinstance(self.config, PrefixTuningConfig):
            return _keys_and_values(backbone, embeddings, self.num_layers)
        heads = self.config.num_attention_heads
        assert heads is not None
        of_layers = embeddings.view(len(embeddings), self.num_layers, 2, heads, -1).permute(1, 2, 3, 0, 4)
        return [(keys[None], values[None]) for keys, values in of_layers]

    @contextmanager
    def computed_once(self, model: PreTrainedModel) -> Iterator[None]:
        """Compute the keys and values now, and reuse them while open. So a call that reads a prompt runs each
        layer once, like a call that decodes."""
        self._cached = self.keys_and_values(_entry_module(model))
        try:
            yield
        finally:
            self._cached = None

    def prepend(self, backbone: nn.Module, args: Any, call: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """A hook that changes the arguments of a call of the backbone, so that the virtual tokens come before
        its rows."""
        name = "cache" if "cache" in call else "past_key_values"  # the argument's new name and its old one
        cache = call.get(name)
        if self.is_disabled or isinstance(cache, _Recorder):  # this call computes the virtual tokens
            return args, call
        if cache is None:
            cache = Cache(layers=[_PrefixLayer(*each) for each in self.keys_and_values(backbone)])
        elif cache.get_seq_length() == 0:
            given = (*args[:1], call.get("input_ids"), call.get("inputs_embeds"))  # GPT-2: by position
            inputs = next(each for each in given if each is not None)
            for layer, (keys, values) in enumerate(self.keys_and_values(backbone)):
                rows = (len(inputs), -1, -1, -1)
                cache.update(keys.expand(rows), values.expand(rows), layer)
        changed = {name: cache, "use_cache": True}
        count = self.config.num_virtual_tokens
        if call.get("position_ids") is not None:
            changed["position_ids"] = call["position_ids"] + count
        mask_BK = call.get("attention_mask")
        if mask_BK is not None:
            changed["attention_mask"] = torch.cat([mask_BK.new_ones(len(mask_BK), count), mask_BK], dim=1)
        return args, call | changed


def virtual_tokens(model: nn.Module) -> VirtualTokens | None:
    """The model's virtual tokens; None if it has none."""
    return next((each for each in model.children() if isinstance(each, VirtualTokens)), None)


def add_virtual_tokens(model: PreTrainedModel, config: PromptLearningConfig) -> VirtualTokens:
    """Make a model put virtual tokens before its rows. Only the virtual tokens train.

    Raises:
        ConfigError: the model cannot have virtual tokens.
    """
    assert config.peft_type is not None
    check_virtual_tokens(model, VIRTUAL_TOKEN_METHODS[config.peft_type])
    virtual = VirtualTokens(model, config)
    model.requires_grad_(False)
    if isinstance(config, PrefixTuningConfig) and not config.inference_mode:
        _start_from_real_tokens(model, virtual)
    module: nn.Module = virtual.to(model.device, model.dtype)
    model.add_module("virtual_tokens", module)
    if model.config._attn_implementation == ATTENTION:
        model.set_attn_implementation("sdpa")
    _entry_module(model).register_forward_pre_hook(virtual.prepend, with_kwargs=True)
    return virtual


def check_virtual_tokens(model: PreTrainedModel, method: str) -> None:
    """Refuse a model that cannot have virtual tokens, or already has some. It may be on the meta device.

    Raises:
        ConfigError: the model has virtual tokens, or a layer that does not attend to all earlier tokens.
    """
    if virtual_tokens(model) is not None:
        raise ConfigError(
            Complaint(
                f"{STAGE}.peft={method}",
                f"{type(model).__name__} already has virtual tokens.",
                f"Use another {STAGE}.peft, such as lora.",
            )
        )
    settings = model.config.get_text_config()
    kinds = set(getattr(settings, "layer_types", None) or ["full_attention"])
    has_attention = getattr(settings, "num_attention_heads", None) is not None
    if kinds != {"full_attention"} or getattr(settings, "sliding_window", None) or not has_attention:
        raise ConfigError(
            Complaint(
                f"{STAGE}.peft={method}",
                f"not every layer of {type(model).__name__} attends to all earlier tokens (sliding windows, "
                "or no attention), so virtual tokens would be lost.",
                f"Use {STAGE}.peft=lora or adapter.",
            )
        )


def _entry_module(model: PreTrainedModel) -> nn.Module:
    """The module through which every call goes: the backbone, or its decoder (OPT calls that directly)."""
    backbone = backbone_of(model)
    return getattr(backbone, "decoder", backbone)


def virtual_config(model: PreTrainedModel, config: PeftConfig) -> PromptLearningConfig:
    """peft's config for a method's virtual tokens."""
    settings = model.config.get_text_config()
    heads, size = settings.num_attention_heads, settings.hidden_size
    shape = {
        "num_virtual_tokens": config.tokens, "num_layers": settings.num_hidden_layers, "token_dim": size,
        "num_attention_heads": heads, "num_transformer_submodules": 1, "task_type": "CAUSAL_LM",
    }  # fmt: skip
    if config.method == "prompt":
        return PromptTuningConfig(prompt_tuning_init="SAMPLE_VOCAB", **shape)
    if config.method == "p_tuning":
        return PromptEncoderConfig(encoder_hidden_size=size, **shape)
    head_size = getattr(settings, "head_dim", None) or size // heads
    heads = getattr(settings, "num_key_value_heads", None) or heads
    return PrefixTuningConfig(**shape | {"token_dim": heads * head_size, "num_attention_heads": heads})


@torch.no_grad()
def _start_from_real_tokens(model: PreTrainedModel, virtual: VirtualTokens) -> None:
    """Initialise with the keys and values of random real tokens. Random numbers would dominate the row's own
    values.

    Source: Li and Liang 2021, section 7.4.
    """
    words = model.get_input_embeddings()
    assert isinstance(words, nn.Embedding)
    drawn = torch.randint(words.num_embeddings, (virtual.config.num_virtual_tokens,)).to(model.device)
    pairs = _keys_and_values(_entry_module(model), words(drawn), virtual.num_layers)
    of_layers = torch.stack([torch.cat(pair) for pair in pairs])  # [layers, 2, A, N, D]
    start = of_layers.permute(3, 0, 1, 2, 4).flatten(1)
    virtual.encoder.embedding.weight.copy_(start)


def _keys_and_values(backbone: nn.Module, embeddings: Tensor, layers: int) -> list[tuple[Tensor, Tensor]]:
    cache = _Recorder(layers)
    places = torch.arange(len(embeddings), device=embeddings.device)
    backbone(inputs_embeds=embeddings[None], position_ids=places[None], past_key_values=cache, use_cache=True)
    return [layer.pair for layer in cache.recording_layers]


class _PrefixLayer(DynamicLayer):
    """Puts keys and values [1, A, N, D] before those of all rows. It stores nothing of the rows, so a layer
    can be computed again (activation checkpointing)."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers'
        self.keys, self.values, self.is_initialized = keys, values, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """[B, A, L, D] -> [B, A, N + L, D]."""
        rows = (len(key_states), -1, -1, -1)
        assert self.keys is not None and self.values is not None
        return (
            torch.cat([self.keys.expand(rows), key_states], dim=-2),
            torch.cat([self.values.expand(rows), value_states], dim=-2),
        )


class _Recorder(Cache):
    """Records the keys and values that each layer computes."""

    def __init__(self, layers: int) -> None:
        self.recording_layers = [_RecordingLayer() for _ in range(layers)]
        super().__init__(layers=[*self.recording_layers])


class _RecordingLayer(DynamicLayer):
    """Records the last keys and values that it receives."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers'
        self.pair: tuple[Tensor, Tensor]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the keys and values unchanged."""
        self.pair = key_states, value_states
        return self.pair
