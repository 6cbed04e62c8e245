"""PPO's clipped objective, by hand. Padding, splitting and order: test_masking.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.losses.policy import LOG_RATIO_LIMIT, PolicyLoss, clipped_policy_loss

TRUE = torch.tensor([[True]])


def one_token(ratio: float, advantage: float, **knobs: Any) -> tuple[PolicyLoss, Tensor]:
    logp_BR = torch.tensor([[-2.0 + math.log(ratio)]], requires_grad=True)
    sampled_logp_BR, advantage_BR = torch.tensor([[-2.0]]), torch.tensor([[advantage]])
    result = clipped_policy_loss(
        logp_BR, sampled_logp_BR, advantage_BR, TRUE, clip=0.2, total_tokens=1, **knobs
    )
    (gradient_BR,) = torch.autograd.grad(result.loss, logp_BR)
    return result, gradient_BR


# Where the gradient lives, d(-A rho)/d(logp) = -A rho, because d(rho)/d(logp) = rho.
@pytest.mark.parametrize(
    ("ratio", "advantage", "knobs", "loss", "gradient"),
    [
        (1.0, +1.0, {}, -1.0, -1.0),  # first step: plain policy gradient
        (1.1, +1.0, {}, -1.1, -1.1),  # inside the clip range
        (1.1, -2.0, {}, +2.2, +2.2),  # linear in the advantage
        (1.5, +1.0, {}, -1.2, 0.0),  # good token, already pushed far enough
        (0.5, -1.0, {}, +0.8, 0.0),  # bad token, already pushed far enough
        (1.5, -1.0, {}, +1.5, +1.5),  # bad token made likelier: never clipped
        (0.5, +1.0, {}, -0.5, -0.5),  # good token made unlikelier: never clipped
        (1.25, +1.0, {"clip_high": 0.3}, -1.25, -1.25),  # the upper bound alone moves
        (1.5, +1.0, {"clip_high": 0.3}, -1.3, 0.0),
        (0.75, -1.0, {"clip_high": 0.3}, +0.8, 0.0),
        (2.0, -1.0, {"dual_clip": 3.0}, +2.0, +2.0),  # not yet beyond the dual clip
        (5.0, -1.0, {"dual_clip": 3.0}, +3.0, 0.0),
        (5.0, +1.0, {"dual_clip": 3.0}, -1.2, 0.0),  # a positive advantage is eq. 7's business
        (0.5, -1.0, {"dual_clip": 3.0}, +0.8, 0.0),
    ],
)
def test_equation_7_by_hand(
    ratio: float, advantage: float, knobs: dict[str, float], loss: float, gradient: float
) -> None:
    result, gradient_BR = one_token(ratio, advantage, **knobs)
    assert result.loss.item() == pytest.approx(loss, rel=1e-5)
    assert gradient_BR.item() == pytest.approx(gradient, rel=1e-5)
    assert result.clipped.item() == (gradient == 0.0)


def test_metrics_by_hand() -> None:
    mask_BR = torch.tensor([[True, True, True, False]])
    logp_BR = torch.tensor([[1.5, 0.5, 1.0, 7.0]]).log().requires_grad_()
    advantage_BR = torch.tensor([[1.0, 1.0, -1.0, 9.0]])
    result = clipped_policy_loss(logp_BR, torch.zeros(1, 4), advantage_BR, mask_BR, clip=0.2, total_tokens=10)
    assert result.loss.item() == pytest.approx((-1.2 - 0.5 + 1.0) / 10)
    assert result.clipped.item() == 1  # the first
    # 1.5 - 1 - ln 1.5 = 0.094535; 0.5 - 1 - ln 0.5 = 0.193147; 1 - 1 - ln 1 = 0
    assert result.approximate_kl.item() == pytest.approx(0.287682, abs=1e-6)
    assert result.max_ratio.item() == pytest.approx(1.5)
    assert result.ratio_deviation.item() == pytest.approx(0.5 + 0.5 + 0.0)
    assert not any(metric.requires_grad for metric in result[1:])


@pytest.mark.parametrize(("real", "expected"), [(True, 0.5), (False, 0.0)])
def test_paddings_ratio_of_1_is_not_the_largest(real: bool, expected: float) -> None:
    mask_BR = torch.tensor([[real, False]])
    logp_BR = torch.full((1, 2), math.log(0.5))
    result = clipped_policy_loss(
        logp_BR, torch.zeros(1, 2), torch.ones(1, 2), mask_BR, clip=0.2, total_tokens=1
    )
    assert result.max_ratio.item() == pytest.approx(expected)


def test_small_ratios_keep_their_kl() -> None:
    # ln rho = 1e-4: rho - 1 - ln rho = 1e-8 / 2; subtracting 1 in fp32 would leave noise of 1e-7.
    logp_BR = torch.full((1, 1), 1e-4)
    result = clipped_policy_loss(logp_BR, torch.zeros(1, 1), torch.ones(1, 1), TRUE, clip=0.2, total_tokens=1)
    assert result.approximate_kl.item() == pytest.approx(5e-9, rel=0.01)


@pytest.mark.parametrize("log_ratio", [100.0, -100.0, math.inf, -math.inf])
def test_an_overflowing_ratio_earns_no_gradient_instead_of_nan(log_ratio: float) -> None:
    logp_BR = torch.tensor([[log_ratio], [log_ratio]], requires_grad=True)
    advantage_BR = torch.tensor([[1.0], [-1.0]])
    result = clipped_policy_loss(
        logp_BR, torch.zeros(2, 1), advantage_BR, TRUE.expand(2, 1), clip=0.2, total_tokens=2
    )
    result.loss.backward()
    assert all(torch.isfinite(number) for number in result)
    assert logp_BR.grad is not None
    assert logp_BR.grad.tolist() == [[0.0], [0.0]]
    assert result.clipped.item() == 2


@pytest.mark.parametrize(("log_ratio", "clipped"), [(LOG_RATIO_LIMIT, 0), (LOG_RATIO_LIMIT + 0.5, 1)])
def test_a_ratio_at_its_limit_still_earns_gradient(log_ratio: float, clipped: int) -> None:
    logp_BR = torch.tensor([[log_ratio]]).requires_grad_()
    result = clipped_policy_loss(
        logp_BR, torch.zeros(1, 1), -torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool), clip=0.2,
        total_tokens=1,
    )  # fmt: skip
    result.loss.backward()
    assert logp_BR.grad is not None
    assert result.clipped.item() == clipped == (logp_BR.grad.item() == 0.0)


def test_a_nan_on_a_real_token_is_not_hidden() -> None:
    logp_BR = torch.tensor([[math.nan]])
    result = clipped_policy_loss(logp_BR, torch.zeros(1, 1), torch.ones(1, 1), TRUE, clip=0.2, total_tokens=1)
    assert math.isnan(result.loss.item())
