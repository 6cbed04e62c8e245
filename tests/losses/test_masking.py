"""What must not matter to any loss over tokens: padding, splitting into micro-batches, order of rows."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf.losses.language import next_token_loss
from rlhf.losses.policy import clipped_policy_loss
from rlhf.losses.value import clipped_value_loss

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


def policy(x_BR: Tensor, old_BR: Tensor, target_BR: Tensor, mask_BR: Tensor, total: int) -> Tensor:
    return clipped_policy_loss(
        x_BR, old_BR, target_BR, mask_BR, clip=0.2, total_tokens=total, clip_high=0.3, dual_clip=2.0
    ).loss


def value(x_BR: Tensor, old_BR: Tensor, target_BR: Tensor, mask_BR: Tensor, total: int) -> Tensor:
    return clipped_value_loss(x_BR, old_BR, target_BR, mask_BR, clip=0.2, total_tokens=total).loss


def language(x_BR: Tensor, old_BR: Tensor, target_BR: Tensor, mask_BR: Tensor, total: int) -> Tensor:
    return next_token_loss(x_BR, mask_BR, total_tokens=total)


every_loss = pytest.mark.parametrize("loss", [policy, value, language])
LENGTHS_B = torch.tensor([6, 1, 4, 3, 2])
MASK_BR = torch.arange(6) < LENGTHS_B[:, None]
TOTAL = int(LENGTHS_B.sum())


def tensors() -> Tensor:
    """[3, B, R]: trained, old and target, far enough apart that every branch is taken."""
    return torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1))


def loss_and_gradient(loss: Loss, inputs: Tensor, mask_BR: Tensor) -> tuple[Tensor, Tensor]:
    x_BR = inputs[0].clone().requires_grad_()
    result = loss(x_BR, inputs[1], inputs[2], mask_BR, TOTAL)
    (gradient_BR,) = torch.autograd.grad(result, x_BR)
    return result.detach(), gradient_BR


@every_loss
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("which", [[0], [1], [2], [0, 1, 2]])
def test_nothing_in_padding_reaches_loss_or_gradient(loss: Loss, garbage: float, which: list[int]) -> None:
    clean, dirty = tensors(), tensors()
    for i in which:
        dirty[i][~MASK_BR] = garbage
    expected, expected_gradient_BR = loss_and_gradient(loss, clean, MASK_BR)
    result, gradient_BR = loss_and_gradient(loss, dirty, MASK_BR)
    assert torch.equal(result, expected)
    assert torch.equal(gradient_BR, expected_gradient_BR)
    assert not gradient_BR[~MASK_BR].any()
    assert gradient_BR[MASK_BR].any()


@every_loss
@pytest.mark.parametrize("sizes", [[1, 4], [2, 3], [1, 1, 1, 1, 1]])
def test_micro_batches_cropped_to_their_own_length_add_up(loss: Loss, sizes: list[int]) -> None:
    expected, expected_gradient_BR = loss_and_gradient(loss, tensors(), MASK_BR)
    total, gradients = torch.zeros(()), torch.zeros(5, 6)
    for rows in torch.arange(5).split(sizes):
        longest = int(LENGTHS_B[rows].max())
        part, gradient_BR = loss_and_gradient(loss, tensors()[:, rows, :longest], MASK_BR[rows, :longest])
        total += part
        gradients[rows, :longest] = gradient_BR
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(gradients, expected_gradient_BR)


@every_loss
def test_the_order_of_rows_does_not_matter(loss: Loss) -> None:
    order = torch.tensor([3, 0, 4, 2, 1])
    expected, expected_gradient_BR = loss_and_gradient(loss, tensors(), MASK_BR)
    result, gradient_BR = loss_and_gradient(loss, tensors()[:, order], MASK_BR[order])
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(gradient_BR, expected_gradient_BR[order])


@every_loss
def test_a_micro_batch_without_tokens_still_has_a_graph(loss: Loss) -> None:
    # A rank whose share is empty must take part in the backward pass, or the other ranks wait for it.
    result, gradient_BR = loss_and_gradient(loss, tensors(), torch.zeros_like(MASK_BR))
    assert result.item() == 0.0
    assert not gradient_BR.any()


@every_loss
def test_shapes_that_would_broadcast_are_refused(loss: Loss) -> None:
    with pytest.raises(AssertionError):
        x_BR, old_BR, target_BR = tensors()
        loss(x_BR, old_BR, target_BR, MASK_BR[:1], TOTAL)


def test_next_token_loss_by_hand() -> None:
    logp_BT = torch.tensor([[-1.0, -2.0], [-4.0, math.nan]], requires_grad=True)
    mask_BT = torch.tensor([[True, True], [False, False]])
    result = next_token_loss(logp_BT, mask_BT, total_tokens=10)
    result.backward()
    assert result.item() == pytest.approx((1.0 + 2.0) / 10)
    torch.testing.assert_close(logp_BT.grad, torch.tensor([[-0.1, -0.1], [0.0, 0.0]]))
