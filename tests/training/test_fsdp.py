"""FSDP2's engine on one rank; what it does on several is in tests/distributed and tests/faults."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from helpers.trained import trained_weights
from rlhf.distributed.compute import Compute
from rlhf.training.config import OptimConfig
from rlhf.training.fsdp import FsdpEngine, copy_rows
from rlhf.training.optimizer import parameter_group

RATES = (0.1, 0.4)


@pytest.fixture
def compute() -> Iterator[Compute]:
    store = distributed.HashStore()  # type: ignore[attr-defined]  # torch's stub lacks it
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield Compute("cpu", "float32", "fsdp2")
    distributed.destroy_process_group()


class Two(nn.Module):
    """Two groups of one number each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.ones(1)) for _ in range(2))

    def forward(self, slopes: tuple[float, float]) -> Tensor:
        return (slopes[0] * self.first + slopes[1] * self.second).sum()


def make(compute: Compute) -> FsdpEngine:
    model = Two()
    settings = {
        "weight_decay": 0.0,
        "eps": 1e-8,
        "schedule": "linear",
        "warmup_fraction": 0.0,
        "max_grad_norm": 1e9,
    }
    configs = [OptimConfig.model_validate({"lr": rate, **settings}) for rate in RATES]
    engine = FsdpEngine(model, [([model.first], configs[0]), ([model.second], configs[1])], compute)
    engine.set_rates(0, 2)
    return engine


def step(engine: FsdpEngine, *slopes: float) -> dict[str, float]:
    """The weights behind it."""
    engine.backward(engine.model(slopes), last=True)
    engine.step()
    return {name: float(value) for name, value in trained_weights(engine, engine.model).items()}


def test_what_is_kept_of_the_weights_does_not_follow_them(compute: Compute) -> None:
    engine = make(compute)
    kept = trained_weights(engine, engine.model)
    assert step(engine, 3.0, 4.0) == pytest.approx({"first": 0.9, "second": 0.6})
    assert {name: float(value) for name, value in kept.items()} == {"first": 1.0, "second": 1.0}


def test_a_gradient_that_is_not_finite_moves_no_group_and_is_counted(compute: Compute) -> None:
    engine = make(compute)
    assert step(engine, math.nan, 4.0) == {"first": 1.0, "second": 1.0}
    assert engine.skipped_steps == 1 and not math.isfinite(engine.grad_norm)
    assert step(engine, 3.0, 4.0) == pytest.approx({"first": 0.9, "second": 0.6})
    assert engine.skipped_steps == 1 and engine.grad_norms == pytest.approx([3.0, 4.0])


def test_weights_gathered_without_gradients_are_not_used_behind_a_step(compute: Compute) -> None:
    engine = make(compute)
    with torch.no_grad():
        assert float(engine.model((1.0, 1.0))) == 2.0
    step(engine, 3.0, 4.0)
    with torch.no_grad():
        assert float(engine.model((1.0, 1.0))) == pytest.approx(1.5)


def test_the_whole_weights_are_gone_before_the_masters_are_made(
    compute: Compute, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Two()
    whole = [weakref.ref(parameter) for parameter in model.parameters()]
    left: list[int] = []

    def count(*arguments: Any) -> dict[str, Any]:
        left.append(sum(each() is not None for each in whole))
        return parameter_group(*arguments)

    monkeypatch.setattr("rlhf.training.fsdp.parameter_group", count)  # called with the masters
    settings = {
        "lr": 0.1,
        "weight_decay": 0.0,
        "eps": 1e-8,
        "schedule": "linear",
        "warmup_fraction": 0.0,
        "max_grad_norm": 1e9,
    }
    FsdpEngine(model, [(model.parameters(), OptimConfig.model_validate(settings))], compute)
    assert left == [0]


@pytest.mark.parametrize(("ranks", "now"), [(2, 3), (4, 2), (3, 1), (1, 4)])
def test_another_number_of_ranks_finds_its_rows_in_the_old_pieces(ranks: int, now: int) -> None:
    whole = torch.arange(14.0).view(7, 2)
    pieces = [whole[each * math.ceil(7 / ranks) :][: math.ceil(7 / ranks)] for each in range(ranks)]
    found = []
    for rank in range(now):
        start = rank * math.ceil(7 / now)
        target = torch.full((max(0, min(math.ceil(7 / now), 7 - start)), 2), math.nan)
        copy_rows(target, pieces, start)
        found.append(target)
    assert torch.equal(torch.cat(found), whole)


def test_pieces_that_lack_rows_are_noticed() -> None:
    with pytest.raises(AssertionError, match="1 of 2 rows from 2 on"):
        copy_rows(torch.zeros(2, 1), [torch.ones(3, 1)], 2)
