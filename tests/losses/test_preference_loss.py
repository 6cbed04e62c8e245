"""The losses on preferences, by hand, and what each becomes at its limits."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf.losses.preference import dpo_loss, ipo_loss, kto_loss, kto_point, simpo_loss

LN_2, LN_3 = math.log(2.0), math.log(3.0)


def value_and_slope(loss: Callable[[Tensor], Tensor], at: float) -> tuple[float, float]:
    """A loss of one number, and its derivative."""
    x_B = torch.tensor([at], dtype=torch.float64, requires_grad=True)
    (found,) = loss(x_B)
    found.backward()
    assert x_B.grad is not None
    return float(found.detach()), float(x_B.grad)


# sigmoid(ln 3) = 3/4: -log of it is ln(4/3), and the slope in beta * gap is -(1 - 3/4)
@pytest.mark.parametrize(
    ("gap", "beta", "smoothing", "loss", "slope"),
    [
        (0.0, 0.1, 0.0, LN_2, -0.1 / 2),  # the policy is the reference
        (10 * LN_3, 0.1, 0.0, math.log(4 / 3), -0.1 / 4),
        (-10 * LN_3, 0.1, 0.0, math.log(4), -0.1 * 3 / 4),  # ranked wrongly: costs more, pulls more
        (LN_3, 1.0, 0.2, 0.8 * math.log(4 / 3) + 0.2 * math.log(4), -0.8 / 4 + 0.2 * 3 / 4),
        (LN_3 * 2, 0.5, 0.25, 0.75 * math.log(4 / 3) + 0.25 * math.log(4), 0.0),  # as sure as it may be
        (-2000.0, 1.0, 0.0, 2000.0, -1.0),  # no overflow
    ],
)
def test_dpo_by_hand(gap: float, beta: float, smoothing: float, loss: float, slope: float) -> None:
    found = value_and_slope(lambda x: dpo_loss(x, beta=beta, label_smoothing=smoothing), gap)
    assert found == pytest.approx((loss, slope), abs=1e-12)


@pytest.mark.parametrize("gap", [-3.0, 0.5, 7.0])
def test_dpo_with_half_of_the_labels_wrong_prefers_neither(gap: float) -> None:
    found, mirrored = (
        value_and_slope(lambda x: dpo_loss(x, beta=0.7, label_smoothing=0.5), sign * gap) for sign in (1, -1)
    )
    assert found == pytest.approx((mirrored[0], -mirrored[1]))
    assert value_and_slope(lambda x: dpo_loss(x, beta=0.7, label_smoothing=0.5), 0.0)[1] == 0.0


@pytest.mark.parametrize("gap", [-3.0, 0.0, 7.0])
def test_dpo_with_beta_to_zero_pulls_every_pair_alike(gap: float) -> None:
    """Its gradient, divided by beta, becomes that of half the gap: plain unlikelihood of the rejected."""
    beta = 1e-7
    loss, slope = value_and_slope(lambda x: dpo_loss(x, beta=beta), gap)
    assert loss == pytest.approx(LN_2, abs=1e-6) and slope / beta == pytest.approx(-0.5, abs=1e-6)


@pytest.mark.parametrize(
    ("gap", "beta", "loss", "slope"),
    [
        (0.0, 0.5, 1.0, -2.0),
        (5.0, 0.1, 0.0, 0.0),  # the optimum: 1 / (2 beta), however far the gap could grow
        (6.0, 0.1, 1.0, 2.0),  # beyond it the policy is pulled back
        (-1.0, 0.25, 9.0, -6.0),
    ],
)
def test_ipo_by_hand(gap: float, beta: float, loss: float, slope: float) -> None:
    assert value_and_slope(lambda x: ipo_loss(x, beta=beta), gap) == pytest.approx((loss, slope), abs=1e-12)


@pytest.mark.parametrize(
    ("gap", "beta", "gamma", "loss", "slope"),
    [
        (0.5, 2.0, 1.0, LN_2, -1.0),  # ahead by just the margin
        ((1 + LN_3) / 2, 2.0, 1.0, math.log(4 / 3), -0.5),
        (0.0, 2.0, LN_3, math.log(4), -1.5),
        (LN_3 / 2, 2.0, 0.0, math.log(4 / 3), -0.5),  # DPO without a reference
    ],
)
def test_simpo_by_hand(gap: float, beta: float, gamma: float, loss: float, slope: float) -> None:
    found = value_and_slope(lambda x: simpo_loss(x, beta=beta, gamma=gamma), gap)
    assert found == pytest.approx((loss, slope), abs=1e-12)


# weight (1 - sigmoid(beta (ratio - point))): its slope in the ratio is -weight beta sigmoid (1 - sigmoid)
@pytest.mark.parametrize(
    ("ratio", "desirable", "point", "loss", "slope"),
    [
        (2.0, True, 2.0, 1.5 * 0.5, -1.5 * 0.5 / 4),  # at the reference point
        (2.0, False, 2.0, 0.5, 0.5 / 4),
        (2 * LN_3, True, 0.0, 1.5 / 4, -1.5 * 0.5 * 3 / 16),
        (2 * LN_3, False, 0.0, 3 / 4, 0.5 * 3 / 16),
        (0.0, True, 2 * LN_3, 1.5 * 3 / 4, -1.5 * 0.5 * 3 / 16),
        (100.0, True, 0.0, 0.0, 0.0),  # a gain saturates, unlike DPO's
        (100.0, False, 0.0, 1.0, 0.0),  # and a hopeless loss is given up
    ],
)
def test_kto_by_hand(ratio: float, desirable: bool, point: float, loss: float, slope: float) -> None:
    is_desirable_B = torch.tensor([desirable])
    found = value_and_slope(
        lambda x: kto_loss(
            x, is_desirable_B, beta=0.5, point=point, desirable_weight=1.5, undesirable_weight=1.0
        ),
        ratio,
    )
    assert found == pytest.approx((loss, slope), abs=1e-9)


def test_ktos_point_is_a_mean_never_below_zero_without_a_gradient() -> None:
    ratio_B = torch.tensor([1.0, 4.0, -2.0], requires_grad=True)
    point = kto_point(ratio_B.sum(), 3)
    assert float(point) == 1.0 and not point.requires_grad
    assert float(kto_point(-ratio_B.sum(), 3)) == 0.0


def test_ktos_answers_of_a_batch_share_the_point_and_keep_their_own_weights() -> None:
    is_desirable_B = torch.tensor([True, False, False])
    found_B = kto_loss(
        torch.tensor([0.0, 0.0, LN_3]), is_desirable_B, beta=1.0, point=LN_3,
        desirable_weight=2.0, undesirable_weight=4.0,
    )  # fmt: skip
    torch.testing.assert_close(found_B, torch.tensor([2 * 3 / 4, 4 * 1 / 4, 4 * 1 / 2]))


@pytest.mark.parametrize("is_desirable", [torch.ones(3, 1, dtype=torch.bool), torch.ones(3)])
def test_what_would_broadcast_or_is_no_thumb_is_refused(is_desirable: Tensor) -> None:
    with pytest.raises(AssertionError):
        kto_loss(
            torch.zeros(3), is_desirable, beta=1.0, point=0.0, desirable_weight=1.0, undesirable_weight=1.0
        )
