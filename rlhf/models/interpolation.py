"""Interpolation between two models with the same parameters."""

from __future__ import annotations

import torch
from torch import nn

from rlhf.models.on_disk import MapWeight
from rlhf.training.optimizer import round_into


@torch.no_grad()
def interpolate(
    base: nn.Module, tuned: nn.Module, alpha: float, map_weight: MapWeight = lambda weight: weight
) -> float:
    """Set the tuned model to base + alpha (tuned - base), in place. Each weight is computed in fp32 and then
    rounded as the optimizer rounds its fp32 masters.

    Source: WiSE-FT, Wortsman et al. 2022, arXiv:2109.01903, section 3.

    Args:
        map_weight: called with each new weight; its result goes into the model.

    Returns:
        Norm of (result - base), divided by the norm of base.
    """
    starts = dict(base.named_parameters())
    change = total = 0.0
    for name, end in tuned.named_parameters():
        start = starts.pop(name).float()
        assert start.shape == end.shape, name
        mixed = torch.empty_like(end)
        round_into(mixed, start.lerp(end.float(), alpha))
        end.data = map_weight(mixed)
        change += float((end.float() - start).square().sum(dtype=torch.float64))
        total += float(start.square().sum(dtype=torch.float64))
    assert not starts, f"only base has {next(iter(starts))}"
    return float((change / total) ** 0.5)
