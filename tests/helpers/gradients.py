"""The gradients of a training step, to compare with those of another trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

from helpers.jobs import on_cpu
from rlhf.training.config import OptimConfig
from rlhf.training.make_engine import make_engine

OPTIM = OptimConfig(
    lr=1e-9, weight_decay=0.0, eps=1e-8, schedule="constant", warmup_fraction=0.0, max_grad_norm=1e9
)
Gradients = dict[str, Tensor]


def ours(
    model: nn.Module, wrapped: nn.Module, step: Callable[[Any], dict[str, float]]
) -> tuple[float, Gradients]:
    """The loss, and by name the gradients, which the engine hands to its masters."""
    engine: Any = make_engine(wrapped, [(model.parameters(), OPTIM)], on_cpu())
    engine.set_rates(0, 10)
    kept: Gradients = {}
    take = engine.step

    def keep() -> None:
        kept.update(gradients_in(engine, model))
        take()

    engine.step = keep
    return step(engine)["loss"], kept


def gradients_in(engine: Any, model: nn.Module) -> Gradients:
    """What an engine would take its next step by."""
    names = {id(each): name for name, each in model.named_parameters()}
    pairs = engine.optimizer._pairs
    return {names[id(each)]: master.grad.clone() for each, master in pairs if master.grad is not None}


def agree(one: tuple[float, Gradients], other: tuple[float, Gradients]) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-4)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        assert float((gradient - other[1][name]).norm() / other[1][name].norm()) < 1e-4, name
