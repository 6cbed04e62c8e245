"""In which order the disk is told things: what a power cut leaves is the old, or the new, never neither.

The calls are made for real; they are only written down on the way.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

import rlhf.training.checkpoint
from helpers.jobs import on_cpu
from helpers.store import publish
from rlhf.config import ConfigError
from rlhf.distributed.signals import StopSignals
from rlhf.pipeline.store import Store
from rlhf.tracking.tracker import Tracker
from rlhf.training.checkpoint import CheckpointConfig, Checkpointer
from rlhf.training.config import OptimConfig
from rlhf.training.engine import PlainEngine

Event = tuple[str, str]
OPTIM = OptimConfig(
    lr=0.1, weight_decay=0.0, eps=1e-8, schedule="linear", warmup_fraction=0.0, max_grad_norm=1.0
)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """("flush", file), ("rename", target) and ("remove", directory), in their order."""
    found: list[Event] = []

    def noted(name: str, call: Callable[..., object], path_of: Callable[..., str]) -> Callable[..., object]:
        def wrapper(*arguments: object, **options: object) -> object:
            path = path_of(*arguments)
            result = call(*arguments, **options)
            found.append((name, path))
            return result

        return wrapper

    def opened(descriptor: int) -> str:
        return str(Path(f"/proc/self/fd/{descriptor}").readlink())

    monkeypatch.setattr(os, "fsync", noted("flush", os.fsync, opened))
    monkeypatch.setattr(os, "rename", noted("rename", os.rename, lambda _, target: str(target)))
    monkeypatch.setattr(shutil, "rmtree", noted("remove", shutil.rmtree, str))
    return found


def test_an_artifact_is_on_the_disk_before_it_has_its_name(tmp_path: Path, events: list[Event]) -> None:
    store = Store(tmp_path / "store")
    events.clear()
    artifact = publish(store)
    named = events.index(("rename", str(artifact.path)))
    flushed = {Path(path).name for event, path in events[:named] if event == "flush"}
    assert flushed >= {"part", "model.bin", "manifest.json"}  # directories too, or a file may have no name
    assert any(event == "flush" and ".part-" in Path(path).name for event, path in events[:named])
    assert ("flush", str(artifact.path.parent)) in events[named:]


def checkpointer(directory: Path, **changes: object) -> Checkpointer:
    values = {
        "every_steps": None,
        "every_minutes": None,
        "background": False,
        "keep": 1,
        "resume": True,
    } | changes
    (directory / "run").mkdir(parents=True, exist_ok=True)
    return Checkpointer(
        directory / "checkpoints", CheckpointConfig.model_validate(values), on_cpu(),
        Tracker(directory / "run", []), StopSignals(), print, "sft",
    )  # fmt: skip


def engine() -> PlainEngine:
    model = torch.nn.Linear(2, 2)
    return PlainEngine(model, [(model.parameters(), OPTIM)], on_cpu())


def test_an_old_checkpoint_goes_only_once_the_new_one_is_in_place(
    tmp_path: Path, events: list[Event]
) -> None:
    checkpoints = checkpointer(tmp_path)
    checkpoints.save(1, engine(), {})
    events.clear()
    checkpoints.save(2, engine(), {})
    old, new = (str(tmp_path / "checkpoints" / f"step-0000000{n}") for n in (1, 2))
    named, removed = events.index(("rename", new)), events.index(("remove", old))
    placed = events.index(("flush", str(tmp_path / "checkpoints")))
    assert named < placed < removed
    flushed = [Path(path) for event, path in events[:named] if event == "flush"]
    assert {path.name for path in flushed} >= {"optimizer.pt", "loop.pt", "manifest.json"}
    assert any(path.parent.name == "checkpoints" and ".part-" in path.name for path in flushed)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_what_is_no_tensor_or_number_is_refused_with_the_way_out(tmp_path: Path) -> None:
    checkpointer(tmp_path).save(1, engine(), {"where": Path("anything")})
    with pytest.raises(ConfigError, match=r"or start the stage again with checkpoint\.resume=false\.$"):
        checkpointer(tmp_path).restore(engine())


def test_what_an_interrupted_save_left_is_removed(tmp_path: Path) -> None:
    half = tmp_path / "checkpoints" / ".step-00000002.part-1"
    half.mkdir(parents=True)
    checkpointer(tmp_path)
    assert not half.exists()


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """Seconds."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(rlhf.training.checkpoint, "time", found)
    return found


def saved(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "checkpoints").glob("step-*"))


def test_minutes_count_from_the_last_checkpoint(tmp_path: Path, clock: Clock) -> None:
    checkpoints, trained = checkpointer(tmp_path, every_minutes=1.0, keep=9), engine()
    with checkpoints.training():
        for step, seconds in enumerate((30, 31, 30, 29, 2), 1):
            clock.now += seconds
            checkpoints.after_step(step, trained, {})
    assert saved(tmp_path) == ["step-00000002", "step-00000005"]


def test_the_seconds_of_earlier_attempts_count(tmp_path: Path, clock: Clock) -> None:
    first = checkpointer(tmp_path)
    clock.now += 100
    first.save(1, engine(), {})
    clock.now += 50  # lost with the attempt
    second = checkpointer(tmp_path)
    clock.now += 7
    assert second.spent() == 107


def test_what_a_stop_takes_is_told_to_the_script_that_started_the_run(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest step of this attempt and the last save; after a resume as soon as a step was taken."""

    class Slow(PlainEngine):
        def save(self, directory: Path) -> None:
            clock.now += 7
            super().save(directory)

    monkeypatch.setenv("RLHF_NOTES", str(tmp_path))
    note = tmp_path / "stop_seconds"
    model = torch.nn.Linear(2, 2)
    trained = Slow(model, [(model.parameters(), OPTIM)], on_cpu())
    checkpoints = checkpointer(tmp_path, every_steps=2)
    told = []
    with checkpoints.training():
        for step, seconds in enumerate((30, 20.5, 40), 1):
            clock.now += seconds
            checkpoints.after_step(step, trained, {})
            told.append(note.read_text() if note.exists() else None)
    assert told == [None, "37\n", "47\n"]  # seven seconds of saving are no part of a step

    note.unlink()
    again = checkpointer(tmp_path)
    with again.training():
        assert not note.exists()  # a job warned before its first step would not move
        clock.now += 9.5
        again.after_step(3, trained, {})
    assert note.read_text() == "17\n"


def test_what_saving_cost_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = checkpointer(tmp_path)
    assert checkpoints.cost() == ""
    monkeypatch.setattr(time, "monotonic", lambda now=checkpoints._start: now + 30.0)
    checkpoints.written = [(1.0, 3_000_000)]
    assert checkpoints.cost() == " (1 checkpoint of 3 MB, 1.0 s each, 3.3% of the time)"
    checkpoints.written.append((2.0, 4_000_000))
    assert checkpoints.cost() == " (2 checkpoints of 4 MB, 1.5 s each, 10.0% of the time)"


def test_only_a_file_that_could_not_be_written_is_the_disks_fault(tmp_path: Path) -> None:
    """torch's writer raises a RuntimeError for a full disk too."""

    class Failing(PlainEngine):
        said = ""

        def save(self, directory: Path) -> None:
            raise RuntimeError(self.said)

    model = torch.nn.Linear(2, 2)
    failing = Failing(model, [(model.parameters(), OPTIM)], on_cpu())
    failing.said = "[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"
    with pytest.raises(ConfigError, match="the checkpoint of step 1 could not be written"):
        checkpointer(tmp_path).save(1, failing, {})
    failing.said = "a shape that does not fit"
    with pytest.raises(RuntimeError, match="a shape that does not fit"):
        checkpointer(tmp_path).save(1, failing, {})


def test_it_saves_at_every_so_many_steps(tmp_path: Path) -> None:
    checkpoints, model = checkpointer(tmp_path, every_steps=2, keep=9), engine()
    for step in range(1, 6):
        checkpoints.after_step(step, model, {})
    assert sorted(path.name for path in checkpoints.directory.glob("step-*")) == [
        "step-00000002", "step-00000004",
    ]  # fmt: skip


def test_a_place_that_takes_no_directory_is_told(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(ConfigError, match="the checkpoint of step 1 could not be written"):
        checkpointer(tmp_path).save(1, engine(), {})


def test_a_file_that_is_kept_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    """As after a checkpoint of an earlier step, on another number of ranks. A longer name is another file."""
    checkpoints = checkpointer(tmp_path)
    for name, text in (("2.answers", "first"), ("12.answers", "other"), ("2.answers", "second")):
        (tmp_path / "new").write_text(text)
        checkpoints.save_file(name, partial(os.link, tmp_path / "new"))
        (tmp_path / "new").unlink()
    found = {name: checkpoints.saved_file(name) for name in ("2.answers", "12.answers", "3.answers")}
    read = {name: path and path.read_text() for name, path in found.items()}
    assert read == {"2.answers": "second", "12.answers": "other", "3.answers": None}
    assert len([*tmp_path.rglob("kept-*")]) == 2
