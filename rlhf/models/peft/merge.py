"""Publish a policy: merge the trained weights into those that the stage started from, or save them with a
reference to these."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.config import ConfigError
from rlhf.models.base import ModelConfig
from rlhf.models.load import load_causal_lm
from rlhf.models.on_disk import Scratch, kept_on_disk
from rlhf.models.peft.bottleneck import KIND
from rlhf.models.peft.config import PeftConfig
from rlhf.models.peft.methods import KINDS, METHODS
from rlhf.models.peft.saved import (
    attach_published,
    attach_to_merge,
    bytes_under,
    described,
    origin_of,
    save_adapter,
)
from rlhf.models.save import save_policy, save_settings
from rlhf.training.trained import load_trained, put_weights

UNMERGED = {KIND: "adapter", **KINDS}
"""Methods that do not merge: name in peft's files -> our name."""


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
    """Write what was trained into `adapter/`. If the method merges, write a plain causal model beside it.

    Args:
        artifact: the directory to write to.
        start: the model that the training started from; `key` names it.
        trained: what `Engine.save_trained` wrote, of a model that `attach` prepared in the same way.

    Returns:
        Summary metrics of what was written.
    """
    with kept_on_disk(artifact) as scratch:
        model = load_causal_lm(start, settings, dtype, scratch=scratch.directory)
        adapter = attach_to_merge(model, peft, scratch.keep)
        put_weights(model, load_trained(trained))
        metrics = save_adapter(adapter, artifact, start, key)
        if METHODS[peft.method].merges:
            adapter.merge(scratch.keep)
            save_policy(model, tokenizer, artifact)
        else:
            save_settings(model, tokenizer, artifact)
    return {**metrics, "artifact_bytes": bytes_under(artifact)}


def merged_policy(
    artifact: Path, settings: ModelConfig, dtype: torch.dtype, scratch: Scratch | None = None
) -> PreTrainedModel:
    """The model that an artifact's training started from, with its adapter merged in, on the CPU.

    Args:
        scratch: where each weight goes that is made; None keeps it in memory.

    Raises:
        ConfigError: there is no adapter, its base model is missing, or its method does not merge.
    """
    origin = origin_of(artifact)
    if origin is None:
        raise ConfigError(
            f"{artifact}: it has no adapter/, so there is nothing to merge: all its weights were trained."
        )
    kind = described(artifact)["peft_type"]
    if kind in UNMERGED:
        raise ConfigError(
            f"{artifact}: what {UNMERGED[kind]} trains cannot be merged into the weights. Use the "
            "artifact as it is, or train with lora, dora, ia3 or freeze."
        )
    keep = (lambda weight: weight) if scratch is None else scratch.keep
    place = None if scratch is None else scratch.directory
    model = load_causal_lm(origin.found(artifact), settings, dtype, scratch=place)
    adapter, _ = attach_published(model, artifact, keep)
    adapter.merge(keep)
    return model
