"""The engine of a whole model: its rates, what it freezes, what it tells of a step, going on from a file."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.jobs import WithIdlePasses, on_cpu
from helpers.trained import trained_weights
from rlhf.config import ConfigError
from rlhf.distributed.compute import Zero
from rlhf.training.config import OptimConfig
from rlhf.training.engine import PlainEngine
from rlhf.training.make_engine import make_engine


def config(**changes: Any) -> OptimConfig:
    values = {
        "lr": 1.0,
        "weight_decay": 0.0,
        "eps": 1e-8,
        "schedule": "linear",
        "warmup_fraction": 0.0,
        "max_grad_norm": 1e9,
    }
    return OptimConfig.model_validate(values | changes)


class Two(nn.Module):
    """Two groups of one number each; AdamW moves each by its rate in a step, whatever the gradient's size."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.full((1, 1), value)) for _ in range(2))

    def engine(self, first: OptimConfig, second: OptimConfig) -> PlainEngine:
        return PlainEngine(self, [([self.first], first), ([self.second], second)], on_cpu())

    def moved_by_a_step(self, engine: PlainEngine) -> tuple[float, float]:
        before = (self.first.item(), self.second.item())
        engine.backward((self.first + self.second).sum(), last=True)
        engine.step()
        return before[0] - self.first.item(), before[1] - self.second.item()


def test_the_rates_reach_the_masters_and_keep_the_groups_apart() -> None:
    model = Two()
    engine = model.engine(config(lr=0.1), config(lr=0.4))
    assert engine.set_rates(0, 2) == pytest.approx([0.1, 0.4])
    assert model.moved_by_a_step(engine) == pytest.approx((0.1, 0.4), rel=1e-4)
    assert engine.set_rates(1, 2) == pytest.approx([0.05, 0.2])
    assert model.moved_by_a_step(engine) == pytest.approx((0.05, 0.2), rel=1e-4)


def test_each_group_has_its_own_warm_up() -> None:
    engine = Two().engine(config(), config(warmup_fraction=0.5))
    rates = [engine.set_rates(step, 4) for step in range(4)]
    expected = [(1, 1 / 3), (3 / 4, 2 / 3), (2 / 4, 1), (1 / 4, 1 / 2)]
    assert rates == [pytest.approx(list(pair)) for pair in expected]


def test_a_group_that_begins_later_has_its_whole_schedule() -> None:
    engine = Two().engine(config(warmup_fraction=0.5), config(warmup_fraction=0.5))
    alone = [engine.set_rates(step, 4)[0] for step in range(4)]
    rates = [engine.set_rates(step, 7, first_steps={0: 3})[0] for step in range(7)]
    assert rates == pytest.approx([0.0, 0.0, 0.0, *alone])


def test_a_frozen_group_stays_while_the_other_moves() -> None:
    model = Two(1.0)
    engine = model.engine(config(lr=0.1, weight_decay=0.5), config(lr=0.4, weight_decay=0.5))
    assert engine.set_rates(0, 2, first_steps={0: 1}) == pytest.approx([0.0, 0.4])
    first, second = model.moved_by_a_step(engine)
    assert first == 0.0  # neither the gradient nor the decay
    assert second == pytest.approx(0.4 * 0.5 + 0.4, rel=1e-4)
    engine.set_rates(1, 2)
    assert model.moved_by_a_step(engine)[0] > 0.0


def test_a_group_that_begins_later_moves_as_one_that_begins_at_once() -> None:
    """As the policy behind `critic.warmup_steps`: the gradient differs from step to step, so that Adam's
    averages and the number of their steps decide how far a group moves."""

    def moves(waits: int) -> list[float]:
        model, found = Two(), []
        engine = model.engine(config(lr=0.1), config(lr=0.1))
        for step in range(waits + 16):
            engine.set_rates(step, waits + 16, first_steps={0: waits})
            before = model.first.item()
            slope = 0.0 if step < waits else 1.0 + (step - waits) % 3
            engine.backward(slope * model.first.sum() + model.second.sum(), last=True)
            engine.step()
            found.append(before - model.first.item())
        return found[waits:]

    assert moves(10) == pytest.approx(moves(0), rel=1e-5)


def test_the_engine_tells_norms_and_counts_what_it_skips() -> None:
    model = Two()
    engine = model.engine(config(), config())
    engine.backward(3.0 * model.first.sum(), last=False)
    engine.backward(4.0 * model.second.sum(), last=True)
    engine.step()
    assert engine.grad_norms == pytest.approx([3.0, 4.0])
    assert engine.grad_norm == pytest.approx(5.0)
    assert engine.skipped_steps == 0
    engine.backward(math.inf * model.first.sum() + model.second.sum(), last=True)
    engine.step()
    assert engine.skipped_steps == 1
    assert not math.isfinite(engine.grad_norm)


def test_what_was_saved_goes_on_elsewhere(tmp_path: Path) -> None:
    model, other = Two(), Two(7.0)
    engine, second = (each.engine(config(lr=0.1), config(lr=0.4)) for each in (model, other))
    model.moved_by_a_step(engine)
    engine.backward(math.nan * model.first.sum(), last=True)
    engine.step()
    engine.save(tmp_path)
    second.load(tmp_path)
    assert second.skipped_steps == 1
    for each in (engine, second):
        each.set_rates(1, 2)
    assert model.moved_by_a_step(engine) == other.moved_by_a_step(second)
    assert (model.first.item(), model.second.item()) == (other.first.item(), other.second.item())


def test_trainable_weights_are_copied_from_the_part_that_was_named() -> None:
    model = nn.ModuleDict({"policy": nn.Linear(2, 1), "critic": nn.Linear(2, 1)})
    model["policy"].bias.requires_grad_(False)
    engine = make_engine(model, [(model.parameters(), config())], on_cpu())
    state = trained_weights(engine, model["policy"])
    assert list(state) == ["weight"]
    before = state["weight"].clone()
    with torch.no_grad():
        for weight in model["policy"].parameters():
            weight.add_(1.0)
    assert torch.equal(state["weight"], before)


@pytest.mark.parametrize(
    ("written", "now"), [("zero3", "none"), ("none", "zero1"), ("fsdp2", "zero3"), ("none", "fsdp2")]
)
def test_a_checkpoint_of_another_engine_is_told(written: str, now: Zero) -> None:
    compute = replace(on_cpu(), zero=now)
    model = Two()
    with pytest.raises(ConfigError, match=rf"step 3 .*zero={written},.*zero={now}.*checkpoint\.resume=false"):
        make_engine(
            model, [(model.parameters(), config())], compute, {"zero": written, "step": 3, "world_size": 1}
        )


def test_each_group_has_a_schedule_of_its_own() -> None:
    engine = Two().engine(config(schedule="constant"), config(schedule="cosine"))
    rates = [engine.set_rates(step, 4) for step in range(4)]
    assert [rate for rate, _ in rates] == [rates[0][0]] * 4
    assert [rate / rates[0][1] for _, rate in rates] == pytest.approx(
        [1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4]
    )


@pytest.mark.parametrize("idle", [False, True])
def test_a_batch_is_learned_whatever_its_micro_batches_and_idle_passes(idle: bool) -> None:
    """Rows of 3, 1 and 2 in passes of at most 2 tokens; the loss is their mean square times both numbers."""
    rows, found = [3.0, 1.0, 2.0], []
    for tokens in (100, 2):
        model = Two(value=2.0)
        engine = model.engine(config(), config())
        if idle:
            engine.compute = WithIdlePasses("cpu", "float32")

        def loss(some: list[float], model: Two = model) -> tuple[Tensor, dict[str, Tensor]]:
            value = sum(row**2 for row in some) / len(rows) * (model.first + model.second).sum()
            return value, {"loss": value, "rows": torch.tensor(float(len(some)))}

        learned = engine.learn([1, 1, 1], lambda places: [rows[place] for place in places], loss, tokens)
        found.append((learned, model.first.item()))
    assert found[0] == found[1]
    mean = (9 + 1 + 4) / 3
    assert found[0][0] == pytest.approx({"loss": 4 * mean, "rows": 3.0, "grad_norm": 2**0.5 * mean})
