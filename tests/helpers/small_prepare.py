"""`prepare` on small data sets for every role."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from small_job import small_job

from rlhf.config import ConfigError, validated
from rlhf.data.prepared import PreparedData
from rlhf.data.sources import SourceConfig
from rlhf.models.base import BaseModelFiles
from rlhf.stages.prepare import PrepareStage


@dataclasses.dataclass(frozen=True)
class ShorterBase(BaseModelFiles):
    """The tiny model's tokenizer (a byte is a token) with another context length."""

    length: int = 1 << 20

    @property
    def context_length(self) -> int:
        return self.length


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def named(source: Any) -> SourceConfig | list[SourceConfig] | None:
    """What a role's key names, as its stage's config has it."""
    if isinstance(source, list):
        return [SourceConfig.model_validate(each) for each in source]
    return None if source is None else SourceConfig.model_validate(source)


class Bench:
    """Small data sets for every role, and a way to prepare them."""

    def __init__(self, directory: Path, base: BaseModelFiles) -> None:
        self.directory, self.base, self.printed, self.num_runs = directory, base, io.StringIO(), 0
        numbers = range(40)
        self.rows = {
            "sft": [{"prompt": f"sft {n}", "completion": "yes"} for n in numbers],
            "replay": [{"text": f"replay {n}"} for n in numbers],
            "pairs": [{"prompt": f"pair {n}", "chosen": "good", "rejected": "bad"} for n in numbers],
            "ppo": [{"prompt": f"ppo {n}"} for n in numbers],
            "ptx": [{"prompt": f"ptx {n}", "completion": "yes"} for n in numbers],
            "evaluate": [{"prompt": f"evaluate {n}"} for n in numbers],
            "texts": [{"text": f"fact {n}"} for n in numbers],
            "questions": [{"question": f"question {n}", "choices": ["a", "b"], "answer": 0} for n in numbers],
        }
        self.sources = {}

    def stage(self, **knobs: Any) -> PrepareStage:
        sources = {role: write(self.directory / f"{role}.jsonl", rows) for role, rows in self.rows.items()}
        sources["retention"] = [sources.pop("texts"), sources.pop("questions")]
        settings = {
            "held_out_fraction": 0.2, "evaluation_fraction": 0.25, "on_bad_row": "error",
            "response_tokens": 8, "gates": {},
        }  # fmt: skip
        stage = validated(PrepareStage, settings | knobs, "prepare")
        stage._sources = {role: named(source) for role, source in (sources | self.sources).items()}
        return stage

    def prepare(self, **knobs: Any) -> PreparedData:
        self.num_runs += 1
        out = self.directory / f"out{self.num_runs}"
        self.printed = io.StringIO()
        self.job = small_job("prepare", out, self.base, console=Console(file=self.printed, width=200))
        self.stage(**knobs).run(self.job)
        self.report = json.loads((out / "report.json").read_text())
        return PreparedData(out)

    def complaint(self, **knobs: Any) -> str:
        with pytest.raises(ConfigError) as error:
            self.prepare(**knobs)
        return str(error.value)

    @property
    def output(self) -> str:
        return " ".join(self.printed.getvalue().split())
