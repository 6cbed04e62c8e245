"""Rewards in the chain: a file's columns reach them everywhere, and several of them are told apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.chains import Chain

CALLS: list[tuple[int, list[Any], list[Any]]] = []


def keeps(prompts: Any, completions: Any, answer: Any, **columns: Any) -> list[float | None]:
    """In TRL's form, of texts; no score for every third row, and no level there."""
    assert all(isinstance(each, str) for each in (*prompts, *completions))
    assert [int(said.removeprefix("Add ")) for said in prompts] == [int(each) for each in answer]
    assert len(columns["completion_ids"]) == len(completions)
    CALLS.append((len(prompts), answer, columns["level"]))
    return [
        None if level is None else len(set(said))
        for said, level in zip(completions, columns["level"], strict=True)
    ]


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    chain = Chain(tmp_path)
    for name in ("prompts", "evaluation"):
        first = 100 if name == "evaluation" else 0
        rows = [
            {"prompt": f"Add {n}", "answer": str(n), "level": n % 3 or None} for n in range(first, first + 24)
        ]
        chain.write(f"{name}.jsonl", rows)
    return chain


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_columns_reach_several_rewards_in_every_stage(chain: Chain) -> None:
    mine = f"python:{__name__}:keeps"
    parts = f"{{source:'{mine}',weight:0.5}},{{source:'verify:number',weight:2}},vader"
    outcome = chain.run(f"ppo.reward=[{parts}]", "gates=warn", "generate.num_prompts=9")
    assert outcome.code == 0, outcome.err
    assert (
        "ppo.critic.init=auto uses sft" in outcome.out and "verify:number, vader] is no model" in outcome.out
    )
    assert {count for count, _, _ in CALLS} >= {2, 8, 18, 4}  # rehearsed, a rollout, generated, evaluated
    metrics = outcome.summary["stages"]
    assert metrics["generate"]["metrics"]["generate/unscored"] == 0  # other parts score what one does not
    names = ("keeps", "number", "vader")
    for stage, found in (("generate", ""), ("evaluate", "/ppo")):
        for name in names:
            assert f"{stage}/score_mean/{name}{found}" in metrics[stage]["metrics"]
            assert f"{stage}/score_deviation/{name}{found}" in metrics[stage]["metrics"]
    logged: set[str] = set().union(*lines(outcome.directory))
    for name in names:
        assert {f"ppo/score_mean/{name}", f"ppo/held_out_score_deviation/{name}"} <= logged


@pytest.mark.slow
def test_the_only_model_of_a_sum_starts_the_critic(chain: Chain) -> None:
    outcome = chain.run("ppo.reward=[{source:vader,weight:0.1},{source:learned,weight:2}]", "gates=warn")
    assert outcome.code == 0, outcome.err
    assert "ppo.critic.init=auto uses reward." in outcome.out
    assert "evaluate/score_mean/learned/ppo" in outcome.summary["stages"]["evaluate"]["metrics"]


def test_episodes_without_a_score_are_counted_and_the_run_goes_on(chain: Chain) -> None:
    mine = f"python:{__name__}:keeps"
    settings = (
        "ppo.critic.init=sft",
        "evaluate.gold=null",
        "gates=warn",
        "generate.num_prompts=9",
        "stage=ppo",
    )
    outcome = chain.run(f"ppo.reward={mine}", "ppo.score.normalize=running", *settings)
    assert outcome.code == 0, outcome.err
    steps = [line for line in lines(outcome.directory) if "ppo/policy_loss" in line]
    unscored = [line["ppo/unscored"] for line in steps]
    asked = [levels for count, _, levels in CALLS if count == 8][-2:]
    assert unscored == [levels.count(None) for levels in asked] and sum(unscored) > 0
    assert all(line["ppo/bad_steps"] == 0 for line in steps)


def test_a_mix_that_is_normalised_asks_generate_and_one_that_differs_is_refused(chain: Chain) -> None:
    parts = "[{source:vader},{source:'verify:length',args:{unit:characters,max:14}}]"
    mix = f"{{of:{parts},normalize:true,combine:minimum}}"
    settings = (
        "ppo.score.normalize=none",
        "gates=warn",
        "ppo.critic.init=sft",
        "stage=ppo",
        "evaluate.gold=null",
    )
    refused = chain.run(f"ppo.reward={mix}", "generate.reward=vader", *settings)
    assert refused.code == 2
    assert "ppo.reward=[vader, verify:length]: normalize=true takes each reward's mean" in refused.err
    outcome = chain.run(f"ppo.reward={mix}", *settings)
    assert "generate" in outcome.statuses
    if outcome.code:  # a random model's answers may all be alike
        assert "the same score, so it cannot be normalised" in outcome.err


def test_a_column_that_is_in_no_row_is_told_before_anything_trains(chain: Chain) -> None:
    outcome = chain.run("ppo.reward=[{source:'verify:exact',args:{column:gold}}]")
    assert outcome.code == 2 and outcome.statuses.keys() == {"prepare"}
    said = "ppo.reward[0]=verify:exact needs the column gold, and no row of the prompts that it scores has it"
    assert f"{said} (other columns: answer, level)" in outcome.err


RAISED: list[str] = []
"""The answers for which `breaks` raises, from the call after `check_publishable` on."""


def breaks(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Raises for the first answer of the first call of many, and for that one by itself, from then on."""
    if len(completions) > 4 and not RAISED:
        RAISED.append(completions[0])
    if RAISED and RAISED[0] in completions:
        raise ZeroDivisionError("division by zero")
    return [float(len(each)) for each in completions]


def test_one_answer_whose_reward_raises_does_not_end_generate(chain: Chain) -> None:
    RAISED.clear()
    mine = (f"generate.reward=python:{__name__}:breaks", "ppo.score.normalize=none", "stage=generate")
    few = ("generate.num_prompts=8", "generate.samples_per_prompt=4", "gates=warn")
    strict = chain.run(*mine, *few, "generate.max_unscored=0", "run_name=strict")
    assert strict.code == 2
    assert "ZeroDivisionError: division by zero" in strict.err
    kept = Path("runs/strict/generate.unscored.jsonl")
    assert f"The answers are in {kept}." in strict.err
    answers = [json.loads(line) for line in (chain.directory / kept).read_text().splitlines()]
    assert len(answers) == 32 and all(answer["response"] is not None for answer in answers)
    outcome = chain.run(*mine, *few, "generate.max_unscored=0.5")
    assert outcome.code == 0, outcome.err
    (line,) = [line for line in outcome.out.splitlines() if "the reward raised for " in line]
    assert "1 answers, " in line and f"{__file__}, line " in line
    metrics = outcome.summary["stages"]["generate"]["metrics"]
    assert metrics["generate/unscored"] >= metrics["generate/raised"] >= 1
    again = chain.run(*mine, *few, "generate.max_unscored=0.5")
    assert again.statuses["generate"] == "reused"
    stricter = chain.run(*mine, *few, "generate.max_unscored=0", "why=true")
    assert stricter.code == 2 and "ZeroDivisionError" in stricter.err
    assert "generate runs (" in stricter.out and "it has less than is asked" in stricter.out
