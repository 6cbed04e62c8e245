"""The clipped value loss, by hand. Padding, splitting and order: test_masking.py."""

from __future__ import annotations

import pytest
import torch

from rlhf.losses.value import clipped_value_loss


# Where the gradient lives it is V - R; the old value is 1.
@pytest.mark.parametrize(
    ("value", "target", "clip", "loss", "gradient"),
    [
        (1.1, 2.0, 0.2, 0.405, -0.9),  # inside the range: (1.1 - 2)^2 / 2
        (1.5, 2.0, 0.2, 0.320, 0.0),  # too far up, on the way to R: (1.2 - 2)^2 / 2
        (1.5, 0.0, 0.2, 1.125, 1.5),  # too far up, away from R: 1.5^2 / 2, never clipped
        (0.5, 0.0, 0.2, 0.320, 0.0),  # too far down, on the way to R: (0.8 - 0)^2 / 2
        (0.5, 2.0, 0.2, 1.125, -1.5),  # too far down, away from R: (0.5 - 2)^2 / 2
        (1.5, 2.0, None, 0.125, -0.5),  # plain squared error
    ],
)
def test_both_branches_by_hand(
    value: float, target: float, clip: float | None, loss: float, gradient: float
) -> None:
    value_BR = torch.tensor([[value]], requires_grad=True)
    old_value_BR, return_BR, mask_BR = torch.ones(1, 1), torch.tensor([[target]]), torch.tensor([[True]])
    result = clipped_value_loss(value_BR, old_value_BR, return_BR, mask_BR, clip=clip, total_tokens=1)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(loss, rel=1e-5)
    assert value_BR.grad is not None
    assert value_BR.grad.item() == pytest.approx(gradient, rel=1e-5)
    assert result.clipped.item() == (gradient == 0.0)
