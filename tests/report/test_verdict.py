"""The sentence at a run's end: what improved, what did not, and who is to blame."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.verdicts import (
    DOWN,
    GOOD,
    NONE,
    UNKNOWN,
    UP,
    JudgedStage,
    OwnStage,
    chain_of,
    gate_of,
    run_of,
    verdict,
)
from rlhf.config import Bound
from rlhf.evaluation.sampled import Sampled
from rlhf.pipeline.stage import Stage
from rlhf.report.verdict import outcome


@pytest.fixture(scope="module")
def chain() -> dict[str, Stage]:
    return chain_of()


def test_all_is_well(tmp_path: Path, chain: dict[str, Stage]) -> None:
    assert verdict(run_of(tmp_path, chain, **GOOD)) == (
        "Learned: SFT's loss on held-out answers -0.2 (-0.3 to -0.1); the reward model's ranking against "
        "chance and length +0.2 (+0.1 to +0.3); PPO's score on held-out prompts +0.2 (+0.1 to +0.3). "
        "Improved: the gold score of the PPO model on new prompts +0.2 (+0.1 to +0.3)."
    )


def test_what_did_not_improve_is_told_with_the_command_that_finds_the_part(
    tmp_path: Path, chain: dict[str, Stage]
) -> None:
    run = run_of(tmp_path / "mine", chain, **GOOD | {"ppo": UNKNOWN, "gold": DOWN})
    sentence = verdict(run)
    assert "Did not improve: the gold score of the PPO model on new prompts -0.2 (-0.3 to -0.1)." in sentence
    assert "Cannot be told from so few rows: PPO's score on held-out prompts +0.1 (-0.1 to +0.3)." in sentence
    command = "To find the part that limits it: python -m rlhf ceiling mine"
    assert sentence.endswith(f"{command} runs_dir={tmp_path}")
    run.directory = Path("runs/mine")
    assert verdict(run).endswith(command)


def test_without_an_independent_judge_no_command_can_find_anything(tmp_path: Path) -> None:
    chain = chain_of(OwnStage, "ppo.reward=vader", "ppo.score.normalize=none")
    figures = {name: figure for name, figure in GOOD.items() if name not in ("gold", "reward")}
    sentence = verdict(run_of(tmp_path, chain, **figures))
    assert "the reward's score of the PPO model on new prompts +0.2 (+0.1 to +0.3)" in sentence
    assert (
        "python -m rlhf" not in sentence and outcome(run_of(tmp_path, chain, **figures)) == "cannot be told"
    )


def test_a_run_that_only_learned_answers_has_no_part_to_replace(tmp_path: Path) -> None:
    run = run_of(tmp_path, chain_of(), sft=GOOD["sft"])
    run.stages["evaluate"] = {"metrics": {}}
    own = Sampled(*DOWN, 30).metrics("gold_gain/sft") | {"gold_mean/sft": 0.1}
    run.stages["evaluate"]["metrics"] |= {f"evaluate/{key}": value for key, value in own.items()}
    assert "Did not improve: the gold score of the SFT model" in verdict(run)
    assert "ceiling" not in verdict(run)


def test_the_first_failed_gate_of_the_chain_is_told_with_its_advice(
    tmp_path: Path, chain: dict[str, Stage]
) -> None:
    run = run_of(tmp_path, chain, **GOOD)
    gate_of(run, "ppo", "kl", Bound(max=20.0, advice="raise ppo.kl.coef"), 31.0)
    said = (
        "First failed gate: ppo/kl = 31 (95%: 30.99 to 31.01, 96 rows), wanted <= 20. Try: raise ppo.kl.coef."
    )
    assert said in verdict(run) and outcome(run) == "did not work"
    gate_of(run, "sft", "prompt_gain", Bound(min=0.08, advice="read some rows"), 0.02)
    sentence = verdict(run)
    assert "First failed gate: sft/prompt_gain = 0.02" in sentence and "ppo/kl" not in sentence
    assert "Try: read some rows. 1 more failed." in sentence


def test_a_policy_of_ones_own_is_told(tmp_path: Path) -> None:
    chain = chain_of(JudgedStage)
    assert "DPO's margin on held-out pairs +0.2 (+0.1 to +0.3)" in verdict(run_of(tmp_path, chain, dpo=UP))
    sentence = verdict(run_of(tmp_path, chain, **GOOD, gold_dpo=DOWN, gold_merge=DOWN))
    assert "the gold score of the DPO model on new prompts -0.2 (-0.3 to -0.1); the gold" in sentence


@pytest.mark.parametrize(("ppo", "word"), [(-0.13, "did not work"), (0.1, "worked"), (-0.03, "worked")])
def test_a_policy_worse_than_the_untuned_model_did_not_work(
    tmp_path: Path, chain: dict[str, Stage], ppo: float, word: str
) -> None:
    """It improved on its own start."""
    run = run_of(tmp_path, chain, **GOOD)
    for name, value in (("sft", -0.36), ("ppo", ppo)):
        found = Sampled(value, value - 0.05, value + 0.05, 96).metrics(f"gold_over_base/{name}")
        run.stages["evaluate"]["metrics"] |= {f"evaluate/{key}": each for key, each in found.items()}
    assert outcome(run) == word and f"{ppo:+.3g} over base" in verdict(run)


def test_best_of_n_is_judged(tmp_path: Path, chain: dict[str, Stage]) -> None:
    run = run_of(tmp_path, chain, **GOOD)
    own = Sampled(*DOWN, 30).metrics("gold_gain/best_of_n")
    run.stages["evaluate"]["metrics"] |= {f"evaluate/{key}": value for key, value in own.items()}
    sentence = verdict(run)
    assert "Did not improve: the gold score of the best of 16 on new prompts -0.2 (-0.3 to -0.1)." in sentence
    assert outcome(run) == "worked"


def test_nothing_can_be_said(tmp_path: Path, chain: dict[str, Stage]) -> None:
    alone = run_of(tmp_path, chain)  # stage=prepare
    assert verdict(alone) == "" and outcome(alone) is None
    few = verdict(run_of(tmp_path, chain, sft=UNKNOWN, reward=UNKNOWN))
    assert few.startswith("Cannot be told from so few rows: SFT's loss")


@pytest.mark.parametrize(("low", "peak", "noted"), [(0.04, 18, True), (-0.04, 18, False), (0.04, 54, False)])
def test_a_policy_whose_gold_score_was_higher_before_is_noted(
    tmp_path: Path, chain: dict[str, Stage], low: float, peak: int, noted: bool
) -> None:
    run = run_of(tmp_path, chain, **GOOD)
    run.stages["ppo"]["metrics"]["ppo/best_step"] = 48.0
    lost = Sampled(0.12, low, 0.2, 24).metrics("gold_lost/ppo") | {"gold_peak_step/ppo": float(peak)}
    run.stages["evaluate"]["metrics"] |= {f"evaluate/{key}": value for key, value in lost.items()}
    said = (
        " Note ppo: its gold score was higher at step 18 than at step 48, whose weights it keeps, by 0.12 "
        "(0.04 to 0.2). Lower ppo.steps, or raise ppo.kl.coef."
    )
    assert verdict(run).endswith(said) is noted


def test_a_gold_score_that_is_the_same_for_all_tells_nothing(tmp_path: Path, chain: dict[str, Stage]) -> None:
    run = run_of(tmp_path, chain, **GOOD | {"gold": NONE})
    told = {f"evaluate/gold_mean/{name}": 1.0 for name in ("base", "sft", "ppo")}
    told |= {f"evaluate/gold_deviation/{name}": 0.0 for name in ("base", "sft", "ppo")}
    run.stages["evaluate"]["metrics"] |= told
    said = verdict(run)
    assert said.startswith("evaluate.gold gives every answer the same score (1), so it tells no policy")
    assert "bisect" not in said and "ceiling" not in said  # it could judge no trial
    assert outcome(run) == "cannot be told"
    no_answer_is_right = {f"evaluate/score_deviation/{name}": 0.0 for name in ("base", "sft", "ppo")}
    run.stages["evaluate"]["metrics"] |= no_answer_is_right
    assert "evaluate.gold gives" not in verdict(run)
    run.stages["evaluate"]["metrics"]["evaluate/score_deviation/ppo"] = 0.3
    assert "evaluate.gold gives" in verdict(run)
    run.stages["evaluate"]["metrics"]["evaluate/gold_mean/ppo"] = 0.5  # the policies differ
    assert "evaluate.gold gives" not in verdict(run)


@pytest.mark.parametrize(
    ("change", "is_named"),
    [
        ({}, True),
        ({"gold": 0.5}, False),  # the means differ
        ({"values": 2}, False),  # as many right answers, by chance
        ({"moved": 4}, False),  # the policies hardly differ
    ],
)
def test_a_gold_score_with_one_mean_for_policies_that_differ_tells_nothing(
    tmp_path: Path, chain: dict[str, Stage], change: dict[str, Any], is_named: bool
) -> None:
    """As one that standardises each call's scores, or remembers them by the prompt."""
    shape = {"gold": 0.1, "values": 12, "moved": 24} | change
    run = run_of(tmp_path, chain, **GOOD | {"gold": NONE})
    told = {f"evaluate/gold_mean/{name}": 0.1 for name in ("base", "sft")}
    told |= {f"evaluate/gold_deviation/{name}": 1.0 for name in ("base", "sft", "ppo")}
    run.stages["evaluate"]["metrics"] |= told | {"evaluate/gold_mean/ppo": shape["gold"] + 2e-8}
    rows = [
        {
            "policy": name,
            "response": f"{name} {number}" if number < shape["moved"] else "as before",
            "gold": number % shape["values"] / 7,
        }
        for name in ("base", "sft", "ppo")
        for number in range(30)
    ]
    (tmp_path / "artifacts" / "evaluate").mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "artifacts" / "evaluate" / "responses.jsonl").write_text(text, encoding="utf-8")
    assert ("evaluate.gold gives all policies the same mean (0.1), although" in verdict(run)) == is_named
    assert (outcome(run) == "cannot be told") == is_named


def test_the_last_evaluation_is_judged(tmp_path: Path, chain: dict[str, Stage]) -> None:
    run = run_of(tmp_path, chain | {"evaluate@2": chain["evaluate"]}, **GOOD)
    again = Sampled(*DOWN, 30).metrics("gold_gain/ppo")
    run.stages["evaluate@2"] = {"metrics": {f"evaluate@2/{key}": value for key, value in again.items()}}
    sentence = verdict(run)
    assert "Did not improve: the gold score of the PPO model on new prompts -0.2 (-0.3 to -0.1)" in sentence
    assert "Improved: the gold score" not in sentence and outcome(run) == "did not work"


def test_the_outcome_in_a_word(tmp_path: Path, chain: dict[str, Stage]) -> None:
    assert outcome(run_of(tmp_path, chain, **GOOD)) == "worked"
    assert (
        outcome(run_of(tmp_path, chain, **GOOD | {"gold": UNKNOWN, "learned": UNKNOWN})) == "cannot be told"
    )
    assert outcome(run_of(tmp_path, chain, **GOOD | {"gold": DOWN})) == "did not work"
