"""The evaluation stage on the tiny model."""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.chains import Chain, Outcome
from helpers.costs import gpus
from helpers.evaluated import PROMPTS, REFERENCES, RETENTION, jsonl, make_stage, rating, run_stage
from helpers.experiments import build
from helpers.jobs import SmallJob, tiny_base, user
from rlhf.compare.candidate import in_order
from rlhf.config import ConfigError
from rlhf.costs.stage_cost import StageCost
from rlhf.data.chat_template import exchange_ids
from rlhf.data.prepared import PreparedData
from rlhf.data.schema import PromptRow, Row
from rlhf.evaluation.answers import Answers, agreement, policy_metrics, task_gain
from rlhf.evaluation.held_out import FILE, write_answers
from rlhf.evaluation.intervals import ratio
from rlhf.evaluation.retention import Retained
from rlhf.pipeline.checks import check
from rlhf.pipeline.graph import inputs
from rlhf.pipeline.key import knobs
from rlhf.pipeline.run import GateResult
from rlhf.pipeline.stage import View
from rlhf.rewards.kinds import RewardMix, is_remote
from rlhf.rl.rollout import Rollout
from rlhf.stages.evaluate import EvaluateStage


def no_number(prompts: list[str], responses: list[str]) -> list[float]:
    return [float("nan")] * len(responses)


@pytest.fixture(scope="module")
def finished(published: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> SmallJob:
    return run_stage(make_stage(), published, tmp_path_factory.mktemp("evaluate") / "run")


def test_equal_policies_measure_alike_and_another_does_not(finished: SmallJob) -> None:
    metrics = finished.summary
    assert metrics is not None
    for name in ("gold_mean", "gold_deviation", "length_mean", "stop_rate", "distinct_1", "distinct_2"):
        assert metrics[f"{name}/base"] == metrics[f"{name}/sft"], name  # the same seed for both
    assert metrics["gold_over_base/sft"] == 0.0 and "gold_over_base/base" not in metrics
    more = metrics["gold_mean/ppo"] - metrics["gold_mean/base"]
    assert metrics["gold_over_base/ppo"] == pytest.approx(more)
    assert metrics["kl/base"] == pytest.approx(0.0, abs=1e-5)
    assert metrics["kl/ppo"] > 0.1
    assert "kl/sft" not in metrics
    assert metrics["retention_perplexity_ratio/sft"] == pytest.approx(1.0)
    assert metrics["retention_perplexity_ratio/ppo"] == pytest.approx(
        metrics["perplexity/ppo"] / metrics["perplexity/base"]
    )


def learning(directory: Path, policy: Path) -> Path:
    """The artifact of a policy that answered one letter a step more, and likes its last step best."""
    shutil.copytree(policy, directory)
    rows = [PromptRow(user(f"What is {n}?")) for n in range(4)]
    for step in (0, 2, 4):
        answers = [
            {**asdict(row), "response": "a" * step, "kl": 0.5 * step, "score": 0.0, "token_ids": [1]}
            for row in rows
        ]
        write_answers(directory / "part", step, answers)
        with (directory / FILE).open("ab") as file:
            file.write((directory / "part").read_bytes())
    return directory


def shortness(prompts: list[str], responses: list[str]) -> list[float]:
    return [-float(len(response)) for response in responses]


def as_told(prompts: Any, completions: Any, length: list[int], **others: Any) -> list[float]:
    """In TRL's form."""
    return [float(each) for each in length]


def run_learner(directory: Path, published: dict[str, Path], gold: str) -> tuple[SmallJob, str]:
    """The job, and what it printed. Prompts that are evaluated have a column that those of training lack."""
    said = StringIO()
    policies = published | {"ppo": learning(directory / "ppo", published["ppo"])}
    stage = make_stage(gold=f"python:{__name__}:{gold}", num_prompts=2)
    job = run_stage(stage, policies, directory / "run", Console(file=said, width=300))
    return job, said.getvalue()


def test_what_a_policy_answered_while_it_learned_is_scored(
    tmp_path: Path, published: dict[str, Path]
) -> None:
    job, _ = run_learner(tmp_path, published, "shortness")
    rows = jsonl(job.directory / "gold_over_steps.jsonl")
    assert [(row["policy"], row["step"], row["kl"], row["gold"], row["rows"]) for row in rows] == [
        ("ppo", 0, 0.0, 0.0, 4), ("ppo", 2, 1.0, -2.0, 4), ("ppo", 4, 2.0, -4.0, 4)
    ]  # fmt: skip
    found = {name: job.summary[f"{name}/ppo"] for name in ("gold_peak_step", "gold_lost", "gold_lost_low")}
    assert found == {"gold_peak_step": 0.0, "gold_lost": 4.0, "gold_lost_low": 4.0}
    assert "gold_lost/sft" not in job.summary


def test_a_gold_score_that_these_prompts_do_not_allow_costs_nothing_else(
    tmp_path: Path, published: dict[str, Path]
) -> None:
    job, said = run_learner(tmp_path, published, "as_told")
    assert job.summary["gold_mean/ppo"] == 3.0
    assert jsonl(job.directory / "gold_over_steps.jsonl") == [] and "gold_lost/ppo" not in job.summary
    assert "gold does not score what ppo answered while it learned: no prompt has the column length." in said


def test_no_server_is_asked_for_a_curve() -> None:
    judge = {"source": "judge:http://127.0.0.1:9/v1", "args": {"model": "any", "rubric": "clear"}}
    remote: list[str | RewardMix] = [
        "https://somewhere/score",
        RewardMix.model_validate({"of": ["vader", judge]}),
    ]
    local: list[str | RewardMix] = [
        "vader",
        "model:somewhere",
        RewardMix.model_validate({"of": ["vader", "learned"]}),
    ]
    assert [*map(is_remote, remote + local)] == [True, True, False, False, False]


def test_there_is_no_distance_between_models_of_other_tokens(
    tiny_model: Path, published: dict[str, Path], tmp_path: Path
) -> None:
    """As with `ppo.init=DIRECTORY` beside a base model of another family."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer.add_tokens([f"word{number}" for number in range(2000)])
    model.resize_token_embeddings(len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "another")
    metrics = run_stage(make_stage(), published | {"base": tmp_path / "another"}, tmp_path / "run").summary
    assert metrics is not None
    assert {name for name in metrics if name.startswith("kl/")} == {"kl/ppo"}


def test_an_answer_of_which_one_model_reads_less_is_no_gain() -> None:
    """Behind virtual tokens the context ends earlier."""
    rollout = Rollout([torch.tensor([1])], [torch.tensor([2])], torch.tensor([True]))

    def answers(nats: list[float], tokens: list[int], size: int = 9) -> Answers:
        known = Retained([], *[torch.zeros(0)] * 3)
        measured = torch.tensor(nats, dtype=torch.float64), torch.tensor(tokens)
        return Answers(rollout, [""], torch.zeros(1, 1), *measured, known, {"a": size})

    base = answers([30.0, 30.0, 40.0], [10, 10, 20])
    gains = task_gain(answers([20.0, 25.0, 10.0], [10, 10, 18]), base)
    assert gains["task_gain"] == pytest.approx(15 / 20)
    assert gains["task_gain_rows"] == 2
    gains = task_gain(answers([20.0, 25.0, 0.0], [8, 12, 0], size=10), base)
    assert gains["task_gain"] == pytest.approx(15 / 20)  # tokens of another size, each answer whole


def test_the_length_is_that_of_all_answers_against_those_of_the_start() -> None:
    def answers(*lengths: int) -> Answers:
        responses = [torch.ones(length, dtype=torch.long) for length in lengths]
        asked = [torch.tensor([1])] * len(lengths)
        rollout = Rollout(asked, responses, torch.tensor(lengths) < 5)
        nothing, known = torch.zeros(0), Retained([], *[torch.zeros(0)] * 3)
        return Answers(rollout, [""] * len(lengths), torch.zeros(1, 1), nothing, nothing, known, {})

    said = policy_metrics("ppo", {"ppo": answers(4, 5, 12), "sft": answers(2, 4, 1)}, start="sft")
    assert said["length_ratio"] == 21 / 7
    assert said["length_ratio_low"] < 3 < said["length_ratio_high"]
    assert said["length_ratio_rows"] == said["stop_rate_change_rows"] == 3
    assert said["stop_rate_change"] == pytest.approx(1 / 3 - 1)  # of three that ended one still does
    assert "win_rate" not in said  # there is no score


def test_the_task_is_learned_where_its_answers_become_likelier(
    finished: SmallJob, published: dict[str, Path], tmp_path: Path
) -> None:
    metrics = finished.summary
    assert metrics is not None
    model, tokenizer = AutoModelForCausalLM.from_pretrained(published["ppo"]), finished.base.load_tokenizer()
    nats, tokens = 0.0, 0
    for row in REFERENCES:
        ids, given = exchange_ids(tokenizer, row.prompt, row.completion)
        with torch.no_grad():
            logp_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        nats -= sum(float(logp_TV[place - 1, ids[place]]) for place in range(given, len(ids)))
        tokens += len(ids) - given
    assert metrics["task_loss/ppo"] == pytest.approx(nats / tokens, rel=1e-4)
    assert metrics["task_gain/ppo"] == pytest.approx(metrics["task_loss/base"] - metrics["task_loss/ppo"])
    assert metrics["task_gain"] == metrics["task_gain/ppo"] < -0.001
    assert metrics["task_gain/sft"] == pytest.approx(0.0, abs=1e-6)
    fewer = run_stage(make_stage(num_references=2, num_prompts=1), published, tmp_path / "run").summary
    assert fewer is not None
    assert fewer["task_loss/ppo"] != pytest.approx(metrics["task_loss/ppo"], rel=1e-5)


@pytest.mark.parametrize(
    ("rows", "gate", "missing"),
    [
        (RETENTION[:1], "question_accuracy_change", "questions"),
        (RETENTION[1:2], "retention_perplexity_ratio", "texts"),
    ],
)
def test_a_gate_needs_its_rows_in_the_retention_set(
    tmp_path: Path, published: dict[str, Path], rows: list[Row], gate: str, missing: str
) -> None:
    data = PreparedData(tmp_path)
    base = tiny_base(published["base"])
    data.write("retention", "evaluation", rows)
    data.write("evaluate", "evaluation", [])
    stage = make_stage(gates={gate: {"min": 0.0, "advice": ""}})
    view = View(build().stages, data=data, base=base)
    with pytest.raises(ConfigError, match=f"evaluate.retention=samples:.* it holds no {missing},"):
        check(stage, view)
    check(make_stage(gates={gate: None}), view)
    data.write("retention", "evaluation", RETENTION)
    check(stage, view)


def test_missing_rows_are_told_before_anything_trains(finished_chain: tuple[Chain, Outcome]) -> None:
    chain, _ = finished_chain
    outcome = chain.run("evaluate.retention=sentences.jsonl", "sft.optim.lr=0.5")
    assert outcome.code == 2
    assert "evaluate.retention=sentences.jsonl: it holds no questions" in outcome.err
    assert outcome.statuses == {"prepare": "ran"}


def test_the_comparison_is_of_ppo(finished: SmallJob) -> None:
    metrics = finished.summary
    assert metrics is not None
    assert metrics["retention_perplexity_ratio"] == metrics["retention_perplexity_ratio/ppo"] != 1.0
    assert metrics["question_accuracy_change"] == (
        metrics["question_accuracy/ppo"] - metrics["question_accuracy/base"]
    )
    assert metrics["gold_gain"] == pytest.approx(metrics["gold_mean/ppo"] - metrics["gold_mean/sft"])
    assert metrics["win_rate_low"] <= metrics["win_rate"] <= metrics["win_rate_high"]


def test_every_policy_is_compared_with_what_ppo_started_from(finished: SmallJob) -> None:
    metrics = finished.summary
    assert metrics is not None
    for metric in ("win_rate", "gold_gain", "length_ratio"):
        names = [f"{metric}{end}" for end in ("", "_low", "_high", "_rows")]
        assert [metrics[f"{name}/ppo"] for name in names] == [metrics[name] for name in names]
        assert not {f"{name}/sft" for name in names} & metrics.keys()
    assert metrics["gold_gain/ppo"] == pytest.approx(metrics["gold_mean/ppo"] - metrics["gold_mean/sft"])
    assert (metrics["win_rate/base"], metrics["gold_gain/base"]) == (0.5, 0.0)  # the same weights as SFT's
    assert metrics["win_rate_low/base"] < 0.5 < metrics["win_rate_high/base"]


def test_the_order_of_the_policies_decides_nothing(
    finished: SmallJob, published: dict[str, Path], tmp_path: Path
) -> None:
    stages = make_stage(), make_stage(policies=["ppo", "base", "sft"])
    assert knobs(stages[0]) == knobs(stages[1]) and read_by(stages[0]) == read_by(stages[1])
    job = run_stage(stages[1], published, tmp_path / "run")
    assert job.summary == finished.summary
    for name in ("comparison.jsonl", "responses.jsonl"):
        assert (job.directory / name).read_bytes() == (finished.directory / name).read_bytes()


def test_best_of_n_is_the_start_with_more_tries(
    finished: SmallJob, published: dict[str, Path], tmp_path: Path
) -> None:
    named = ["best_of_n", "base", "sft", "ppo"]
    changes: dict[str, Any] = {"reward": "python:helpers.evaluated:rating", "gold": None, "policies": named}
    jobs = {of: run_stage(make_stage(**changes, best_of=of), published, tmp_path / f"{of}") for of in (2, 12)}
    scores = {}
    for of, job in jobs.items():
        metrics = job.summary
        assert metrics is not None
        scores[of] = metrics["score_mean/best_of_n"]
        assert metrics["kl/best_of_n"] == pytest.approx(math.log(of) - (of - 1) / of)
        assert metrics["score_gain/best_of_n"] == pytest.approx(scores[of] - metrics["score_mean/sft"])
        for metric in ("task_loss", "perplexity", "question_accuracy"):  # no weight changed
            assert metrics[f"{metric}/best_of_n"] == metrics[f"{metric}/sft"]
        (first, *_) = jsonl(job.directory / "comparison.jsonl")
        assert [*first] == ["prompt", "base", "sft", "best_of_n", "ppo"]
        assert rating([], [first["best_of_n"]["response"]]) == [first["best_of_n"]["score"]]
        for name in ("ppo", "base"):  # what the others say does not depend on it
            assert metrics[f"length_mean/{name}"] == finished.summary[f"length_mean/{name}"]
    sft = jobs[2].summary["score_mean/sft"]
    assert sft < scores[2] < scores[12]


def test_what_the_reward_chose_does_not_count_for_its_agreement_with_gold(
    published: dict[str, Path], tmp_path: Path
) -> None:
    both = dict.fromkeys(("reward", "gold"), "python:helpers.evaluated:rating")
    agreed = [
        run_stage(
            make_stage(**both, best_of=2, policies=names), published, tmp_path / f"{len(names)}"
        ).summary
        for names in (["sft", "ppo"], ["sft", "best_of_n", "ppo"])
    ]
    assert agreed[0] is not None and agreed[1] is not None
    assert agreed[0]["gold_correlation_rows"] == agreed[1]["gold_correlation_rows"]
    assert agreed[0]["gold_correlation_low"] == agreed[1]["gold_correlation_low"]


def test_the_subject_decides_what_stands_without_a_name(
    finished: SmallJob, published: dict[str, Path], tmp_path: Path
) -> None:
    metrics = run_stage(make_stage(subject="base"), published, tmp_path / "run").summary
    assert {name for name in metrics if "/" in name} == {name for name in finished.summary if "/" in name}
    for metric in ("win_rate", "gold_gain", "task_gain", "retention_loss", "question_accuracy_change"):
        assert metrics[metric] == metrics[f"{metric}/base"] == finished.summary[f"{metric}/base"]
    assert finished.summary["retention_loss"] != 0 == metrics["retention_loss"]


def test_figures_follow_from_the_answers_in_the_files(finished: SmallJob) -> None:
    metrics, rows = finished.summary, jsonl(finished.directory / "comparison.jsonl")
    assert metrics is not None
    assert [row["prompt"][0]["content"] for row in rows] == PROMPTS
    wins = [
        (row["ppo"]["gold"] > row["sft"]["gold"]) + 0.5 * (row["ppo"]["gold"] == row["sft"]["gold"])
        for row in rows
    ]
    assert metrics["win_rate"] == pytest.approx(sum(wins) / len(PROMPTS))
    assert metrics["win_rate"] != 0.5  # else a swap of the two would not show
    for name in ("base", "sft", "ppo"):
        assert [row[name]["gold"] for row in rows] == rating(PROMPTS, [row[name]["response"] for row in rows])
        assert metrics[f"gold_mean/{name}"] == pytest.approx(
            sum(row[name]["gold"] for row in rows) / len(PROMPTS)
        )
        assert metrics[f"length_mean/{name}"] == pytest.approx(
            sum(row[name]["tokens"] for row in rows) / len(PROMPTS)
        )
        assert metrics[f"stop_rate/{name}"] == pytest.approx(
            sum(row[name]["stopped"] for row in rows) / len(PROMPTS)
        )


@pytest.mark.parametrize(
    ("factor", "outcome"),
    [
        (1, "passed"),
        (1.2, "passed"),
        (1.7, "failed"),
        (0.4, "failed"),
    ],  # 1.7: docs/problems/hacked-on-purpose.md
)
def test_the_gate_on_length_sees_a_reward_that_pays_for_it(factor: float, outcome: str) -> None:
    start = torch.arange(10, 106)
    found = ratio((factor * start).round(), start)
    bound = build().stages["evaluate"].gates["length_ratio"]
    assert bound is not None
    assert GateResult("evaluate", "length_ratio", found.value, bound, found).outcome == outcome


def test_a_policy_by_itself_has_no_length_to_compare() -> None:
    assert "length_ratio" not in make_stage().not_checked()
    assert "length_ratio" in make_stage(policies=["base", "sft"], subject="sft").not_checked()
    assert "length_ratio" in make_stage(policies=["base", "ppo"]).not_checked()


def test_every_answer_is_a_sample(finished: SmallJob) -> None:
    responses = jsonl(finished.directory / "responses.jsonl")
    assert [(row["policy"], row["prompt"][0]["content"]) for row in responses] == [
        (name, prompt) for name in ("base", "sft", "ppo") for prompt in PROMPTS
    ]
    samples = jsonl(finished.directory / "samples.jsonl")
    assert samples == [{"stage": "evaluate", **row} for row in responses]


def test_micro_batches_do_not_matter(finished: SmallJob, published: dict[str, Path], tmp_path: Path) -> None:
    job = run_stage(make_stage(micro_batch_tokens=1), published, tmp_path / "run")
    assert job.summary == pytest.approx(finished.summary, rel=1e-4, abs=1e-5)


def test_without_scores_there_is_no_winner(published: dict[str, Path], tmp_path: Path) -> None:
    job = run_stage(
        make_stage(gold=None, policies=["ppo", "base"], num_prompts=2), published, tmp_path / "run"
    )
    metrics = job.summary
    assert metrics is not None
    assert not [name for name in metrics if name.startswith(("win", "gold", "score", "kl"))]
    assert metrics["prompts"] == 2
    assert metrics["retention_perplexity_ratio"] == metrics["retention_perplexity_ratio/ppo"]


def test_the_learned_score_decides_where_there_is_no_gold(published: dict[str, Path], tmp_path: Path) -> None:
    stage = make_stage(gold=None, reward="python:helpers.evaluated:rating")
    metrics = run_stage(stage, published, tmp_path / "run").summary
    assert metrics is not None
    assert metrics["win_rate"] == metrics["win_rate_learned"]
    assert "score_mean/ppo" in metrics
    assert "gold_gain" not in metrics


def test_the_reward_goes_with_gold_answer_by_answer() -> None:
    """That both scores rise from one policy to the next is no agreement."""

    def answers(score: list[float], gold: list[float]) -> Answers:
        ones = [torch.tensor([1])] * len(score)
        rollout = Rollout(ones, ones, torch.ones(len(score), dtype=torch.bool))
        nothing, known = torch.zeros(0), Retained([], *[torch.zeros(0)] * 3)
        scores = {"score": torch.tensor(score), "gold": torch.tensor(gold)}
        return Answers(rollout, [""] * len(score), torch.zeros(1, 1), nothing, nothing, known, {}, scores)

    low, high = answers([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]), answers([11.0, 12.0, 13.0], [13.0, 12.0, 11.0])
    found = agreement([low, high])
    assert found["gold_correlation"] == pytest.approx(-1) and found["gold_correlation_rows"] == 3
    unscored = answers([1.0, 2.0, math.nan], [1.0, 2.0, -9.0])
    assert agreement([unscored])["gold_correlation"] == pytest.approx(1)
    del unscored.scores["gold"]
    assert agreement([unscored]) == {}
    assert agreement([]) == {}  # only best-of-n candidates were asked


def test_a_score_must_be_a_number(published: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.gold=python:.*no_number gave nan for the response"):
        run_stage(make_stage(gold=f"python:{__name__}:no_number"), published, tmp_path / "run")


A_SCORE = "needs a score: evaluate.gold, evaluate.reference, evaluate.judge or evaluate.reward"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"policies": ["base", "ppo"]}, r"^evaluate\.gates\.win_rate needs sft in evaluate.policies"),
        ({"subject": "sft"}, "win_rate needs another evaluate.subject than sft"),
        ({"policies": ["base", "sft"]}, r"^evaluate\.subject=ppo is not in evaluate\.policies=\[base,sft\]"),
        (
            {"gold": None},
            "win_rate needs a score: evaluate.gold, evaluate.reference, evaluate.judge or evaluate.reward",
        ),
        ({"policies": ["sft", "sft", "ppo"]}, r"^evaluate\.policies: two candidates are called sft, or"),
        ({"policies": []}, "it must name at least one"),
    ],
)
def test_a_gate_that_nothing_can_measure_is_told_before_the_run(
    changes: dict[str, Any], complaint: str
) -> None:
    gates = {"win_rate": {"min": 0.5, "advice": "raise ppo.steps"}}
    with pytest.raises(ConfigError, match=complaint):
        make_stage(gates=gates, **changes)
    if "needs" in complaint:
        make_stage(gates={"win_rate": None}, **changes)


def test_all_gates_that_nothing_can_measure_are_told_at_once() -> None:
    bound = {"min": 0.5, "advice": "raise ppo.steps"}
    unmeasured = ("win_rate", "retention_perplexity_ratio", "question_accuracy_change")
    changes: dict[str, Any] = {"policies": ["sft", "ppo"], "gold": None}
    with pytest.raises(ConfigError) as told:
        make_stage(gates=dict.fromkeys((*unmeasured, "stop_rate_change"), bound), **changes)
    assert f"gates.win_rate {A_SCORE}; evaluate.gates.retention_perplexity_ratio and" in str(told.value)
    (off,) = re.findall(r"turned off with (.*)\.$", str(told.value))
    assert off.split() == [f"evaluate.gates.{gate}=null" for gate in unmeasured]
    make_stage(gates=dict.fromkeys(unmeasured) | {"stop_rate_change": bound}, **changes)


def test_the_policies_stand_as_they_came_to_be() -> None:
    def ordered(models: list[str], *policies: str, **changes: Any) -> list[str]:
        stage = make_stage(policies=[*policies], subject=policies[0], reward="vader", **changes)
        return [each.name for each in in_order(stage.candidates, models)]

    assert ordered(["base", "prepare"], "base") == ["base"]  # no stage made what PPO starts from
    several = ("ppo", "best_of_n", "sft", "base", "sft+retrieval", "base+few_shot")
    assert ordered(["base", "prepare", "sft", "ppo"], *several) == [
        "base", "base+few_shot", "sft", "sft+retrieval", "best_of_n", "ppo",
    ]  # fmt: skip
    own = ("ppo", "best_of_n", "init", "base")
    assert ordered(["base", "init", "ppo"], *own, init="/a/model") == ["base", "init", "best_of_n", "ppo"]


def test_the_number_of_answers_is_in_the_key_where_it_decides() -> None:
    for policies, is_there in ((["sft", "ppo"], False), (["sft", "best_of_n", "ppo"], True)):
        few, many = (knobs(make_stage(policies=policies, reward="vader", best_of=of)) for of in (2, 16))
        assert (few != many) is is_there


def test_best_of_n_costs_its_answers() -> None:
    chain, names = build().stages, ["base", "sft", "ppo"]
    plain = make_stage(policies=names, reward="learned").cost(gpus(80.0), chain)
    more = make_stage(policies=[*names, "best_of_n"], reward="learned", best_of=16).cost(gpus(80.0), chain)

    def decoding(cost: StageCost) -> float:
        return sum(task.seconds for task in cost.work if task.activity == "decode")

    # 3 answers to a prompt, or 16 more
    assert decoding(more) == pytest.approx(decoding(plain) * (3 + 16) / 3, rel=0.05)
    assert more.peak().size() >= plain.peak().size()


def test_best_of_n_needs_what_it_is_made_of() -> None:
    with pytest.raises(
        ConfigError, match=r"^evaluate\.policies: best_of_n needs evaluate\.reward\. Add it, or"
    ):
        make_stage(policies=["sft", "best_of_n", "ppo"])


def read_by(stage: EvaluateStage) -> tuple[str, ...]:
    return inputs(stage, build().stages)


def test_inputs_follow_the_policies_and_the_rewards() -> None:
    assert read_by(make_stage()) == ("prepare", "ppo", "sft")
    assert read_by(make_stage(policies=["base"], subject="base")) == ("prepare",)
    learned = make_stage(policies=["sft"], subject="sft", reward="learned")
    assert read_by(learned) == ("prepare", "sft", "reward")


def questions_in(part: str, rows: list[Row], directory: Path) -> list[str]:
    """What `evaluate.part` asks of these prompts."""
    directory.mkdir(exist_ok=True)
    data = PreparedData(directory)
    data.write("evaluate", "evaluation", rows)
    return [each.row.asked() for each in make_stage(part=part).questions_of(data)[0]]


def test_the_choosing_and_the_sealed_prompts_are_all_prompts(tmp_path: Path) -> None:
    rows: list[Row] = [PromptRow(user(text)) for text in PROMPTS]
    choosing, sealed = (questions_in(part, rows, tmp_path) for part in ("choosing", "sealed"))
    assert questions_in("all", rows, tmp_path) == PROMPTS
    assert sorted(choosing + sealed) == sorted(PROMPTS) and 0.15 < len(sealed) / len(PROMPTS) < 0.55
    more: list[Row] = [*reversed(rows), *(PromptRow(user(f"Why {n}?")) for n in range(20))]
    for part, own in (("choosing", choosing), ("sealed", sealed)):
        found = questions_in(part, more, tmp_path / "more")
        assert [text for text in found if text in PROMPTS] == own[::-1]


def test_a_part_without_prompts_is_told_in_the_users_key(tmp_path: Path) -> None:
    one: list[Row] = [PromptRow(user(PROMPTS[0]))]
    for part in ("choosing", "sealed"):
        with pytest.raises(ConfigError, match=rf"^evaluate\.part={part}: None of the 1 questions is left to"):
            questions_in(part, one, tmp_path)
    assert questions_in("all", one, tmp_path) == PROMPTS[:1]


def test_the_part_is_in_the_key() -> None:
    keys = [knobs(make_stage(part=part)) for part in ("all", "choosing", "sealed")]
    assert [each["part"] for each in keys] == ["all", "choosing", "sealed"]
    with pytest.raises(ConfigError, match=r"evaluate\.part"):
        make_stage(part="seald")


def test_the_choosing_prompts_are_asked_without_retention(published: dict[str, Path], tmp_path: Path) -> None:
    """What is forgotten chooses no candidate. Of the tiny model alone, to keep it short."""
    stage = make_stage(policies=["base", "ppo"], part="choosing", max_new_tokens=2)
    job = run_stage(stage, published, tmp_path / "run")
    asked = {row["prompt"][0]["content"] for row in jsonl(job.directory / "responses.jsonl")}
    rows: list[Row] = [PromptRow(user(text)) for text in PROMPTS]
    assert asked == {*questions_in("choosing", rows, tmp_path / "data")} and len(asked) < len(PROMPTS)
    assert job.summary["prompts"] == len(asked)
    assert not [name for name in job.summary if name.startswith(("retention", "question_", "perplexity"))]
    data = PreparedData(tmp_path / "run")
    assert [*make_stage(part="sealed").retention_rows(data)] == RETENTION
