"""Load a causal language model from a directory."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
)

from rlhf.config import Complaint, ConfigError
from rlhf.distributed.compute import Compute
from rlhf.models.base import ModelConfig, context_length, reading
from rlhf.models.form import as_loaded, use_file_layout
from rlhf.models.packed_attention import pack_where_possible
from rlhf.models.peft.saved import attach_published, base_of
from rlhf.models.peft.virtual_tokens import virtual_tokens


def context_left(model: PreTrainedModel) -> int:
    """Largest number of tokens of prompt and response together: the context without virtual tokens."""
    virtual = virtual_tokens(model)
    return context_length(model.config) - (virtual.config.num_virtual_tokens if virtual else 0)


def load_causal_lm(
    directory: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    compute: Compute | None = None,
    scratch: Path | None = None,
) -> PreTrainedModel:
    """A causal model in `dtype` on `device`, in evaluation mode, so dropout is off.

    On the CPU, weights whose files are in `dtype` are mapped from these files. They take memory only when
    they are copied or written to. To another device, weights are read one by one.

    If the artifact is an adapter with a reference to its base model, the result is the base model with the
    adapter attached, all frozen.

    Args:
        compute: ranks that all load the model at the same time.
        scratch: directory for weights that must be converted; see `as_loaded`.
    """
    model: PreTrainedModel
    base = base_of(directory, compute)
    if base is not None:
        model = load_causal_lm(base, config, dtype, device, compute, scratch)
        attach_published(model, directory)
        model.generation_config = GenerationConfig.from_pretrained(directory)
        return model
    with reading(directory), files_as_loaded(directory, config, dtype, device, compute, scratch) as files:
        # transformers would silently ignore a damaged one
        if (directory / "generation_config.json").exists():
            GenerationConfig.from_pretrained(directory)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            files,
            dtype=dtype,
            device_map=device_map(device),
            attn_implementation=attention_of(config),
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
        )
    model, info = loaded
    if files != directory:
        use_file_layout(model, directory)
    model.name_or_path = model.config.name_or_path = str(directory)
    check_complete(directory, info["missing_keys"])
    module: torch.nn.Module = model  # transformers' own `to` hides its signature from type checkers
    module.eval().to(device)
    if config.attention == "auto":
        pack_where_possible(model, compute)
    return model


def device_map(device: torch.device | str) -> dict[str, torch.device | str] | None:
    """`device_map` with which transformers reads each weight directly to a device; None for the CPU, which is
    its default."""
    return None if torch.device(device).type == "cpu" else {"": device}


def files_as_loaded(
    directory: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    compute: Compute | None,
    scratch: Path | None,
) -> AbstractContextManager[Path]:
    """The directory to read from: that of `as_loaded` for the CPU. For other devices transformers converts
    while it reads."""
    on_cpu = torch.device(device).type == "cpu"
    return as_loaded(directory, config, dtype, compute, scratch) if on_cpu else nullcontext(directory)


def check_complete(directory: Path, missing: Collection[str]) -> None:
    """Refuse a model that lacks weights. transformers would use random ones.

    Raises:
        ConfigError: weights are missing; the message names up to three.
    """
    if missing:
        why = f"cannot be read as a model: its weights lack {', '.join(sorted(missing)[:3])}."
        raise ConfigError(Complaint(str(directory), why, "Save it again, whole."))


def attention_of(config: ModelConfig) -> str | None:
    """The `attn_implementation` for transformers. With None it uses sdpa, or eager if the model has no
    sdpa."""
    return None if config.attention == "auto" else config.attention
