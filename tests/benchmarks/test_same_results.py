"""Two runs are compared by all that should be alike, and by nothing that cannot be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from same_results import differences, found


def made(
    directory: Path, *, key: str = "k", loss: float = 0.5, text: str = "yes", seconds: float = 1.0
) -> Any:
    """What a run with one stage made."""
    artifact = directory / "runs" / "run" / "artifacts" / "sft"
    artifact.mkdir(parents=True)
    metrics = {"loss": loss, "nothing": math.nan, "token_seconds": seconds}
    (artifact / "manifest.json").write_text(json.dumps({"key": key, "metrics": metrics}))
    (artifact / "rows.jsonl").write_text(json.dumps({"text": text, "time": seconds}) + "\n")
    (artifact / "model.safetensors").write_bytes(text.encode())
    (artifact / "report.md").write_text(str(seconds))
    return json.loads(json.dumps(found(directory)))


def test_what_differs_is_listed_and_times_are_not(tmp_path: Path) -> None:
    first = made(tmp_path / "first")
    assert differences(first, made(tmp_path / "later", seconds=9.0)) == ([], [])
    keys, results = differences(first, made(tmp_path / "other", key="q", loss=0.6, text="no"))
    assert keys == ["sft: k -> q"]
    assert [line.partition(":")[0] for line in results] == [
        "sft/loss", "sft/model.safetensors", "sft/rows.jsonl",
    ]  # fmt: skip
    assert differences(first, {}) == ([], ["sft: is gone"])
    assert differences({}, first) == ([], ["sft: is new"])
