"""Publish a policy: merge its adapter into the model that the stage started from, or save the adapter with a
reference to that model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.config import ConfigError
from rlhf.models.base import ModelConfig
from rlhf.models.load import load_causal_lm
from rlhf.models.on_disk import Scratch, open_scratch
from rlhf.models.peft.bottleneck import PEFT_TYPE
from rlhf.models.peft.config import PeftConfig
from rlhf.models.peft.methods import METHODS, VIRTUAL_TOKEN_METHODS
from rlhf.models.peft.saved import (
    adapter_config,
    attach_published,
    attach_to_merge,
    bytes_under,
    origin_of,
    save_adapter,
)
from rlhf.models.save import save_policy, save_settings
from rlhf.training.trained import load_trained, put_weights

UNMERGEABLE_METHODS = {PEFT_TYPE: "adapter", **VIRTUAL_TOKEN_METHODS}
"""Methods that cannot be merged: name in peft's files -> our name."""


def publish_policy(
    artifact: Path,
    trained: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    start: Path,
    key: str,
    settings: ModelConfig,
    dtype: torch.dtype,
    peft: PeftConfig,
) -> dict[str, float]:
    """Write the trained adapter into `adapter/`, unless all weights were trained. If the method can be
    merged, also write the merged model.

    Args:
        artifact: directory to write to.
        trained: file of `Engine.save_trained`, for a model that `attach` prepared in the same way.
        start: directory of the model that the training started from.
        key: key or identity of that model.

    Returns:
        Summary metrics: sizes in bytes.
    """
    with open_scratch(artifact) as scratch:
        model = load_causal_lm(start, settings, dtype, scratch=scratch.directory)
        adapter = attach_to_merge(model, peft, scratch.map_to_file)
        put_weights(model, load_trained(trained))
        metrics = save_adapter(adapter, artifact, start, key)
        if METHODS[peft.method].merges:
            adapter.merge(scratch.map_to_file)
            save_policy(model, tokenizer, artifact)
        else:
            save_settings(model, tokenizer, artifact)
    return {**metrics, "artifact_bytes": bytes_under(artifact)}


def merged_policy(
    artifact: Path, settings: ModelConfig, dtype: torch.dtype, scratch: Scratch | None = None
) -> PreTrainedModel:
    """The model that an artifact's training started from, with its adapter merged in, on the CPU.

    Args:
        scratch: maps each new weight from a file; None leaves it in memory.

    Raises:
        ConfigError: there is no adapter, its base model is missing, or its method cannot be merged.
    """
    origin = origin_of(artifact)
    if origin is None:
        raise ConfigError(
            f"{artifact}: it has no adapter/, so there is nothing to merge: all its weights were trained."
        )
    kind = adapter_config(artifact)["peft_type"]
    if kind in UNMERGEABLE_METHODS:
        raise ConfigError(
            f"{artifact}: what {UNMERGEABLE_METHODS[kind]} trains cannot be merged into the weights. Use the "
            "artifact as it is, or train with lora, dora, ia3 or freeze."
        )
    map_weight = (lambda weight: weight) if scratch is None else scratch.map_to_file
    place = None if scratch is None else scratch.directory
    model = load_causal_lm(origin.checked_directory(artifact), settings, dtype, scratch=place)
    adapter, _ = attach_published(model, artifact, map_weight)
    adapter.merge(map_weight)
    return model
