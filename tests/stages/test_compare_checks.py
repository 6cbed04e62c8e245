"""The comparison stage: what it asks whom, and what it refuses before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.chains import Chain
from helpers.jobs import tiny_base, user
from helpers.stages import compare_stage, publish_tiny, run_compare
from rlhf.config import ConfigError
from rlhf.costs.hardware import Machine, Speed
from rlhf.costs.model_shape import shape_of
from rlhf.costs.setup import CostContext
from rlhf.data.prepared import LengthStats, PreparedData
from rlhf.data.schema import SftRow, Split
from rlhf.digests import directory_digest
from rlhf.pipeline.checks import check
from rlhf.pipeline.costing import cost_of
from rlhf.pipeline.stage import View
from rlhf.pipeline.store import Store


def test_a_question_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    """The tiny model has room for 1024 bytes; the reference needs more than the answer."""
    chain = Chain(tmp_path)
    rows = [{"prompt": "short", "completion": "y"}, {"prompt": "x" * 800, "completion": "y" * 300}]
    questions = f"compare.questions={chain.write('long.jsonl', rows)}"
    outcome = chain.run("stage=compare", questions, "compare.max_new_tokens=4")
    assert outcome.code == 2
    assert "compare.questions: long.jsonl line 2: the question has 8" in outcome.err
    assert "context of 1024 leaves 723 for a prompt" in outcome.err
    assert outcome.statuses == {"prepare": "ran"}  # nothing was trained


def test_what_the_stage_needs_follows_from_its_own_questions_and_corpus(
    tiny_model: Path, tmp_path: Path
) -> None:
    data = PreparedData(tmp_path)
    data.write("sft", "train", [SftRow(user("Where is the cat?"), "In.")])
    data.write("sft", "held_out", [SftRow(user("Where is the fox?"), "There.")])
    for role in ("pairs", "dpo", "ppo", "replay", "ptx"):
        data.write(role, "train", [])

    def unmeasured(role: str, split: Split) -> LengthStats:
        return LengthStats(0, 0.0, 0.0, 0)

    def longest(**changes: Any) -> int:
        stage = compare_stage(methods=["retrieval"], num_questions=2, **changes)
        check(stage, View({}, data=data, base=tiny_base(tiny_model)))
        machine = Machine("cpu", "a test", 1e12, 1e12, 0.0, 1, Speed(100.0, 10.0))
        shape = shape_of(tiny_base(tiny_model).architecture)
        return cost_of(stage, CostContext(shape, 4, "none", machine, unmeasured), {}).longest

    def write(name: str, row: dict[str, str]) -> str:
        (tmp_path / name).write_text(json.dumps(row))
        return str(tmp_path / name)

    questions = write("questions.jsonl", {"prompt": "q" * 500, "completion": "Yes."})
    corpus = write("corpus.jsonl", {"text": "p" * 200})
    own = longest()
    assert longest(questions=questions) == own + 500 - len("Where is the fox?")
    passage = len("Where is the cat?\nIn.")
    assert longest(corpus=corpus) == own + 2 * (200 - passage)
    assert (
        longest(questions=questions, corpus=write("corpus.jsonl", {"text": "p" * 999})) == 1024
    )  # it is cut


@pytest.mark.parametrize(
    "asks", ["where is  the CAT?", "Where is the newt?", "Where is the toad?", "Where is the gnu?"]
)
def test_what_training_rows_ask_is_left_out(asks: str, tiny_model: Path, tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    rows = [{"prompt": text, "completion": "There."} for text in (asks, "Where is the yak?")]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = compare_stage(questions=str(questions), methods=["zero_shot"])
    job = run_compare(stage, tiny_model, tmp_path / "run")
    assert (job.summary["prompts"], job.summary["leaks"]) == (1, 1)
    questions.write_text(json.dumps(rows[0]))
    with pytest.raises(ConfigError, match="each of its 1 questions is also in a training row"):
        check(stage, View({}, data=job.data, base=job.base))  # before anything is trained


def test_few_shot_without_examples_is_told_before_anything_is_trained(
    tiny_model: Path, tmp_path: Path
) -> None:
    data = PreparedData(tmp_path)
    data.write("sft", "train", [SftRow([], "A text.")])
    data.write("sft", "held_out", [SftRow(user("Where is the fox?"), "There.")])
    with pytest.raises(ConfigError, match=r"compare: few_shot takes its examples"):
        check(compare_stage(), View({}, data=data, base=tiny_base(tiny_model)))
    check(compare_stage(methods=["zero_shot", "retrieval"]), View({}, data=data, base=tiny_base(tiny_model)))


def test_without_references_the_reward_decides(tiny_model: Path, tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"prompt": "Where is the yak?"}\n')
    with pytest.raises(ConfigError, match=r"compare\.quality=rouge_l needs answers in compare\.questions="):
        run_compare(compare_stage(questions=str(questions)), tiny_model, tmp_path / "rouge")
    stage = compare_stage(
        questions=str(questions), reward="python:helpers.stages:answer_length", quality="score"
    )
    metrics = run_compare(stage, tiny_model, tmp_path / "score").summary
    assert metrics is not None
    assert "score_mean/base+few_shot" in metrics
    assert "win_rate/base+few_shot" in metrics
    assert not [name for name in metrics if name.startswith(("rouge_l", "answer_loss", "exact_match"))]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"quality": "score"}, "quality=score needs compare.reward"),
        ({"methods": ["few_shot", "few_shot"]}, "two have the same name"),
        ({"artifacts": ["runs/a/artifacts/sft", "b/a/sft"]}, "two have the same name"),
        ({"methods": []}, "it must name at least one"),
    ],
)
def test_what_cannot_be_compared_is_told_before_the_run(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        compare_stage(**changes)


def test_an_artifact_that_lost_its_lineage_is_told_before_the_run(tmp_path: Path) -> None:
    publish_tiny(Store(tmp_path), "ppo", {"inputs": {"sft": "gone"}})
    with pytest.raises(ConfigError, match="made from sft/gone, which is no longer in the store"):
        check(compare_stage(artifacts=[str(tmp_path / "ppo" / "tuned")]), View({}))


def test_a_missing_package_is_told_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    check(compare_stage(), View({}))
    monkeypatch.setattr("rlhf.stages.compare.CompareStage.packages", lambda stage: ["no_such_package"])
    with pytest.raises(
        ConfigError, match=r"stage=compare: it needs no_such_package \(pip install -e '\.\[compare\]'\)\."
    ):
        check(compare_stage(), View({}))


def test_a_model_that_was_made_anew_elsewhere_is_asked_anew(tmp_path: Path) -> None:
    store, directory = Store(tmp_path), tmp_path / "sft" / "tuned"
    publish_tiny(store, "sft", {})
    stage = compare_stage(artifacts=[str(directory)])
    before = stage.external_digests(directory_digest, {})
    publish_tiny(store, "sft", {})
    assert stage.external_digests(directory_digest, {}) == before  # the same content
    publish_tiny(store, "sft", {}, note="other content")
    assert (
        stage.external_digests(directory_digest, {}).keys() == before.keys()
        and stage.external_digests(directory_digest, {}) != before
    )
