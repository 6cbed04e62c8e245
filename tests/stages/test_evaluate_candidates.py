"""Candidates that differ in how they are asked, on the tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.endpoint import served_endpoint
from helpers.evaluated import PROMPTS, jsonl, make_stage, run_stage
from helpers.experiments import build
from helpers.jobs import SmallJob, user
from rlhf.compare.harness import Comparison
from rlhf.config import ConfigError
from rlhf.data.prepared import PreparedData
from rlhf.data.schema import PromptRow
from rlhf.evaluation.references import rouge_l
from rlhf.pipeline.checks import check
from rlhf.pipeline.key import knobs
from rlhf.pipeline.stage import View
from rlhf.rewards.reward import RewardError

ASKED = ["base", "base+few_shot", "sft", "sft+retrieval", "ppo", "ppo+best_of_n"]


@pytest.fixture(scope="module")
def finished(published: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> SmallJob:
    stage = make_stage(
        policies=ASKED, reference="answer", num_timed=2, best_of=3, reward="python:helpers.evaluated:rating",
        gold=None, price_per_hour=3600.0,
    )  # fmt: skip
    return run_stage(stage, published, tmp_path_factory.mktemp("asked") / "run")


def test_every_candidate_answers_every_question(finished: SmallJob) -> None:
    rows = jsonl(finished.directory / "responses.jsonl")
    assert list(dict.fromkeys(row["policy"] for row in rows)) == ASKED
    for name in ASKED:
        own = [row for row in rows if row["policy"] == name]
        assert [row["prompt"][0]["content"] for row in own] == PROMPTS
        assert ["asked" in own[0], "cut" in own[0]] == ["few" in name or "retrieval" in name] * 2
        assert ["seconds" in row for row in own] == [True, True] + [False] * (len(PROMPTS) - 2)
        mean = sum(rouge_l(row["response"], row["reference"]) for row in own) / len(own)
        assert finished.summary[f"rouge_l/{name}"] == pytest.approx(mean, abs=1e-4)
    (few,) = {len(row["asked"]) for row in rows if row["policy"] == "base+few_shot"}
    assert few == 9  # four examples, and the question
    shown = [row["asked"][0]["content"] for row in rows if row["policy"] == "sft+retrieval"]
    assert "It is 4" in shown[1] and shown[1].endswith("Question: Name a colour!")  # a training row
    assert shown[0] == PROMPTS[0]  # nothing was found


def test_gains_are_over_the_best_untrained_candidate(finished: SmallJob) -> None:
    metrics = finished.summary
    best = max(("base", "base+few_shot"), key=lambda name: metrics[f"rouge_l/{name}"])
    assert f"gain/{best}" not in metrics
    for name in {*ASKED} - {best}:
        gain = metrics[f"rouge_l/{name}"] - metrics[f"rouge_l/{best}"]
        assert metrics[f"gain/{name}"] == pytest.approx(gain)
        assert metrics[f"gain_low/{name}"] <= gain <= metrics[f"gain_high/{name}"]


def test_the_best_of_n_scores_highest_and_costs_most(finished: SmallJob) -> None:
    metrics = finished.summary
    assert metrics["score_mean/ppo+best_of_n"] > metrics["score_mean/ppo"]
    assert metrics["seconds_mean/ppo+best_of_n"] > 0
    assert metrics["cost_per_thousand/ppo"] == pytest.approx(1000 * metrics["seconds_mean/ppo"])
    assert metrics["setup_seconds/base"] == 0 < metrics["setup_seconds/base+few_shot"]
    assert "kl/ppo+best_of_n" not in metrics  # its bound is known for the start only
    assert "kl/base+few_shot" not in metrics and metrics["kl/base"] == pytest.approx(0.0, abs=1e-5)


def test_what_a_model_forgot_does_not_depend_on_the_prompt(finished: SmallJob) -> None:
    metrics = finished.summary
    for name in ("retention_perplexity_ratio", "task_gain", "question_accuracy_change"):
        assert metrics[f"{name}/ppo+best_of_n"] == metrics[f"{name}/ppo"]
    for name in ("retention_perplexity_ratio", "question_accuracy_change"):
        assert metrics[f"{name}/sft+retrieval"] == metrics[f"{name}/sft"]
    assert "task_gain/sft+retrieval" not in metrics  # its answers come after passages


def test_several_answers_per_question_are_checked_by_the_verifier(
    published: dict[str, Path], tmp_path: Path
) -> None:
    stage = make_stage(
        policies=["sft", "ppo"], gold={"of": [{"source": "verify:length", "args": {"max": 3}}]},
        samples_per_prompt=4, num_prompts=6,
    )  # fmt: skip
    metrics = run_stage(stage, published, tmp_path / "several").summary
    for name in ("sft", "ppo"):
        passed = [metrics[f"pass_at_{k}/{name}"] for k in (1, 2, 4)]
        assert passed == sorted(passed) and passed[0] == pytest.approx(metrics[f"avg_at_4/{name}"])
    assert not [each for each in metrics if each.startswith("maj_at")]  # a length is no answer
    alone = make_stage(policies=["sft", "ppo"], num_prompts=6)
    single = run_stage(alone, published, tmp_path / "single").summary
    assert {each for each in metrics if each.startswith("pass")} and single["prompts"] == 6


def test_scores_that_are_neither_right_nor_wrong_give_no_pass_at_k(
    published: dict[str, Path], tmp_path: Path
) -> None:
    twice = {"of": [{"source": "verify:length", "args": {"max": 3}, "weight": 2.0}]}
    stage = make_stage(policies=["sft", "ppo"], gold=twice, samples_per_prompt=2, num_prompts=4)
    metrics = run_stage(stage, published, tmp_path / "run").summary
    assert "gold_mean/ppo" in metrics and not [name for name in metrics if "_at_" in name]


def test_an_endpoint_is_asked_like_any_other_candidate(
    published: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret-4712")
    with served_endpoint() as server:
        server.says = lambda question: f"It is {question[8:-1]}."
        stage = make_stage(
            policies=["base", f"{server.url}#org/gpt", f"{server.url}#org/gpt+few_shot"], subject="base",
            reference="answer", num_prompts=5, temperature=0.0, num_timed=2,
            endpoint={"key_variable": "OPENAI_API_KEY", "price_in": 1000.0, "price_out": 500.0},
        )  # fmt: skip
        job = run_stage(stage, published, tmp_path / "asked")
        unpriced = stage.endpoint.model_copy(update={"price_in": None})
        free = run_stage(stage.model_copy(update={"endpoint": unpriced}), published, tmp_path / "free")
    assert "cost_per_thousand/org-gpt" not in free.summary  # a price is unknown
    plain, shown = server.asked[:5], server.asked[5:10]
    assert {each["model"] for each in server.asked} == {"org/gpt"} and len(server.asked) == 20
    assert [each["messages"][-1]["content"] for each in plain] == PROMPTS[:5]
    assert {len(each["messages"]) for each in shown} == {9}
    assert plain[0]["temperature"] == 0.0 and plain[0]["max_tokens"] == 6
    assert {*server.keys} == {"Bearer secret-4712"}
    metrics = job.summary
    assert metrics["answer_found/org-gpt"] == 1.0 > metrics["answer_found/base"]
    assert metrics["cost_per_thousand/org-gpt"] == pytest.approx(1000 * (1000 * 100 + 500 * 2) / 1e6)
    assert metrics["stop_rate/org-gpt"] == 1.0 and metrics["seconds_mean_rows/org-gpt"] == 2
    assert not [
        each for each in metrics if each.startswith(("retention", "task_gain", "kl")) and "gpt" in each
    ]
    texts = [
        row["response"] for row in jsonl(job.directory / "responses.jsonl") if row["policy"] == "org-gpt"
    ]
    assert texts == [f"It is {text[8:-1]}." for text in PROMPTS[:5]]


def test_an_endpoint_that_answers_something_else_is_an_error(
    published: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any model is loaded."""
    with served_endpoint() as server:
        server.finish_reason = "length"
        stage = make_stage(policies=["base", f"{server.url}#m"], subject="base", num_prompts=2)
        assert run_stage(stage, published, tmp_path / "cut").summary["stop_rate/m"] == 0.0
        stage = make_stage(policies=["base", f"{server.url}x#m"], subject="base", num_prompts=2)
        with pytest.raises(RewardError, match=r"127\.0\.0\.1"):
            run_stage(stage, published, tmp_path / "gone")
        later = make_stage(policies=["sft", "base", f"{server.url}x#m"], subject="base", num_prompts=2)
        monkeypatch.setattr(Comparison, "load", lambda *_: pytest.fail("a model was asked before"))
        with pytest.raises(RewardError, match=r"127\.0\.0\.1"):
            run_stage(later, published, tmp_path / "later")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"policies": ["http://h/v1", "ppo"]}, r"evaluate\.policies: http://h/v1: name the model behind a #"),
        ({"policies": ["http://h/v1#m+best_of_n", "ppo"], "reward": "vader"}, "not sampled from an endpoint"),
        ({"policies": ["http://h/v1#m+few_shot", "ppo"], "retriever": "embeddings"}, "gives no embeddings"),
        ({"policies": ["http://h/v1#m", "ppo"], "samples_per_prompt": 2}, "asked once per prompt"),
        (
            {"policies": ["sft+fewshot", "ppo"]},
            r"sft\+fewshot: there is no method fewshot. Did you mean few_shot",
        ),
        ({"policies": ["ppo+retrieval+few_shot", "ppo"]}, "only one method may follow a model"),
        (
            {"policies": ["sftt+few_shot", "ppo"]},
            "policies=sftt: no stage of that name makes a policy. Did you",
        ),
        ({"policies": ["sft", "best_of_n", "sft+best_of_n", "ppo"], "reward": "vader"}, "or are the same"),
        ({"quality": "rouge_l"}, r"evaluate\.quality=rouge_l needs evaluate\.reference"),
        ({"policies": ["a/b/sft", "c/b/sft", "ppo"]}, "two candidates are called b/sft"),
        (
            {"policies": ["sft+best_of_n", "ppo"], "reward": "vader", "temperature": 0.0},
            r"^evaluate\.temperature=0 gives equal answers, and best_of_n needs others",
        ),
        ({"samples_per_prompt": 2, "temperature": 0.0}, "and evaluate.samples_per_prompt needs others"),
        ({"quality": "judge"}, r"evaluate\.quality=judge needs evaluate\.judge"),
    ],
)
def test_what_cannot_be_asked_is_told_before_the_run(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make_stage(**changes)


def test_a_judge_that_a_candidate_learned_from_ranks_nobody(
    published: dict[str, Path], tmp_path: Path
) -> None:
    chain = build("ppo.reward=vader").stages
    with pytest.raises(
        ConfigError, match=r"quality=gold: a candidate learned from vader, so it cannot judge"
    ):
        check(make_stage(gold="vader", quality="gold"), View(chain))
    check(make_stage(gold="vader", quality="gold", policies=["base", "sft"], subject="sft"), View(chain))
    verifier = {"of": [{"source": "verify:number"}]}
    check(
        make_stage(gold=verifier, quality="gold"),
        View(build("ppo.reward={of: [{source: verify:number}]}").stages),
    )
    both = build("dpo.data=samples:pairs", "reward.pairs=samples:pairs").stages
    policies = {"policies": ["sft", "dpo"], "subject": "dpo"}
    with pytest.raises(ConfigError, match="a candidate learned from learned, so"):  # from its pairs
        check(make_stage(gold="learned", quality="gold", **policies), View(both))
    same = make_stage(policies=["base", "sft+best_of_n", "sft"], subject="sft", reward="vader", gold="vader")
    assert same.learned_from("gold", {}) == "vader"  # the reward chose the answers
    found = run_stage(same, published, tmp_path / "run").summary
    assert not [name for name in found if name.startswith("gain")]


def test_what_no_candidate_uses_is_not_in_the_key() -> None:
    few = {"examples": 1, "choice": "random", "template": "{question}"}
    plain, prompted = ["sft", "ppo"], ["sft", "sft+few_shot", "ppo"]
    assert knobs(make_stage(policies=plain)) == knobs(make_stage(policies=plain, few_shot=few))
    assert knobs(make_stage(policies=prompted)) != knobs(make_stage(policies=prompted, few_shot=few))


def test_a_prompt_without_its_reference_is_told(published: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.reference=wanted: prompt 1 .* It has length, answer"):
        run_stage(make_stage(reference="wanted"), published, tmp_path / "run")


def test_an_empty_reference_is_an_error(tmp_path: Path) -> None:
    """Any answer would score 0."""
    data = PreparedData(tmp_path)
    rows = [PromptRow(user(f"{n}?"), columns={"answer": text}) for n, text in enumerate(["4", "", " ", "5"])]
    data.write("evaluate", "evaluation", rows)
    with pytest.raises(
        ConfigError, match=r"\.reference=answer is empty in 2 of 4 prompts, first in prompt 2 "
    ):
        make_stage(reference="answer").questions_of(data)
