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


@pytest.mark.parametrize("gap", [-3.0, 0.0, 7.0])
def test_ipo_with_beta_to_zero_pulls_every_pair_alike(gap: float) -> None:
    """(gap - 1 / (2 beta))^2 = 1 / (4 beta^2) - gap / beta + gap^2. Times beta and without the constant it
    becomes -gap, whose slope is -1: as DPO's, plain unlikelihood of the rejected."""
    beta = 1e-7
    loss, slope = value_and_slope(lambda x: ipo_loss(x, beta=beta), gap)
    assert (loss - 1 / (4 * beta**2)) * beta == pytest.approx(-gap, abs=1e-5)
    assert slope * beta == pytest.approx(-1.0, abs=1e-5)


# the last two log-probabilities are the rejected answer's: means -2 and -2.5, so beta gap is 1
@pytest.mark.parametrize(
    ("smoothing", "loss"),
    [(0.0, math.log1p(math.exp(-1))), (0.1, 0.9 * math.log1p(math.exp(-1)) + 0.1 * math.log1p(math.e))],
)
def test_simpo_without_a_margin_is_dpo_with_a_reference_of_zero(smoothing: float, loss: float) -> None:
    """By means over an answer's tokens; and the slopes in its log-probabilities agree."""
    logp_T = torch.tensor([-1.0, -2.0, -3.0, -0.5, -4.5], dtype=torch.float64, requires_grad=True)
    chosen, rejected = logp_T[:3].mean()[None], logp_T[3:].mean()[None]
    of_simpo = simpo_loss(chosen - rejected, beta=2.0, gamma=0.0, label_smoothing=smoothing)
    zero = torch.zeros(1, dtype=torch.float64)
    ratio_gap = (chosen - zero) - (rejected - zero)
    of_dpo = dpo_loss(ratio_gap, beta=2.0, label_smoothing=smoothing)
    assert float(of_simpo.detach()) == float(of_dpo.detach()) == pytest.approx(loss)
    slopes = [torch.autograd.grad(each.sum(), logp_T, retain_graph=True)[0] for each in (of_simpo, of_dpo)]
    assert torch.equal(*slopes) and slopes[0][0] < 0 < slopes[0][3]


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


@pytest.mark.parametrize("ratio", [-3.0, 0.5, 7.0])
@pytest.mark.parametrize(("desirable", "weight", "sign"), [(True, 1.5, -1.0), (False, 0.75, +1.0)])
def test_kto_with_beta_to_zero_pulls_every_answer_alike(
    ratio: float, desirable: bool, weight: float, sign: float
) -> None:
    """weight (1 - sigmoid(beta d)) = weight (1/2 - beta d / 4 + O(beta^3)), d being how far it is ahead of
    the point: its slope over beta becomes -weight / 4 of a desirable answer, and +weight / 4 of another."""
    beta, point, is_desirable_B = 1e-5, 0.25, torch.tensor([desirable])
    loss, slope = value_and_slope(
        lambda x: kto_loss(
            x, is_desirable_B, beta=beta, point=point, desirable_weight=1.5, undesirable_weight=0.75
        ),
        ratio,
    )
    assert (loss - weight / 2) / beta == pytest.approx(sign * weight * (ratio - point) / 4, abs=1e-6)
    assert slope / beta == pytest.approx(sign * weight / 4, abs=1e-6)


def test_ktos_point_is_a_mean_never_below_zero_without_a_gradient() -> None:
    ratio_B = torch.tensor([1.0, 4.0, -2.0], requires_grad=True)
    point = kto_point(ratio_B.sum(), 3)
    assert float(point) == 1.0 and not point.requires_grad
    assert float(kto_point(-ratio_B.sum(), 3)) == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_ktos_answers_of_a_batch_share_the_point_and_keep_their_own_weights(dtype: torch.dtype) -> None:
    """And the log-ratios' type: the weights, which are fp32 by themselves, do not widen it."""
    is_desirable_B = torch.tensor([True, False, False])
    found_B = kto_loss(
        torch.tensor([0.0, 0.0, LN_3], dtype=dtype), is_desirable_B, beta=1.0, point=LN_3,
        desirable_weight=2.0, undesirable_weight=4.0,
    )  # fmt: skip
    torch.testing.assert_close(found_B, torch.tensor([2 * 3 / 4, 4 * 1 / 4, 4 * 1 / 2], dtype=dtype))


@pytest.mark.parametrize("is_desirable", [torch.ones(3, 1, dtype=torch.bool), torch.ones(3)])
def test_what_would_broadcast_or_is_no_thumb_is_refused(is_desirable: Tensor) -> None:
    with pytest.raises(AssertionError):
        kto_loss(
            torch.zeros(3), is_desirable, beta=1.0, point=0.0, desirable_weight=1.0, undesirable_weight=1.0
        )
