"""Where metrics go: the files always, wandb (offline) and tensorboard by choice."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path

import pytest

from rlhf.tracking.tracker import Tracker, TrackerConfig, make_tracker


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


def wandb_records(run: Path) -> list[bytes]:
    """What wandb wrote: LevelDB's log format, blocks of 32 KiB, behind a header of 7 bytes."""
    (file,) = run.glob("*.wandb")
    content, records, begun, position = file.read_bytes(), [], b"", 7
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:  # too little for another record: the block is padded
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        begun += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            records.append(begun)
            begun = b""
    return records


def ids_of(runs: Iterable[Path]) -> set[str]:
    """By their files: directories of runs that begin in the same second are numbered too."""
    return {file.stem for run in runs for file in run.glob("run-*.wandb")}


def history_steps(run: Path) -> list[int]:
    """The `ppo/step` of every history record that wandb kept."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # made at import

    steps = []
    for content in wandb_records(run):
        record = Record()
        record.ParseFromString(content)
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            steps.append(int(items["ppo/step"]))
    return steps


def test_a_resumed_run_is_the_same_wandb_run_and_says_nothing_twice(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    # a second line of the same step is no repetition; the next time the story is told from the beginning
    story = [("kl", 1), ("score", 1), ("kl", 2), ("score", 2), ("kl", 3), ("score", 3)]
    for told in (3, 6):  # the first ends between two lines of a step
        tracker = make_tracker(TrackerConfig(kind="wandb"), "name", tmp_path, {"seed": 0})
        for name, step in story[:told]:
            tracker.log("ppo", {name: 0.5}, step)
        tracker.close()
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 2 and len(ids_of(runs)) == 1
    assert sorted(step for run in runs for step in history_steps(run)) == [1, 1, 2, 2, 3, 3]


def test_another_config_under_the_same_name_is_another_wandb_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    for seed in (0, 1):
        tracker = make_tracker(TrackerConfig(kind="wandb"), "name", tmp_path, {"seed": seed})
        tracker.log("ppo", {"kl": 0.5}, 1)
        tracker.close()
    assert len(ids_of((tmp_path / "wandb").glob("offline-run-*"))) == 2


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
