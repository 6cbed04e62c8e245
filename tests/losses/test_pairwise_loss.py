"""The Bradley-Terry loss, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.losses.pairwise import bradley_terry_loss

LN_3 = math.log(3.0)


# sigmoid(ln 3) = 3/4, so -log sigmoid = ln(4/3) and the gradient with respect to the lead is -(1 - 3/4).
@pytest.mark.parametrize(
    ("chosen", "rejected", "center", "loss", "gradient_chosen", "gradient_rejected"),
    [
        (1.0, 1.0, 0.0, math.log(2.0), -0.5, +0.5),
        (1.0 + LN_3, 1.0, 0.0, math.log(4 / 3), -0.25, +0.25),
        (1.0, 1.0 + LN_3, 0.0, math.log(4.0), -0.75, +0.75),  # ranked wrongly: costs more, pulls more
        (
            1.0,
            1.0,
            0.1,
            math.log(2.0) + 0.4,
            -0.1,
            +0.9,
        ),  # 0.1 (1 + 1)^2; gradient +2 * 0.1 * 2 on both
        (2.0, -2.0, 0.1, math.log1p(math.exp(-4.0)), -0.017986, +0.017986),  # centred: nothing to pay
        (-500.0, 500.0, 0.0, 1000.0, -1.0, +1.0),  # no overflow
    ],
)
def test_by_hand(
    chosen: float,
    rejected: float,
    center: float,
    loss: float,
    gradient_chosen: float,
    gradient_rejected: float,
) -> None:
    chosen_B = torch.tensor([chosen], requires_grad=True)
    rejected_B = torch.tensor([rejected], requires_grad=True)
    result = bradley_terry_loss(chosen_B, rejected_B, total_pairs=1, center=center)
    result.backward()
    assert result.item() == pytest.approx(loss, rel=1e-5)
    assert chosen_B.grad is not None and rejected_B.grad is not None
    assert chosen_B.grad.item() == pytest.approx(gradient_chosen, rel=1e-4)
    assert rejected_B.grad.item() == pytest.approx(gradient_rejected, rel=1e-4)


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(AssertionError):
        bradley_terry_loss(torch.zeros(4), torch.zeros(4, 1), total_pairs=4)


def test_micro_batches_add_up_to_the_mean_over_all_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    chosen_B, rejected_B = torch.randn(2, 5, generator=generator)
    parts = [
        bradley_terry_loss(chosen_B[s], rejected_B[s], total_pairs=5, center=0.1)
        for s in (slice(0, 1), slice(1, 5))
    ]
    each_B = torch.log1p(torch.exp(-(chosen_B - rejected_B))) + 0.1 * (chosen_B + rejected_B) ** 2
    torch.testing.assert_close(sum(parts), each_B.mean())
