"""KL estimators and coefficient controllers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf.rl.advantage import AdaptiveKL, FixedKL, kl_k1, kl_k3


def test_estimators_by_hand() -> None:
    logp_BR = torch.tensor([[0.5, 0.25, 0.5]]).log()
    reference_logp_BR = torch.tensor([[0.25, 0.5, math.nan]]).log()
    mask_BR = torch.tensor([[True, True, False]])
    # s = 0.5: 0.5 - 1 + ln 2; s = 2: 2 - 1 - ln 2
    expected_k1, expected_k3 = [math.log(2), -math.log(2), 0.0], [math.log(2) - 0.5, 1 - math.log(2), 0.0]
    torch.testing.assert_close(kl_k1(logp_BR, reference_logp_BR, mask_BR), torch.tensor([expected_k1]))
    torch.testing.assert_close(kl_k3(logp_BR, reference_logp_BR, mask_BR), torch.tensor([expected_k3]))


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_estimators_expect_the_kl_of_the_policy_from_the_reference(
    estimator: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> None:
    policy, reference = torch.tensor([[0.5, 0.4, 0.1]]), torch.tensor([[0.25, 0.25, 0.5]])
    per_token = estimator(policy.log(), reference.log(), torch.ones(1, 3, dtype=torch.bool))
    # 0.5 ln 2 + 0.4 ln 1.6 + 0.1 ln 0.2 = 0.346574 + 0.188001 - 0.160944; the other direction is 0.513931
    assert (policy * per_token).sum().item() == pytest.approx(0.373631, abs=1e-5)


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (6.0, 1.0),
        (6.6, 1.005),  # error +0.1, times 500 / 10000
        (5.4, 0.995),
        (60.0, 1.01),  # error +9, clipped to +0.2
        (0.0, 0.99),  # error -1, clipped to -0.2
        (-3.0, 0.99),
    ],
)
def test_adaptive_coefficient_by_hand(kl: float, factor: float) -> None:
    controller = AdaptiveKL(coef=0.1, target=6.0, horizon=10_000)
    controller.update(kl, episodes=500)
    assert controller.coef == pytest.approx(0.1 * factor, rel=1e-9)


def test_a_nan_kl_is_refused() -> None:
    with pytest.raises(AssertionError, match="nan"):
        AdaptiveKL(coef=0.1, target=6.0, horizon=10_000).update(math.nan, episodes=500)


def test_a_horizon_that_would_turn_the_coefficient_negative_is_refused() -> None:
    with pytest.raises(AssertionError, match="horizon"):
        AdaptiveKL(coef=0.1, target=6.0, horizon=100).update(0.0, episodes=500)  # 1 - 0.2 * 5 = 0


def test_a_fixed_coefficient_stays() -> None:
    controller = FixedKL(coef=0.05)
    controller.update(100.0, episodes=10_000)
    assert controller.coef == 0.05


@pytest.mark.parametrize("fresh", [FixedKL(coef=9.0), AdaptiveKL(coef=9.0, target=6.0, horizon=10_000)])
def test_state_survives_a_restart(fresh: FixedKL | AdaptiveKL) -> None:
    trained = AdaptiveKL(coef=0.1, target=6.0, horizon=10_000)
    trained.update(60.0, episodes=500)
    fresh.load_state_dict(trained.state_dict())
    assert fresh.coef == trained.coef != 0.1
    assert fresh.state_dict() == trained.state_dict()
