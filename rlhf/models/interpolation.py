"""Between two models with the same parameters."""

from __future__ import annotations

import torch
from torch import nn

from rlhf.models.on_disk import Keep
from rlhf.training.optimizer import round_into


@torch.no_grad()
def interpolate(base: nn.Module, tuned: nn.Module, alpha: float, keep: Keep = lambda weight: weight) -> float:
    """Make the tuned model base + alpha (tuned - base), in place. Each weight is computed in fp32 and then
    rounded like the optimizer's masters.

    Source: WiSE-FT, Wortsman et al. 2022, arXiv:2109.01903, section 3.

    Args:
        keep: gets each weight that is made.

    Returns:
        The norm of the result's difference to base, divided by the norm of base.
    """
    starts = dict(base.named_parameters())
    moved = total = 0.0
    for name, end in tuned.named_parameters():
        start = starts.pop(name).float()
        assert start.shape == end.shape, name
        mixed = torch.empty_like(end)
        round_into(mixed, start.lerp(end.float(), alpha))
        end.data = keep(mixed)
        moved += float((end.float() - start).square().sum(dtype=torch.float64))
        total += float(start.square().sum(dtype=torch.float64))
    assert not starts, f"only base has {next(iter(starts))}"
    return float((moved / total) ** 0.5)
