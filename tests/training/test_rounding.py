"""Masters rounded into bf16 weights: together they follow, however small the updates are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rlhf.training.config import OptimConfig
from rlhf.training.optimizer import MasterAdamW, parameter_group, round_into

OPTIM = OptimConfig(
    lr=1e-5, weight_decay=0.0, eps=1e-8, schedule="linear", warmup_fraction=0.0, max_grad_norm=1e9
)


def test_weights_that_bf16_can_hold_are_held_exactly() -> None:
    values = torch.randn(3, 70_000).bfloat16() * torch.tensor([1e-20, 1.0, 1e20])[:, None].bfloat16()
    parameter = torch.zeros_like(values)
    round_into(parameter, values.float())
    assert torch.equal(parameter, values)


def test_what_is_not_finite_stays_so() -> None:
    nan = torch.tensor([0x7FFFFFFF, 0x7FC00000], dtype=torch.int32).view(torch.float32)  # CUDA's
    masters = torch.cat([nan, torch.tensor([torch.inf, -torch.inf])]).repeat(100)
    parameter = torch.zeros(400, dtype=torch.bfloat16)
    round_into(parameter, masters)
    assert parameter.view(100, 4)[:, :2].isnan().all()
    assert not parameter.isfinite().any()


@pytest.mark.parametrize("value", [1.0, -0.75, 3e-5])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_weights_follow_their_masters_in_the_mean(value: float, share: float) -> None:
    """A part of a step of bf16 takes that part of the weights over to the next number, and no other."""
    start = torch.tensor(value).bfloat16()
    following = (start.view(torch.int16) + 1).view(torch.bfloat16)
    step = following.float() - start.float()
    parameter = start.expand(80, 1000).clone()
    round_into(parameter, start.float().expand(80, 1000) + share * step)
    assert set(parameter.unique().tolist()) == {start.item(), following.item()}
    for part in (parameter, parameter[:8], parameter[:, :100], parameter[:, ::7]):
        assert float((part == following).float().mean()) == pytest.approx(share, abs=0.02)


def test_a_shard_is_rounded_as_the_whole() -> None:
    masters = torch.randn(100, 999)
    whole, parts = (torch.zeros(100, 999, dtype=torch.bfloat16) for _ in range(2))
    round_into(whole, masters)
    for begin in (0, 30, 60, 90):
        round_into(parts[begin : begin + 30], masters[begin : begin + 30], begin * 999)
    assert torch.equal(parts, whole)
    assert not torch.equal(whole, masters.bfloat16())


def test_small_updates_move_a_model_from_the_first_step_on() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(300, 300, dtype=torch.bfloat16)
    before = layer.weight.detach().float()
    optimizer = MasterAdamW([parameter_group([*layer.parameters()][:1], OPTIM)])
    layer(torch.randn(4, 300).bfloat16()).float().square().sum().backward()
    optimizer.step()
    (master,) = optimizer.state_dict()["masters"]
    moved = (layer.weight.float() - before) / (master - before)
    assert float((moved == 0).float().mean()) > 0.5  # a step of bf16 is larger than an update
    assert float(moved.mean()) == pytest.approx(1.0, abs=0.05)
