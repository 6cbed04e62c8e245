"""Where metrics go: the files always, wandb (offline) and tensorboard by choice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.tracking import Tracker, TrackerConfig, make_tracker


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_names_carry_their_stage_and_both_directories_are_written(tmp_path: Path) -> None:
    (run := tmp_path / "run").mkdir()
    (artifact := tmp_path / "artifact").mkdir()
    tracker = Tracker(run, [])
    tracker.begin(artifact)
    tracker.log("ppo", {"kl": 0.5, "broken": float("nan")}, 3)
    tracker.summarize("ppo", {"kl": 0.7})
    tracker.sample("ppo", {"prompt": "a", "response": "b"})
    row, summary = lines(run / "metrics.jsonl")
    assert (row["stage"], row["step"], row["ppo/kl"], row["ppo/broken"]) == ("ppo", 3, 0.5, None)
    assert (summary["summary"], summary["ppo/kl"]) == (True, 0.7)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (artifact / name).read_text() == (run / name).read_text()


def test_a_reused_artifact_tells_the_run_its_story(tmp_path: Path) -> None:
    (first := tmp_path / "first").mkdir()
    (second := tmp_path / "second").mkdir()
    (artifact := tmp_path / "artifact").mkdir()
    tracker = Tracker(first, [])
    tracker.begin(artifact)
    tracker.log("sft", {"loss": 2.0}, 1)
    again = Tracker(second, [])
    again.replay(artifact)
    assert lines(second / "metrics.jsonl") == lines(first / "metrics.jsonl")


def test_wandb_stays_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    tracker = make_tracker(TrackerConfig(kind="wandb"), "name", tmp_path, {"seed": 0})
    tracker.log("ppo", {"kl": 0.5}, 1)
    tracker.log("ppo", {"kl": 0.6}, 2)
    tracker.summarize("ppo", {"kl": 0.5})
    tracker.close()
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(run.glob("*.wandb"))


def test_tensorboard_writes_its_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = make_tracker(TrackerConfig(kind="tensorboard"), "name", tmp_path, {})
    tracker.log("ppo", {"kl": 0.5}, 1)
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Scalars("ppo/kl")
    assert (event.step, event.value) == (1, 0.5)
