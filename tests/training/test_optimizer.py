"""The optimizer of every stage: AdamW on fp32 masters, clipping by group, its schedule and average."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rlhf.training.optimizer
from rlhf.training.config import OptimConfig, Schedule
from rlhf.training.optimizer import (
    MasterAdamW,
    parameter_group,
    rate_factor,
)


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def config(**changes: float) -> OptimConfig:
    values = {
        "lr": 1e-2,
        "weight_decay": 0.0,
        "eps": 1e-8,
        "schedule": "linear",
        "warmup_fraction": 0.0,
        "max_grad_norm": 1e9,
    }
    return OptimConfig.model_validate(values | changes)


def optimizer_of(
    *groups: tuple[Iterable[nn.Parameter], OptimConfig],
    global_sum: Callable[[Tensor], Tensor] | None = None,
) -> MasterAdamW:
    return MasterAdamW(
        [parameter_group(parameters, config) for parameters, config in groups], global_sum=global_sum
    )


def batches(count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(12, 6, generator=generator).to(dtype) for _ in range(count)]


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor, pieces: int = 1) -> None:
    for piece in batch.chunk(pieces):
        (model(piece).float().pow(2).sum() / len(batch)).backward()
    optimizer.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("max_grad_norm", [1e9, 0.05])
def test_in_fp32_it_is_torchs_adamw(weight_decay: float, max_grad_norm: float) -> None:
    ours, theirs = network(), network()
    optimizer = optimizer_of(
        (ours.parameters(), config(weight_decay=weight_decay, max_grad_norm=max_grad_norm))
    )
    matrices, biases = ([each for each in theirs.parameters() if each.ndim == ndim] for ndim in (2, 1))
    spared: dict[str, Any] = {"params": biases, "weight_decay": 0.0}
    reference = torch.optim.AdamW(
        [{"params": matrices}, spared], lr=1e-2, weight_decay=weight_decay, eps=1e-8
    )
    assert matrices and biases
    for batch in batches(5):
        take_step(ours, optimizer, batch)
        (theirs(batch).pow(2).sum() / len(batch)).backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), max_grad_norm)
        reference.step()
        reference.zero_grad()
    for mine, expected in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-5)
    assert not torch.equal(weights(ours)[0], weights(network())[0])


def test_the_first_step_by_hand() -> None:
    """Adam's first step is lr x sign(gradient), whatever its size; decay is decoupled: w (1 - lr x decay), of
    a matrix and not of a bias."""
    matrix, bias = nn.Parameter(torch.tensor([[1.0, -2.0]])), nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = optimizer_of(([matrix, bias], config(lr=0.1, weight_decay=0.5, eps=1e-12)))
    ((matrix + bias) * torch.tensor([1e-3, -7.0])).sum().backward()
    optimizer.step()
    torch.testing.assert_close(matrix.detach(), torch.tensor([[1 * 0.95 - 0.1, -2 * 0.95 + 0.1]]))
    torch.testing.assert_close(bias.detach(), torch.tensor([1 - 0.1, -2 + 0.1]))


def test_a_step_that_is_skipped_does_not_decay() -> None:
    parameter = nn.Parameter(torch.ones(1, 2))
    optimizer = optimizer_of(([parameter], config(lr=0.1, weight_decay=0.5)))
    (parameter * math.nan).sum().backward()
    optimizer.step()
    assert parameter.tolist() == [[1.0, 1.0]]


def test_updates_too_small_for_bf16_add_up_in_the_masters() -> None:
    parameter = nn.Parameter(torch.tensor([1.0], dtype=torch.bfloat16))
    optimizer = optimizer_of(([parameter], config(lr=1e-4)))
    seen = []
    for _ in range(60):
        parameter.float().sum().backward()
        optimizer.step()
        seen.append(parameter.item())
    assert seen[:10] == [1.0] * 10  # bf16 has no number between 1 and 0.99609
    (master,) = optimizer.state_dict()["masters"]
    assert float(master) == pytest.approx(1 - 60 * 1e-4, abs=1e-5)
    assert seen[-1] == float(master.bfloat16()) == 0.9921875  # the nearest one to 0.994


def test_the_gradients_of_a_single_micro_batch_take_no_more_room_than_its_weights() -> None:
    model = network(torch.bfloat16)
    optimizer = optimizer_of((model.parameters(), config()))
    masters = [master for group in optimizer._inner.param_groups for master in group["params"]]
    for pieces, dtype in ((1, torch.bfloat16), (2, torch.float32)):
        for batch in batches(1, torch.bfloat16)[0].chunk(pieces):
            model(batch).float().sum().backward()
        assert {master.grad.dtype for master in masters} == {dtype}
        optimizer.step()


def test_bf16_follows_fp32_closely() -> None:
    rough, fine = network(torch.bfloat16), network()
    with torch.no_grad():
        for target, source in zip(fine.parameters(), rough.parameters(), strict=True):
            target.copy_(source)
    optimizers = [optimizer_of((model.parameters(), config(lr=1e-3))) for model in (rough, fine)]
    for batch in batches(30):
        take_step(rough, optimizers[0], batch.bfloat16(), pieces=4)
        take_step(fine, optimizers[1], batch.bfloat16().float())
    for mine, expected in zip(optimizers[0].state_dict()["masters"], weights(fine), strict=True):
        assert (mine - expected).abs().mean() < 4e-3
    assert all(parameter.dtype == torch.bfloat16 for parameter in rough.parameters())


@pytest.mark.parametrize("pieces", [2, 3, 12])
def test_accumulated_micro_batches_equal_one_batch(pieces: int) -> None:
    whole, split = network(), network()
    for model, count in ((whole, 1), (split, pieces)):
        optimizer = optimizer_of((model.parameters(), config(max_grad_norm=0.1)))
        for batch in batches(3):
            take_step(model, optimizer, batch, count)
    for mine, expected in zip(weights(split), weights(whole), strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-4)


def test_gradients_are_added_up_in_fp32() -> None:
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = optimizer_of(([parameter], config()))
    for _ in range(1000):  # in bf16 the sum would stick at 256
        parameter.sum().backward()
    optimizer.step()
    assert optimizer.grad_norms == [1000.0]
    assert parameter.grad is None


def test_each_group_is_clipped_by_its_own_norm() -> None:
    policy, critic = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    # a large epsilon makes Adam's first step nearly proportional to the gradient: lr x g / (|g| + eps)
    first, second = config(lr=1.0, eps=1e3, max_grad_norm=1.0), config(lr=10.0, eps=1e3, max_grad_norm=1.0)
    optimizer = optimizer_of(([policy], first), ([critic], second))
    (policy @ torch.tensor([0.3, 0.4]) + 1000 * critic.sum()).backward()
    optimizer.step()
    assert optimizer.grad_norms == pytest.approx([0.5, 1000.0])
    torch.testing.assert_close(policy.detach(), -torch.tensor([0.3, 0.4]) / 1e3, rtol=1e-3, atol=0)
    torch.testing.assert_close(critic.detach(), -torch.tensor([10.0]) / 1e3, rtol=2e-3, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_touches_nothing(bad: float) -> None:
    model = network()
    optimizer = optimizer_of((model[0].parameters(), config()), (model[2].parameters(), config()))
    take_step(model, optimizer, batches(1)[0])
    before, state = weights(model), optimizer.state_dict()
    moments = [value.clone() for entry in state["adamw"]["state"].values() for value in entry.values()]
    (model(batches(1)[0]).sum() + bad * [*model.parameters()][-1].sum()).backward()
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(now, then) for now, then in zip(weights(model), before, strict=True))
    after = [value for entry in optimizer.state_dict()["adamw"]["state"].values() for value in entry.values()]
    assert all(torch.equal(now, then) for now, then in zip(after, moments, strict=True))
    take_step(model, optimizer, batches(1)[0])  # the bad gradient is forgotten
    assert optimizer.skipped_steps == 1
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert not torch.equal(weights(model)[0], before[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_optimizer_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    data = batches(6, dtype)
    model = network(dtype)
    optimizer = optimizer_of((model.parameters(), config()))
    for batch in data[:3]:
        take_step(model, optimizer, batch)
    saved = {
        "masters": [master.clone() for master in optimizer.state_dict()["masters"]],
        "adamw": torch.utils._pytree.tree_map(
            lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, optimizer.state_dict()["adamw"]
        ),
        "skipped_steps": optimizer.state_dict()["skipped_steps"],
    }
    for batch in data[3:]:
        take_step(model, optimizer, batch)

    resumed = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)  # other weights
    second = optimizer_of((resumed.parameters(), config()))
    second.load_state_dict(saved)
    for batch in data[3:]:
        take_step(resumed, second, batch)
    for mine, expected in zip(weights(resumed), weights(model), strict=True):
        assert torch.equal(mine, expected)


def test_the_state_is_plain_tensors_and_numbers_that_a_file_keeps(tmp_path: Path) -> None:
    """With masters finer than the model's weights, and the count of skipped steps."""
    model = network(torch.bfloat16)
    optimizer = optimizer_of((model[0].parameters(), config(lr=1e-3)), (model[2].parameters(), config()))
    (model(batches(1, torch.bfloat16)[0]).sum() * math.nan).backward()
    optimizer.step()
    take_step(model, optimizer, batches(1, torch.bfloat16)[0])
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")

    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert set(state) == {"masters", "adamw", "skipped_steps"}
    assert state["skipped_steps"] == 1
    assert all(master.dtype == torch.float32 for master in state["masters"])
    assert any(
        not torch.equal(master, weight.float())
        for master, weight in zip(state["masters"], weights(model), strict=True)
    )
    other = network(torch.bfloat16)
    second = optimizer_of((other[0].parameters(), config(lr=1e-3)), (other[2].parameters(), config()))
    second.load_state_dict(state)
    assert second.skipped_steps == 1
    assert all(torch.equal(now, then) for now, then in zip(weights(other), weights(model), strict=True))
    for mine, kept in zip(second.state_dict()["masters"], state["masters"], strict=True):
        assert torch.equal(mine, kept)


def test_a_state_of_other_parameters_is_refused() -> None:
    one, two = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    state = optimizer_of(([one], config())).state_dict()
    with pytest.raises(ValueError, match="argument"):
        optimizer_of(([one, two], config())).load_state_dict(state)


@pytest.mark.parametrize("bucket", [1, 30, 10**6])
def test_gradients_of_two_ranks_are_added_up(monkeypatch: pytest.MonkeyPatch, bucket: int) -> None:
    """As if another rank had the same half of the batch: equal to one rank with the whole of it."""
    monkeypatch.setattr(rlhf.training.optimizer, "BUCKET_ELEMENTS", bucket)
    sizes: list[int] = []

    def with_its_twin(values: Tensor) -> Tensor:
        sizes.append(values.numel())
        return 2 * values

    alone, shared = network(), network()
    settings = config(max_grad_norm=0.1)
    whole = optimizer_of((alone.parameters(), settings))
    half = optimizer_of((shared.parameters(), settings), global_sum=with_its_twin)
    for batch in batches(3):
        take_step(alone, whole, torch.cat([batch, batch]))
        (shared(batch).pow(2).sum() / (2 * len(batch))).backward()  # divided by the global count
        half.step()
        assert half.grad_norms == pytest.approx(whole.grad_norms, rel=1e-5)
    for mine, expected in zip(weights(shared), weights(alone), strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-5)
    step_by_step = {1: [48, 8, 24, 3], 30: [48, 32, 3], 10**6: [83]}  # of 48 weights, 8 biases, 24 and 3
    assert sizes == 3 * step_by_step[bucket]


def test_a_gradient_that_is_not_finite_on_another_rank_is_skipped_here_too() -> None:
    model = network()
    optimizer = optimizer_of((model.parameters(), config()), global_sum=lambda values: values + math.nan)
    before = weights(model)
    take_step(model, optimizer, batches(1)[0])
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(now, then) for now, then in zip(weights(model), before, strict=True))


def test_frozen_parameters_are_left_out() -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = optimizer_of((model.parameters(), config(weight_decay=1.0)))
    before = weights(model)
    take_step(model, optimizer, batches(1)[0])
    same = [torch.equal(now, then) for now, then in zip(weights(model), before, strict=True)]
    assert same == [True, True, False, False]


@pytest.mark.parametrize(
    ("num_steps", "warmup", "expected"),
    [
        (4, 0.0, [1, 3 / 4, 2 / 4, 1 / 4]),
        (6, 1 / 3, [1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4]),
        (1, 0.1, [1]),
        (2, 0.75, [1 / 3, 2 / 3]),
    ],
)
def test_the_schedule_by_hand(num_steps: int, warmup: float, expected: list[float]) -> None:
    rates = [rate_factor("linear", step, num_steps, round(num_steps * warmup)) for step in range(num_steps)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4, 0, 0]),
        ("cosine", [1 / 3, 2 / 3, 1, (2 + 2**0.5) / 4, 1 / 2, (2 - 2**0.5) / 4, 0, 0]),
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_each_schedule_warms_up_alike(schedule: Schedule, expected: list[float]) -> None:
    """Six steps, of which a third warm up; and two behind the last."""
    assert [rate_factor(schedule, step, 6, 2) for step in range(8)] == pytest.approx(expected)
