"""Where metrics go: the files always, wandb (offline) and tensorboard by choice."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

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
    tracker = make_tracker(TrackerConfig(kind="wandb"), tmp_path, {"seed": 0})
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


def records(run: Path, kind: str) -> Iterator[Any]:
    """Those of a kind that wandb kept, such as history."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # made at import

    for content in wandb_records(run):
        record = Record()
        record.ParseFromString(content)
        if record.WhichOneof("record_type") == kind:
            yield getattr(record, kind)


def history(run: Path) -> list[dict[str, Any]]:
    """Every history record that wandb kept."""
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in found.item}
        for found in records(run, "history")
    ]


def history_steps(run: Path) -> list[int]:
    """The `ppo/step` of every history record that wandb kept."""
    return [int(row["ppo/step"]) for row in history(run)]


ASKED = [{"role": "user", "content": "Hi"}]


def test_wandb_gets_the_config_and_a_table_of_samples_once(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    for told in (2, 2, 3):  # the second run has nothing new to say
        tracker = make_tracker(TrackerConfig(kind="wandb"), tmp_path, {"sft": {"lr": 0.5}})
        tracker.log("ppo", {"kl": 0.5}, 1)
        for number in range(told):
            tracker.sample("ppo", {"prompt": ASKED, "response": f"answer \x1b {number}", "score": number / 2})
        tracker.close()
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"), key=lambda run: run.stat().st_mtime_ns)
    assert len(ids_of(runs)) == 1
    kept = [item for found in records(runs[0], "run") for item in found.config.update]
    config = {item.key: json.loads(item.value_json) for item in kept}
    assert config["sft"] == {"lr": 0.5}
    shown = [row.get("ppo/samples/nrows") for run in runs for row in history(run)]
    assert sorted(rows for rows in shown if rows) == [2, 3]
    files = [path for run in runs for path in (run / "files" / "media").rglob("*.table.json")]
    tables = [json.loads(path.read_text()) for path in files]
    longest = max(tables, key=lambda table: len(table["data"]))
    assert longest["columns"] == ["prompt", "response", "score"]
    assert longest["data"][2] == ["user: Hi", "answer \\x1b 2", 1.0]


def test_a_resumed_run_is_the_same_wandb_run_and_says_nothing_twice(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    # a second line of the same step is no repetition; the next time the story is told from the beginning
    story = [("kl", 1), ("score", 1), ("kl", 2), ("score", 2), ("kl", 3), ("score", 3)]
    for told in (3, 6):  # the first ends between two lines of a step
        tracker = make_tracker(TrackerConfig(kind="wandb"), tmp_path, {"seed": 0})
        for name, step in story[:told]:
            tracker.log("ppo", {name: 0.5}, step)
        tracker.close()
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 2 and len(ids_of(runs)) == 1
    assert sorted(step for run in runs for step in history_steps(run)) == [1, 1, 2, 2, 3, 3]


def test_another_config_under_the_same_name_is_another_wandb_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    for seed in (0, 1):
        tracker = make_tracker(TrackerConfig(kind="wandb"), tmp_path, {"seed": seed})
        tracker.log("ppo", {"kl": 0.5}, 1)
        tracker.close()
    assert len(ids_of((tmp_path / "wandb").glob("offline-run-*"))) == 2


def test_tensorboard_has_curves_config_and_samples_once_also_after_a_second_start(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):
        tracker = make_tracker(TrackerConfig(kind="tensorboard"), tmp_path, {"sft": {"lr": 0.5}})
        tracker.log("ppo", {"kl": 0.5}, 1)
        tracker.sample("ppo", {"prompt": ASKED, "response": "one | two\nthree", "score": 1.5})
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Scalars("ppo/kl")
    assert (event.step, event.value) == (1, 0.5)
    (config,), (table,) = events.Tensors("config/text_summary"), events.Tensors("ppo/samples/text_summary")
    assert json.loads(config.tensor_proto.string_val[0])["sft"] == {"lr": 0.5}
    assert table.tensor_proto.string_val[0].decode().splitlines() == [
        "| prompt | response | score |", "| --- | --- | --- |", r"| user: Hi | one \| two three | 1.5 |",
    ]  # fmt: skip


def test_a_reused_artifact_tells_its_samples_too(tmp_path: Path) -> None:
    for name in ("first", "second", "artifact"):
        (tmp_path / name).mkdir()
    tracker = Tracker(tmp_path / "first", [])
    tracker.begin(tmp_path / "artifact")
    tracker.sample("ppo", {"prompt": ASKED, "response": "b"})
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    again = make_tracker(TrackerConfig(kind="tensorboard"), tmp_path / "second", {})
    again.replay(tmp_path / "artifact")
    again.close()
    events = EventAccumulator(str(tmp_path / "second" / "tensorboard"))
    events.Reload()
    assert b"| user: Hi | b |" in events.Tensors("ppo/samples/text_summary")[0].tensor_proto.string_val[0]
