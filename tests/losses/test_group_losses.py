"""The means, the sequence ratio and the KL of losses without a critic, by hand. B sequences, R tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf.losses.policy import LOG_RATIO_LIMIT, PolicyLoss, clipped_policy_loss, kl_loss, loss_weights
from rlhf.rl.group import group_advantage, neighbours
from rlhf.rl.rollout import length_mask

NAN = float("nan")
MASK_BR = torch.tensor([[True, True, True], [True, False, False]])
LENGTH_B = MASK_BR.sum(1)
OLD_BR = torch.where(MASK_BR, -2.0, NAN)
ADVANTAGE_BR = torch.where(MASK_BR, torch.tensor([[1.0], [-2.0]]), NAN)


def loss_of(ratios: list[list[float]], **options: object) -> tuple[PolicyLoss, Tensor]:
    logp_BR = (OLD_BR + torch.tensor(ratios).log()).requires_grad_()
    found = clipped_policy_loss(
        logp_BR, OLD_BR, ADVANTAGE_BR, MASK_BR, clip=0.2, total_tokens=4, **options,  # type: ignore[arg-type]  # of several types
    )  # fmt: skip
    (gradient_BR,) = torch.autograd.grad(found.loss, logp_BR)
    return found, gradient_BR


ONES = [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]


@pytest.mark.parametrize(
    ("mean", "loss", "first", "second"),
    [
        # four tokens: 3 x -1 and +2
        ("token", (-3 + 2) / 4, -1 / 4, 2 / 4),
        # two sequences: -1 and +2; each of three tokens has a third of its sequence's half
        ("sequence", (-1 + 2) / 2, -1 / 6, 2 / 2),
        # two sequences of at most ten tokens
        ("constant", (-3 + 2) / 20, -1 / 20, 2 / 20),
    ],
)
def test_the_three_means_by_hand(mean: str, loss: float, first: float, second: float) -> None:
    weight_B = loss_weights(LENGTH_B, mean, total_tokens=4, num_episodes=2, longest=10)  # type: ignore[arg-type]  # one of the three
    found, gradient_BR = loss_of(ONES, weight_B=weight_B)
    assert found.loss.item() == pytest.approx(loss)
    expected = [[first] * 3, [second, 0.0, 0.0]]
    torch.testing.assert_close(gradient_BR, torch.tensor(expected))


def test_a_mean_does_not_depend_on_how_rows_are_split() -> None:
    for mean in ("token", "sequence", "constant"):
        parts = []
        for rows in (slice(0, 1), slice(1, 2)):
            weight_B = loss_weights(LENGTH_B[rows], mean, total_tokens=4, num_episodes=2, longest=10)
            parts.append(
                clipped_policy_loss(
                    OLD_BR[rows] + 0.1, OLD_BR[rows], ADVANTAGE_BR[rows], MASK_BR[rows],
                    clip=0.2, total_tokens=4, weight_B=weight_B,
                ).loss.item()
            )  # fmt: skip
        weight_B = loss_weights(LENGTH_B, mean, total_tokens=4, num_episodes=2, longest=10)
        whole, _ = loss_of([[math.exp(0.1)] * 3] * 2, weight_B=weight_B)
        assert sum(parts) == pytest.approx(whole.loss.item()), mean


def test_gspo_by_hand() -> None:
    """Ratios 1.5, 1 and 0.8 have the geometric mean 1.2^(1/3) = 1.0627, which is in the range; 1.5 alone is
    not. Each of the three log-probabilities gets a third of the gradient -A s, in half of the mean."""
    weight_B = loss_weights(LENGTH_B, "sequence", total_tokens=4, num_episodes=2, longest=10)
    found, gradient_BR = loss_of([[1.5, 1.0, 0.8], [1.1, 1.0, 1.0]], weight_B=weight_B, ratio="sequence")
    ratio = 1.2 ** (1 / 3)
    assert found.loss.item() == pytest.approx((-ratio + 2 * 1.1) / 2, rel=1e-5)
    torch.testing.assert_close(gradient_BR, torch.tensor([[-ratio / 6] * 3, [2 * 1.1 / 2, 0.0, 0.0]]))
    assert found.clipped.item() == 0


def test_gspo_clips_a_whole_response() -> None:
    """Geometric mean 1.3 with a positive advantage: no token of it learns, not even the one with ratio 1."""
    weight_B = loss_weights(LENGTH_B, "sequence", total_tokens=4, num_episodes=2, longest=10)
    found, gradient_BR = loss_of([[1.3**3, 1.0, 1.0], [1.0] * 3], weight_B=weight_B, ratio="sequence")
    assert found.loss.item() == pytest.approx((-1.2 + 2.0) / 2, rel=1e-5)
    assert not gradient_BR[0].any() and found.clipped.item() == 3


def test_gspo_with_one_token_is_ppo() -> None:
    generator = torch.Generator().manual_seed(0)
    old_BR, advantage_BR = torch.randn(2, 64, 1, generator=generator)
    logp_BR = (old_BR + 0.3 * torch.randn(64, 1, generator=generator)).requires_grad_()
    mask_BR = torch.ones(64, 1, dtype=torch.bool)
    weight_B = loss_weights(mask_BR.sum(1), "sequence", total_tokens=64, num_episodes=64, longest=9)
    of_gspo = clipped_policy_loss(
        logp_BR, old_BR, advantage_BR, mask_BR, clip=0.2, total_tokens=64, weight_B=weight_B, ratio="sequence"
    )
    of_ppo = clipped_policy_loss(logp_BR, old_BR, advantage_BR, mask_BR, clip=0.2, total_tokens=64)
    assert 0 < of_ppo.clipped < 64
    for first, second in zip(of_gspo, of_ppo, strict=True):
        torch.testing.assert_close(first, second)
    gradients = [torch.autograd.grad(each.loss, logp_BR)[0] for each in (of_gspo, of_ppo)]
    torch.testing.assert_close(*gradients)


def test_the_first_update_of_grpo_is_rloos_by_hand() -> None:
    """Three answers with rewards 1, 2 and 6. RLOO's advantages are -3, -1.5 and 4.5, and the gradient of a
    token's log-probability is -A / 3, the mean over answers. GRPO's is two thirds of it."""
    mask_BR = length_mask(torch.tensor([2, 1, 3]))
    reward_B, one_group_B = torch.tensor([1.0, 2.0, 6.0]), neighbours(3, 3)
    gradient_BR = first_update(torch.zeros(3, 3), reward_B, mask_BR, one_group_B)
    expected_BR = torch.where(mask_BR, torch.tensor([[3.0], [1.5], [-4.5]]) / 3, 0.0)
    torch.testing.assert_close(gradient_BR * 3 / 2, expected_BR)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_the_first_update_of_grpo_is_rloos_up_to_n_over_n_minus_1(size: int) -> None:
    """RLOO is REINFORCE, -mean(A log pi(y)), with the others' mean as baseline: Ahmadian et al. 2024,
    arXiv:2402.14740, section 3.2. Without the deviation, with ratios of 1 and the same mean, GRPO's gradient
    in the policy's logits is (n - 1) / n of it."""
    generator = torch.Generator().manual_seed(size)
    mask_BR = length_mask(torch.randint(1, 6, (4 * size,), generator=generator))
    token_BR = torch.randint(0, 7, mask_BR.shape, generator=generator)
    reward_B, logits_V = (torch.randn(number, generator=generator) for number in (4 * size, 7))
    logits_V.requires_grad_()
    logp_BR = logits_V.log_softmax(0)[token_BR]

    others_B = torch.cat([(part.sum() - part) / (size - 1) for part in reward_B.split(size)])
    answer_B = torch.where(mask_BR, logp_BR, 0.0).sum(1)
    rloo = -((reward_B - others_B) * answer_B).mean()
    (of_rloo_V,) = torch.autograd.grad(rloo, logits_V, retain_graph=True)

    of_tokens_BR = first_update(logp_BR.detach(), reward_B, mask_BR, neighbours(4 * size, size))
    (of_grpo_V,) = torch.autograd.grad(logp_BR, logits_V, of_tokens_BR)
    assert float(of_rloo_V.norm()) > 0.01
    torch.testing.assert_close(of_grpo_V * size / (size - 1), of_rloo_V)


def first_update(logp_BR: Tensor, reward_B: Tensor, mask_BR: Tensor, group_B: Tensor) -> Tensor:
    """The gradient of GRPO's loss in the log-probabilities of the policy that sampled, without the deviation;
    the mean over answers of the sum over their tokens."""
    length_B, longest = mask_BR.sum(1), mask_BR.shape[1]
    reward_BR = torch.zeros_like(logp_BR)
    reward_BR[torch.arange(len(reward_B)), length_B - 1] = reward_B
    total = int(length_B.sum())
    weight_B = loss_weights(
        length_B, "constant", total_tokens=total, num_episodes=len(reward_B), longest=longest
    )
    own_BR = logp_BR.clone().requires_grad_()
    advantage_BR = group_advantage(reward_BR, mask_BR, group_B, divide_by_deviation=False)
    found = clipped_policy_loss(
        own_BR, logp_BR, advantage_BR, mask_BR, clip=0.2, total_tokens=total, weight_B=weight_B
    )
    (gradient_BR,) = torch.autograd.grad(found.loss, own_BR)
    return longest * gradient_BR


def test_the_kl_loss_by_hand() -> None:
    """log s = reference - policy: 0.5, 0 and -1; k3 has the gradient 1 - s. The second row has none."""
    logp_BR = torch.tensor([[-1.0, -2.0, -1.0], [-3.0, NAN, NAN]], requires_grad=True)
    reference_BR = torch.tensor([[-0.5, -2.0, -2.0], [-3.0, NAN, NAN]])
    loss = kl_loss(logp_BR, reference_BR, MASK_BR, total_tokens=4, weight_B=None)
    assert loss.item() == pytest.approx((math.exp(0.5) - 1.5 + math.exp(-1.0)) / 4)
    (gradient_BR,) = torch.autograd.grad(loss, logp_BR)
    expected = [[(1 - math.exp(0.5)) / 4, 0.0, (1 - math.exp(-1)) / 4], [0.0, 0.0, 0.0]]
    torch.testing.assert_close(gradient_BR, torch.tensor(expected))
    weight_B = loss_weights(LENGTH_B, "sequence", total_tokens=4, num_episodes=2, longest=10)
    of_sequences = kl_loss(logp_BR, reference_BR, MASK_BR, total_tokens=4, weight_B=weight_B)
    assert of_sequences.item() == pytest.approx((math.exp(0.5) - 1.5 + math.exp(-1.0)) / 3 / 2)


@pytest.mark.parametrize(("rows", "total_tokens"), [(1, 4), (2, 0)])
def test_shapes_that_would_broadcast_and_no_tokens_are_refused(rows: int, total_tokens: int) -> None:
    with pytest.raises(AssertionError):
        kl_loss(
            torch.zeros(2, 3), torch.zeros(2, 3), MASK_BR[:rows], total_tokens=total_tokens, weight_B=None
        )  # fmt: skip


def test_the_kl_loss_of_a_token_that_only_the_policy_knows_earns_no_gradient() -> None:
    """The reference's log probability is 499 below the policy's: its k3 is cut to that of the limit."""
    logp_BR = torch.tensor([[-1.0]], requires_grad=True)
    loss = kl_loss(logp_BR, torch.tensor([[-500.0]]), torch.tensor([[True]]), total_tokens=1, weight_B=None)
    (gradient_BR,) = torch.autograd.grad(loss, logp_BR)
    assert loss.item() == pytest.approx(math.expm1(-LOG_RATIO_LIMIT) + LOG_RATIO_LIMIT, rel=1e-5)
    assert gradient_BR.item() == 0.0


def test_the_kl_loss_of_a_token_that_became_impossible_is_finite() -> None:
    logp_BR = torch.tensor([[-500.0]], requires_grad=True)
    loss = kl_loss(logp_BR, torch.tensor([[-1.0]]), torch.tensor([[True]]), total_tokens=1, weight_B=None)
    (gradient_BR,) = torch.autograd.grad(loss, logp_BR)
    assert loss.item() == pytest.approx(math.expm1(LOG_RATIO_LIMIT) - LOG_RATIO_LIMIT, rel=1e-5)
    assert gradient_BR.item() == 0.0
