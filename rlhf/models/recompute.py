"""Activation checkpointing: intermediate results are not saved, but computed again in the backward pass.

Source: Chen et al. 2016 (arXiv:1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf.config import STAGE, Complaint, ConfigError

Result = TypeVar("Result")


def recomputed(function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """The result of function(*args, **kwargs). Only the tensors in args are saved for the backward pass."""
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    # our models have dropout off, so no random state has to be restored
    result: Result = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
    return result


def checkpoint_layers(model: nn.Module) -> None:
    """Make each layer of the models inside save only its input for the backward pass.

    Losses and gradients stay the same, bit for bit. A training pass costs one more forward pass of the
    layers. transformers' own switch works only in training mode, which would turn dropout on. Like that
    switch, this function wraps a layer's `forward`. So a sharding engine's hooks on the layer do not run a
    second time.

    Raises:
        ConfigError: transformers cannot checkpoint the model's layers.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            Complaint(
                f"{STAGE}.activation_checkpointing=true",
                f"{type(model).__name__} has no layers that transformers can checkpoint.",
                f"Use {STAGE}.activation_checkpointing=false and a smaller {STAGE}.micro_batch_tokens.",
            )
        )
    for layer in layers:
        layer.forward = partial(recomputed, layer.forward)
