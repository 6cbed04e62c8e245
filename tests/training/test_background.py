"""Checkpoints that are written while training goes on."""

from __future__ import annotations

import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.jobs import on_cpu
from rlhf.config import ConfigError
from rlhf.distributed.signals import Stopped, StopSignals
from rlhf.tracking.tracker import Tracker
from rlhf.training.checkpoint import CheckpointConfig, Checkpointer
from rlhf.training.config import OptimConfig
from rlhf.training.engine import PlainEngine

OPTIM = OptimConfig(
    lr=0.1, weight_decay=0.0, eps=1e-8, schedule="constant", warmup_fraction=0.0, max_grad_norm=1.0
)


class Run:
    """Training of a layer, from the checkpoint that is there."""

    def __init__(self, directory: Path, **changes: object) -> None:
        values = {
            "every_steps": 1, "every_minutes": None, "background": True, "keep": 1, "resume": True
        } | changes  # fmt: skip
        (directory / "run").mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        self.model = nn.Linear(64, 64)
        self.engine = PlainEngine(self.model, [(self.model.parameters(), OPTIM)], on_cpu())
        self.checkpoints = Checkpointer(
            directory / "checkpoints", CheckpointConfig.model_validate(values), on_cpu(),
            Tracker(directory / "run", []), StopSignals(), print, "sft",
        )  # fmt: skip
        state = self.checkpoints.restore(self.engine)
        self.done = 0 if state is None else state["done"]
        self.noise = torch.zeros(3) if state is None else state["noise"].clone()

    def step(self) -> Tensor:
        """Learn from what is drawn; the weights."""
        self.done += 1
        self.noise += torch.rand(3)  # changed in place, as an average is
        self.engine.set_rates(self.done - 1, 9)
        self.engine.backward(self.model(torch.rand(2, 64)).square().sum(), last=True)
        self.engine.step()
        self.checkpoints.after_step(self.done, self.engine, {"done": self.done, "noise": self.noise})
        return self.model.weight.detach().clone()

    def written(self) -> None:
        """Wait until the thread has nothing more to write."""
        assert self.checkpoints._background is not None
        self.checkpoints._background.thread.join()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """What is written waits until it is set."""
    opened, save = threading.Event(), torch.save

    def when_open(*arguments: Any) -> None:
        opened.wait()
        save(*arguments)

    monkeypatch.setattr(torch, "save", when_open)
    yield opened
    opened.set()


def names(directory: Path) -> list[str]:
    return sorted(path.name.partition(".part-")[0] for path in (directory / "checkpoints").iterdir())


def test_training_goes_on_and_the_checkpoint_is_of_its_step(tmp_path: Path, gate: threading.Event) -> None:
    gate.set()
    run = Run(tmp_path, every_steps=2)
    with run.checkpoints.training():
        run.step()
        second = run.step()
        run.written()
        gate.clear()
        run.checkpoints.config = run.checkpoints.config.model_copy(update={"every_steps": 3})
        third, noise = run.step(), run.noise.clone()
        fourth = run.step()  # the third's checkpoint is not written yet
        assert not torch.equal(third, fourth) and not torch.equal(second, third)
        assert names(tmp_path) == [".step-00000003", "step-00000002"]  # the old one stays meanwhile
        gate.set()
    assert names(tmp_path) == ["step-00000003"]
    again = Run(tmp_path)
    assert again.done == 3
    assert torch.equal(again.model.weight, third) and torch.equal(again.noise, noise)
    assert torch.equal(again.step(), fourth)


def test_killed_while_it_is_written_the_earlier_one_is_gone_on_from(
    tmp_path: Path, gate: threading.Event
) -> None:
    gate.set()
    run = Run(tmp_path)
    with pytest.raises(KeyboardInterrupt), run.checkpoints.training():
        run.step()
        second = run.step()
        run.written()
        gate.clear()
        run.step()
        raise KeyboardInterrupt
    again = Run(tmp_path)
    assert again.done == 2 and torch.equal(again.model.weight, second)
    assert names(tmp_path) == ["step-00000002"]


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """While open, this process can write no larger file: what a full disk does to a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_could_not_be_written_is_told_at_the_next_step(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with run.checkpoints.training():
        run.step()
    words = (
        r"the checkpoint of step 2 could not be written .* Earlier checkpoints and finished stages are int"
    )
    with pytest.raises(ConfigError, match=words), run.checkpoints.training():
        with files_up_to(10_000):
            run.step()
            run.written()
        run.step()
    assert names(tmp_path) == ["step-00000001"]
    again = Run(tmp_path)
    assert again.done == 1


def test_a_signal_waits_for_what_is_written_and_saves_its_own_step(
    tmp_path: Path, gate: threading.Event
) -> None:
    run = Run(tmp_path, keep=2)
    gate.set()
    with pytest.raises(Stopped), run.checkpoints.training():
        run.step()
        run.checkpoints.signals._handle(15, None)
        run.step()
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_on_a_cpu_it_is_off_by_default(tmp_path: Path, gate: threading.Event) -> None:
    gate.set()
    run = Run(tmp_path, background="auto")
    run.step()
    assert names(tmp_path) == ["step-00000001"]
