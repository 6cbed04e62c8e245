"""Stages on small rows: preparation, the comparison."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from helpers.experiments import build, build_stage, stage_with
from helpers.jobs import SmallJob, run_in, small_job, tiny_base, user
from helpers.store import manifest
from rlhf.config import ConfigError
from rlhf.data.mount import Mount
from rlhf.data.prepared import PreparedData
from rlhf.data.roles import ROLES, Roles
from rlhf.data.schema import PairRow, PromptRow, SftRow
from rlhf.data.sources import SourceConfig
from rlhf.digests import directory_digest
from rlhf.models.base import BaseModelFiles, _write_tiny
from rlhf.pipeline.checks import check
from rlhf.pipeline.stage import View
from rlhf.pipeline.store import Store
from rlhf.stages.compare import CompareStage
from rlhf.stages.prepare import PrepareStage
from rlhf.stages.sft import SftStage

ANIMALS = ("cat", "dog", "hen", "owl", "fox", "eel")


def compare_stage(**changes: Any) -> CompareStage:
    values: dict[str, Any] = {
        "num_questions": None, "artifacts": [], "reward": None, "price_per_hour": 3600.0, "max_new_tokens": 4,
        "few_shot": {"examples": 2, "choice": "nearest", "template": "{question}"},
        "retrieval": {"passages": 2, "passage_template": "- {passage}\n", "template": "{passages}{question}"},
    }  # fmt: skip
    return stage_with(CompareStage, **(values | changes))


def answer_length(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward."""
    return [float(len(response)) for response in responses]


def publish_tiny(store: Store, stage: str, recipe: dict[str, Any], note: str = "") -> None:
    (store.root / stage).mkdir(exist_ok=True)
    scratch = store.scratch(stage, "tuned")
    _write_tiny(scratch)
    (scratch / "note.txt").write_text(note)
    store.publish(scratch, manifest(stage, "tuned", recipe=recipe, seconds=50.0))


def run_compare(
    stage: CompareStage, tiny_model: Path, directory: Path, console: Console | None = None
) -> SmallJob:
    directory.mkdir(parents=True)
    data = PreparedData(directory)
    rows = [
        SftRow(user(f"Where is the {animal}?"), f"The {animal} is in room {animal}9.") for animal in ANIMALS
    ]
    data.write("sft", "train", rows[:4])
    data.write("sft", "held_out", rows[4:])
    data.write("pairs", "train", [PairRow(user("Where is the newt?"), "There.", "No.")])
    data.write("ppo", "train", [PromptRow(user("Where is the toad?"))])
    data.write("replay", "train", [SftRow(user("Where is the gnu?"), "There.")])
    data.write("ptx", "train", [SftRow([], "A text.")])
    data.write("dpo", "train", [])
    data.write("retention", "evaluation", [])
    job = small_job("compare", directory, tiny_base(tiny_model), data=data, console=console)
    run_in(stage, job)
    return job


def answers_of(job: SmallJob) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job.directory / "responses.jsonl").read_text().splitlines()]


def asked(job: SmallJob, candidate: str) -> list[list[str]]:
    """What every turn said, prompt by prompt."""
    rows = [row for row in answers_of(job) if row["policy"] == candidate]
    return [[turn["content"] for turn in row.get("asked", row["prompt"])] for row in rows]


@dataclasses.dataclass(frozen=True)
class ShorterBase(BaseModelFiles):
    """The tiny model's tokenizer (a byte is a token) with another context length."""

    length: int = 1 << 20

    @property
    def context_length(self) -> int:
        return self.length


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def named(source: Any) -> SourceConfig | list[SourceConfig] | str | None:
    """What a role's key names, as its stage's config has it."""
    if source in [role.key for role in ROLES.values()]:
        return str(source)
    if isinstance(source, list):
        return [SourceConfig.model_validate(each) for each in source]
    return None if source is None else SourceConfig.model_validate(source)


def sections(sources: Mapping[str, Any], roles: Roles) -> Any:
    """The stages' sections of a config, with nothing but the keys of these roles."""
    found: dict[str, Any] = {}
    for role, source in sources.items():
        section, *names = roles[role].key.split(".")
        place = found.setdefault(section, {})
        for name in names[:-1]:
            place = place.setdefault(name, {})
        place[names[-1]] = source
    return found


class Bench:
    """Small data sets for every role, and a way to prepare them."""

    roles: Roles = ROLES

    def __init__(self, directory: Path, base: ShorterBase) -> None:
        self.directory, self.base, self.printed, self.num_runs = directory, base, io.StringIO(), 0
        self.experiment = build()
        numbers = range(40)
        self.rows: dict[str, list[dict[str, Any]]] = {
            "sft": [{"prompt": f"sft {n}", "completion": "yes"} for n in numbers],
            "replay": [{"text": f"replay {n}"} for n in numbers],
            "pairs": [{"prompt": f"pair {n}", "chosen": "good", "rejected": "bad"} for n in numbers],
            "ppo": [{"prompt": f"ppo {n}"} for n in numbers],
            "ptx": [{"prompt": f"ptx {n}", "completion": "yes"} for n in numbers],
            "dpo": [{"prompt": f"dpo {n}", "completion": "yes", "label": n % 2 > 0} for n in numbers],
            "evaluate": [{"prompt": f"evaluate {n}"} for n in numbers],
            "texts": [{"text": f"fact {n}"} for n in numbers],
            "questions": [{"question": f"question {n}", "choices": ["a", "b"], "answer": 0} for n in numbers],
        }
        self.sources: dict[str, Any] = {}

    def stage(self, **knobs: Any) -> PrepareStage:
        sources: dict[str, Any] = {
            role: write_rows(self.directory / f"{role}.jsonl", rows) for role, rows in self.rows.items()
        }
        sources["retention"] = [sources.pop("texts"), sources.pop("questions")]
        settings = {"held_out_fraction": 0.2, "evaluation_fraction": 0.25, "response_tokens": 8}
        given = {role: named(source) for role, source in (sources | self.sources).items()}
        stage = stage_with(PrepareStage, **(settings | knobs))
        stage.model_post_init(Mount("prepare", self.roles))
        self.chain = {"prepare": stage, **sections(given, self.roles)}
        return stage

    def digests(self, **knobs: Any) -> dict[str, str]:
        """Of what it reads from outside the store."""
        return self.stage(**knobs).external_digests(directory_digest, self.chain)

    def prepare(self, **knobs: Any) -> PreparedData:
        self.num_runs += 1
        out = self.directory / f"out{self.num_runs}"
        self.printed = io.StringIO()
        self.job = small_job("prepare", out, self.base, console=Console(file=self.printed, width=200))
        stage = self.stage(**knobs)
        self.job.experiment = replace(self.experiment, stages=self.chain)
        check(stage, View(self.chain))
        run_in(stage, self.job)
        self.report = json.loads((out / "report.json").read_text())
        return PreparedData(out, roles=self.roles)

    def complaint(self, **knobs: Any) -> str:
        with pytest.raises(ConfigError) as error:
            self.prepare(**knobs)
        return str(error.value)

    @property
    def summary(self) -> dict[str, float]:
        return self.job.summary

    @property
    def output(self) -> str:
        return " ".join(self.printed.getvalue().split())


SFT_SETTINGS = (
    "model=tiny", "sft.optim.lr=3e-3", "sft.batch_rows=4", "sft.epochs=2", "sft.optim.warmup_fraction=0.25",
    "sft.optim.weight_decay=0.1", "sft.optim.max_grad_norm=0.5", "sft.max_tokens=80",
)  # fmt: skip
TRAIN = [SftRow(user(f"Say {n}{' please' * (n % 3)}"), f"It is {n}{'!' * (5 * n)}") for n in range(14)]
GENERAL = [SftRow([], f"Water boils at {n} degrees{'!' * (3 * n)}") for n in range(6)]
HELD_OUT = [SftRow(user(f"Say {n}"), f"It is {n}") for n in range(20, 24)]


def sft_stage(*overrides: str) -> SftStage:
    return build_stage(SftStage, *SFT_SETTINGS, *overrides)


def sft_job(directory: Path, model: Path) -> SmallJob:
    job = small_job("sft", directory, tiny_base(model))
    job.data.write("sft", "train", TRAIN)
    job.data.write("sft", "held_out", HELD_OUT)
    job.data.write("replay", "train", GENERAL)
    return job
