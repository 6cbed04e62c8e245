"""The evaluation stage on small rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from helpers.experiments import stage_with
from helpers.jobs import SmallJob, run_in, small_job, tiny_base, user
from rlhf.data.prepared import PreparedData
from rlhf.data.schema import PromptRow, QuestionRow, Row, SftRow, TextRow
from rlhf.stages.evaluate import EvaluateStage

REFERENCES = [SftRow(user(f"Say {word}"), f"{word}, {word}.") for word in ("tea", "rain", "x")]
RETENTION: list[Row] = [
    TextRow("Water boils."),
    QuestionRow("Which?", ["a", "bb", "c c", "d"], 1),
    TextRow("Ice melts in the sun."),
]
EXAMPLES = [SftRow(user(f"Which colour has {n + 40}?"), f"It is {n + 40}.") for n in range(5)]
PROMPTS = ["Say a word about tea.", "Name a colour!", "What is rain?", *(f"What is {n}?" for n in range(29))]


def make_stage(**changes: Any) -> EvaluateStage:
    values: dict[str, Any] = {
        "prompts": "samples:prompts",
        "retention": ["samples:retention_sentences", "samples:retention_questions"],
        "policies": ["base", "sft", "ppo"],
        "subject": "ppo",
        "reward": None,
        "gold": "python:helpers.evaluated:rating",
        "judge": None,
        "num_prompts": None,
        "num_references": None,
        "max_new_tokens": 6,
        "num_shown": 2,
        "gates": {},
    }
    return stage_with(EvaluateStage, **(values | changes))


def rating(prompts: list[str], responses: list[str]) -> list[float]:
    """Any figure that two different answers hardly share."""
    return [float(sum(ord(character) % 97 for character in response)) for response in responses]


def run_stage(
    stage: EvaluateStage, published: dict[str, Path], directory: Path, console: Console | None = None
) -> SmallJob:
    directory.mkdir(parents=True)
    data = PreparedData(directory)
    prompts = [PromptRow(user(text), columns={"length": 3, "answer": text[8:-1]}) for text in PROMPTS]
    data.write("evaluate", "evaluation", prompts)
    data.write("sft", "train", EXAMPLES)
    data.write("sft", "held_out", REFERENCES)
    data.write("retention", "evaluation", RETENTION)
    base = tiny_base(published["base"])
    inputs = {name: published[name] for name in ("sft", "ppo")}
    job = small_job("evaluate", directory, base, inputs, data=data, console=console)
    job.inputs["ppo"].manifest.metrics["best_step"] = 4.0
    run_in(stage, job)
    return job


def jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
