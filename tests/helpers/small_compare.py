"""The comparison on a few rows about animals and the tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from small_job import small_job

from rlhf.config import validated
from rlhf.data.prepared import PreparedData
from rlhf.data.schema import Message, PairRow, PromptRow, SftRow
from rlhf.models.base import BaseModelFiles, ModelConfig, _write_tiny
from rlhf.pipeline.job import Job
from rlhf.pipeline.store import Manifest, Store
from rlhf.stages.compare import CompareStage

ANIMALS = ("cat", "dog", "hen", "owl", "fox", "eel")


def make_stage(**changes: Any) -> CompareStage:
    values = {
        "questions": None, "corpus": None, "num_questions": None,
        "methods": ["zero_shot", "few_shot", "retrieval"], "artifacts": [], "tuned_methods": ["zero_shot"],
        "retriever": "bm25",
        "few_shot": {"examples": 2, "choice": "nearest", "template": "{question}"},
        "retrieval": {"passages": 2, "passage_template": "- {passage}\n", "template": "{passages}{question}"},
        "reward": None, "quality": "rouge_l", "price_per_hour": 3600.0, "max_new_tokens": 4,
        "temperature": 0.0, "micro_batch_tokens": 4096, "gates": {},
    }  # fmt: skip
    return validated(CompareStage, values | changes, "compare")


def user(text: str) -> list[Message]:
    return [Message(role="user", content=text)]


def length(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward."""
    return [float(len(response)) for response in responses]


def publish_tiny(store: Store, stage: str, recipe: dict[str, Any], note: str = "") -> None:
    (store.root / stage).mkdir(exist_ok=True)
    scratch = store.scratch(stage, "tuned")
    _write_tiny(scratch)
    (scratch / "note.txt").write_text(note)
    manifest = Manifest(
        stage=stage, key="tuned", recipe=recipe, config={}, metrics={}, seconds=50.0, created="",
        git_revision=None, packages={}, hardware="", files={},
    )  # fmt: skip
    store.publish(scratch, manifest)


def base_of(tiny_model: Path) -> BaseModelFiles:
    return BaseModelFiles(tiny_model, "tiny", ModelConfig(kind="tiny"))


def run_stage(stage: CompareStage, tiny_model: Path, directory: Path, console: Console | None = None) -> Job:
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
    job = small_job("compare", directory, base_of(tiny_model), data=data, console=console)
    stage.run(job)
    return job


def answers_of(job: Job) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job.directory / "answers.jsonl").read_text().splitlines()]


def asked(job: Job, contender: str) -> list[list[str]]:
    """What every turn said, prompt by prompt."""
    rows = [row for row in answers_of(job) if row["contender"] == contender]
    return [[turn["content"] for turn in row["asked"]] for row in rows]
