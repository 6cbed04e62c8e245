"""Activation checkpointing: what a function computes on its way is computed anew for its gradients, not kept.

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

from rlhf.config import ConfigError

Result = TypeVar("Result")


def recomputed(function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """function(*args, **kwargs), of which the graph keeps the tensors in args only."""
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    # dropout is off in our models, so there are no random numbers to be drawn again
    result: Result = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
    return result


def checkpoint_layers(model: nn.Module) -> None:
    """Let each layer of the models within keep nothing but its input.

    Losses and gradients stay the same, bit for bit; a training pass costs another forward pass of the layers.
    transformers' own switch works in training mode only, which would turn dropout on. Like it, this wraps a
    layer's `forward`, so that a sharding engine's hooks on the layer do not run again.

    Raises:
        ConfigError: transformers does not know the model's layers.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"activation_checkpointing=true: {type(model).__name__} has no layers that transformers can "
            "checkpoint. Use activation_checkpointing=false and a smaller micro_batch_tokens."
        )
    for layer in layers:
        layer.forward = partial(recomputed, layer.forward)
