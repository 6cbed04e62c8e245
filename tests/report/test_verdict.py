"""The sentence at a run's end: what improved, what did not, and who is to blame."""

from __future__ import annotations

import json
import math
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
from rlhf.data.prepared import UNLIKE
from rlhf.evaluation.sampled import Sampled
from rlhf.pipeline.defaults import Change
from rlhf.pipeline.run import GateResult
from rlhf.pipeline.stage import Stage
from rlhf.report.verdict import outcome


@pytest.fixture(scope="module")
def chain() -> dict[str, Stage]:
    return chain_of()


def test_all_is_well(tmp_path: Path, chain: dict[str, Stage]) -> None:
    assert verdict(run_of(tmp_path, chain, **GOOD)) == (
        "Learned: SFT's loss on held-out answers (-0.2); the reward model's ranking against chance and "
        "length (+0.2); PPO's score on held-out prompts (+0.2). Improved: the gold score of the PPO model on "
        "new prompts (+0.2)."
    )


@pytest.mark.parametrize(
    ("changed", "not_improved", "blamed"),
    [
        ({"sft": UP}, "SFT's loss on held-out answers (+0.2)", "sft: it learned nothing"),
        ({"sft": UP, "ppo": NONE}, "SFT's loss on held-out answers (+0.2); PPO's score", "sft: it learned"),
        ({"reward": NONE, "ppo": NONE}, "the reward model's ranking", "reward: it ranks no better"),
        ({"ppo": NONE, "gold": NONE}, "PPO's score on held-out prompts (+0)", "ppo: the reward model"),
        ({"ppo": DOWN, "gold": DOWN}, "PPO's score on held-out prompts (-0.2)", "ppo: the reward model"),
        ({"gold": DOWN}, "the gold score of the PPO model on new prompts (-0.2)", "reward: PPO raised"),
        ({"ppo": UNKNOWN, "gold": DOWN}, "the gold score of the PPO model", "ppo: what it publishes is no"),
        (
            {"ppo": UNKNOWN, "reward": UNKNOWN, "gold": NONE}, "the gold score of the PPO model",
            "reward or ppo: what it publishes is no better",
        ),
        ({"ppo": NONE, "reward": UNKNOWN}, "PPO's score on held-out prompts (+0)", "reward or ppo: PPO"),
    ],
)  # fmt: skip
def test_one_stage_is_to_blame(
    tmp_path: Path,
    chain: dict[str, Stage],
    changed: dict[str, tuple[float, float, float]],
    not_improved: str,
    blamed: str,
) -> None:
    sentence = verdict(run_of(tmp_path, chain, **GOOD | changed))
    assert f"Did not improve: {not_improved}" in sentence
    assert f" To blame is {blamed}" in sentence
    assert sentence.endswith(".") and ".." not in sentence


def test_what_was_changed_of_the_blamed_stage_is_said(tmp_path: Path, chain: dict[str, Stage]) -> None:
    changed = [
        Change(key="ppo.optim.lr", default="0.0005", value="0.05"),
        Change(key="instances.ppo@2.steps", default="12", value="3"),
        Change(key="ppo.prompts.path", default="null", value="mine.jsonl"),
        Change(key="ppo.gates.kl.max", default="20", value="30"),
        Change(key="sft.epochs", default="2", value="1"),
        Change(key="prepare.held_out_fraction", default="0.1", value="0.95"),
    ]
    run = run_of(tmp_path, chain, **GOOD | {"ppo": NONE, "gold": NONE})
    run.changed = changed
    assert verdict(run).endswith(
        " Changed there: ppo.optim.lr=0.05 (packaged: 0.0005), "
        "prepare.held_out_fraction=0.95 (packaged: 0.1)."
    )
    well = run_of(tmp_path, chain, **GOOD)
    well.changed = changed
    assert "changed" not in verdict(well)
    keys = (
        ("steps", "12", "6"), ("clip", "0.2", "0.4"), ("optim.lr", "0.001", "0.5"), ("kl.coef", "0", "1"),
        ("reward", "learned", "vader"), ("gamma", "auto", "1"),
    )  # fmt: skip
    run.changed = [Change(key=f"ppo.{key}", default=default, value=value) for key, default, value in keys]
    assert verdict(run).endswith(
        " Changed there: ppo.kl.coef=1 (packaged: 0), ppo.reward=vader (packaged: learned), "
        "ppo.optim.lr=0.5 (packaged: 0.001), ppo.steps=6 (packaged: 12) and 1 more."
    )
    run.changed = [Change(key=f"ppo.key{number}", default="0", value="1") for number in range(6)]
    assert verdict(run).endswith(", ppo.key3=1 (packaged: 0) and 2 more.")


def test_what_was_changed_is_said_where_nobody_is_to_blame(tmp_path: Path, chain: dict[str, Stage]) -> None:
    run = run_of(tmp_path, chain, **GOOD | {"gold": UNKNOWN})
    run.changed = [Change(key="evaluate.max_new_tokens", default="40", value="3")]
    assert verdict(run).endswith(
        " Nobody is to blame for sure. Look first at what was changed: evaluate.max_new_tokens=3 (packaged: "
        "40)."
    )
    run.needed = ["prepare", "sft"]  # of those that ran alone
    assert "Nobody" not in verdict(run)
    run.needed, run.changed = (), [Change(key="evaluate.prompts.path", default="null", value="mine.jsonl")]
    assert "Nobody" not in verdict(run)


def test_data_sets_that_are_unlike_others_are_noted(tmp_path: Path, chain: dict[str, Stage]) -> None:
    prepared = tmp_path / "artifacts" / "prepare"
    prepared.mkdir(parents=True)
    (prepared / UNLIKE).write_text(json.dumps(["One.", "Two.", "Three."]))
    assert verdict(run_of(tmp_path, chain, **GOOD)).endswith(" Note prepare: One. Note prepare: Two.")


def test_best_of_n_is_judged_and_nobody_blamed_for_it(tmp_path: Path, chain: dict[str, Stage]) -> None:
    run = run_of(tmp_path, chain, **GOOD)
    own = Sampled(*DOWN, 30).metrics("gold_gain/best_of_n")
    run.stages["evaluate"]["metrics"] |= {f"evaluate/{key}": value for key, value in own.items()}
    sentence = verdict(run)
    assert "Did not improve: the gold score of the best of 16 on new prompts (-0.2)." in sentence
    assert "To blame" not in sentence and outcome(run) == "worked"


def test_a_key_that_others_repeat_is_told(tmp_path: Path, chain: dict[str, Stage]) -> None:
    run = run_of(tmp_path, chain, sft=DOWN, reward=UP)
    gate_of(run, "generate", "stop_rate", Bound(min=0.3, advice="raise ppo.max_new_tokens"), 0.12)
    run.changed = [
        Change(key="ppo.max_new_tokens", default="40", value="3"),  # which generate repeats
        Change(key="ppo.optim.lr", default="0.0005", value="0.05"),
    ]
    assert verdict(run).endswith(" Changed there: ppo.max_new_tokens=3 (packaged: 40).")


def test_a_reward_model_that_cannot_be_judged_blames_nobody(tmp_path: Path, chain: dict[str, Stage]) -> None:
    sentence = verdict(run_of(tmp_path, chain, **GOOD | {"reward": UNKNOWN}))
    assert (
        "Cannot be told from so few rows: the reward model's ranking against chance and length (+0.1)"
        in sentence
    )
    assert "To blame" not in sentence and "Did not improve" not in sentence


def test_nothing_can_be_said(tmp_path: Path, chain: dict[str, Stage]) -> None:
    alone = run_of(tmp_path, chain)  # stage=prepare
    assert verdict(alone) == "" and outcome(alone) is None
    few = verdict(run_of(tmp_path, chain, sft=UNKNOWN, reward=UNKNOWN))
    assert few.startswith("Cannot be told from so few rows: SFT's loss")


def test_where_nobody_knows_the_gold_score_the_learned_one_is_told(tmp_path: Path) -> None:
    chain = chain_of(OwnStage, "ppo.reward=vader", "ppo.score.normalize=none")
    figures = {name: figure for name, figure in GOOD.items() if name not in ("gold", "reward")}
    assert "the reward's score of the PPO model on new prompts (+0.2)" in verdict(
        run_of(tmp_path, chain, **figures)
    )
    assert "To blame is ppo: no model was trained to score, and" in verdict(
        run_of(tmp_path, chain, **figures | {"ppo": NONE})
    )
    assert (
        "To blame is ppo: what it publishes is no better than what it is compared with, by the reward's"
        in verdict(run_of(tmp_path, chain, **figures | {"learned": DOWN}))
    )


def test_what_is_no_better_is_compared_with_what_ppo_started_from(
    tmp_path: Path, chain: dict[str, Stage]
) -> None:
    """Which is the SFT model, the base model or a directory."""
    sentence = verdict(run_of(tmp_path, chain, **GOOD | {"ppo": UNKNOWN, "gold": DOWN}))
    assert sentence.endswith("no better than what it is compared with, by the gold score on new prompts.")


def test_a_policy_of_ones_own_is_praised_and_blamed(tmp_path: Path, chain: dict[str, Stage]) -> None:
    praised = verdict(run_of(tmp_path, chain, **GOOD, gold_dpo=UP))
    assert "the gold score of the PPO model on new prompts (+0.2); the gold score of the DPO model" in praised
    assert "To blame" not in praised
    sentence = verdict(run_of(tmp_path, chain, **GOOD, gold_dpo=DOWN, gold_merge=DOWN))
    assert "Did not improve: the gold score of the DPO model on new prompts (-0.2); the gold" in sentence
    assert sentence.count("To blame") == 1  # what merge publishes is made from dpo's
    assert (
        "To blame is dpo: what it publishes is no better than what it is compared with, by the gold"
        in sentence
    )


def test_two_that_read_nothing_of_each_other_are_both_to_blame(
    tmp_path: Path, chain: dict[str, Stage]
) -> None:
    sentence = verdict(run_of(tmp_path, chain, **GOOD | {"gold": DOWN}, gold_dpo=DOWN))
    assert "To blame is reward: PPO raised its score" in sentence and "To blame is dpo: what it" in sentence
    sentence = verdict(run_of(tmp_path, chain, **GOOD | {"sft": UP, "gold": DOWN}, gold_dpo=DOWN))
    assert sentence.count("To blame") == 1 and "To blame is sft: it learned nothing" in sentence


def test_a_stage_of_ones_own_says_what_it_is_for(tmp_path: Path) -> None:
    chain = chain_of(JudgedStage)
    assert "DPO's margin on held-out pairs (+0.2)" in verdict(run_of(tmp_path, chain, dpo=UP))
    assert verdict(run_of(tmp_path, chain, dpo=NONE)).endswith(" To blame is dpo: it ranks no better.")
    hacked = verdict(run_of(tmp_path, chain, dpo=UP, gold_dpo=DOWN))
    assert hacked.endswith("dpo: it improved on its own data, and the gold score did not follow.")


def test_a_policy_that_learned_its_own_task_spoils_nothing(tmp_path: Path) -> None:
    """SFT's answers need not have a high gold score; PPO, which reads it, is judged by itself."""
    chain = chain_of()
    sentence = verdict(run_of(tmp_path, chain, **GOOD | {"gold": DOWN}, of_sft=DOWN))
    assert "To blame is sft: it improved on its own data" in sentence
    assert "To blame is reward: PPO raised its score" in sentence


def test_a_gate_of_something_else_is_told_too(tmp_path: Path, chain: dict[str, Stage]) -> None:
    run = run_of(tmp_path, chain, **GOOD)
    run.gates = [GateResult("ppo", "first_kl", 31.0, Bound(max=20.0, advice="raise ppo.kl.coef"))]
    assert verdict(run).endswith(
        " To blame is perhaps ppo (first_kl = 31): its gate failed, and nothing else says why."
    )


def test_what_was_learned_on_other_prompts_is_no_hacking(tmp_path: Path, chain: dict[str, Stage]) -> None:
    """The reward's own score did not rise on new prompts either, so the reward is not to blame."""
    sentence = verdict(run_of(tmp_path, chain, **GOOD | {"gold": DOWN, "learned": DOWN}))
    assert "To blame is ppo: it raised the reward's score on the prompts that it learned from" in sentence
    assert "Compare ppo.prompts with evaluate.prompts." in sentence


def test_a_small_weight_is_no_fault_of_the_reward_model(tmp_path: Path) -> None:
    """Scores are compared before they are weighed: the reward's own on its pairs are not."""
    chain = chain_of(OwnStage, "ppo.reward=[{source: learned, weight: 0.001}]", "ppo.score.normalize=none")
    run = run_of(tmp_path, chain, **GOOD | {"ppo": UNKNOWN, "gold": UNKNOWN})
    run.stages["reward"]["metrics"]["reward/score_deviation"] = 2.0
    figures = {"generate/score_deviation": 0.002, "generate/score_deviation/learned": 2.1}
    run.stages["generate"] = {"metrics": figures}
    assert "To blame" not in verdict(run)
    run.stages["ppo"]["metrics"]["ppo/held_out_kl_last"] = 0.1
    run.changed = [Change(key="ppo.score.normalize", default="moments", value="none")]
    sentence = verdict(run)
    assert "To blame is ppo: its policy hardly moved from its start" in sentence
    assert sentence.endswith(" Changed there: ppo.score.normalize=none (packaged: moments).")


@pytest.mark.parametrize(("on_answers", "named"), [(0.45, True), (2.1, False)])
def test_a_reward_model_that_learned_what_no_answer_has_is_named(
    tmp_path: Path, chain: dict[str, Stage], on_answers: float, named: bool
) -> None:
    run = run_of(tmp_path, chain, **GOOD | {"ppo": UNKNOWN, "gold": UNKNOWN})
    run.stages["reward"]["metrics"]["reward/score_deviation"] = 2.86
    run.stages["generate"] = {"metrics": {"generate/score_deviation": on_answers}}
    gate_of(run, "ppo", "explained_variance", Bound(min=0.0, advice="raise the critic's rate"), -5.6)
    sentence = verdict(run)
    assert ("To blame is reward: what tells its pairs apart is hardly in the answers" in sentence) is named
    assert ("by 2.9 on held-out pairs, by 0.45 in generate). Look at reward.pairs." in sentence) is named


@pytest.mark.parametrize(("kl", "named"), [(0.03, True), (6.0, False)])
def test_a_policy_that_never_moved_is_named(
    tmp_path: Path, chain: dict[str, Stage], kl: float, named: bool
) -> None:
    """Its last step tells: the weights that it keeps may be those of step 0, its start itself."""
    run = run_of(tmp_path, chain, **GOOD | {"ppo": UNKNOWN, "gold": UNKNOWN})
    run.stages["ppo"]["metrics"] |= {"ppo/held_out_kl_last": kl, "ppo/best_step": 0.0, "ppo/kl": 0.0}
    sentence = verdict(run)
    assert ("To blame is ppo: its policy hardly moved from its start (KL 0.03 nats" in sentence) is named
    assert ("Raise ppo.optim.lr or ppo.steps" in sentence) is named


@pytest.mark.parametrize(
    ("sft", "ppo", "said"),
    [
        (-0.36, -0.13, "sft: by the gold score its policy is worse than the untuned model (-0.36), and PPO "
         "did not make up for it: -0.13 (-0.18 to -0.08). Compare the answers of sft.data"),
        (0.2, -0.13, "ppo: by the gold score its policy is worse than the untuned model, -0.13 (-0.18 to "),
        (-0.36, 0.1, ""),
        (-0.36, -0.03, ""),
    ],
)  # fmt: skip
def test_a_policy_worse_than_the_untuned_model_did_not_work(
    tmp_path: Path, chain: dict[str, Stage], sft: float, ppo: float, said: str
) -> None:
    """PPO improved on its own start in each of these."""
    run = run_of(tmp_path, chain, **GOOD)
    for name, value in (("sft", sft), ("ppo", ppo)):
        found = Sampled(value, value - 0.05, value + 0.05, 96).metrics(f"gold_over_base/{name}")
        run.stages["evaluate"]["metrics"] |= {f"evaluate/{key}": each for key, each in found.items()}
    assert said in verdict(run) and ("To blame" in verdict(run)) is bool(said)
    assert outcome(run) == ("did not work" if said else "worked")


def test_a_stage_that_failed_is_named_before_one_that_lost_gold(
    tmp_path: Path, chain: dict[str, Stage]
) -> None:
    """SFT may lose some on purpose, and PPO on a reward that ranks by chance wins nothing back."""
    run = run_of(tmp_path, chain, **GOOD | {"reward": DOWN, "ppo": UNKNOWN, "gold": UNKNOWN})
    for name in ("sft", "ppo"):
        found = Sampled(-0.3, -0.4, -0.2, 96).metrics(f"gold_over_base/{name}")
        run.stages["evaluate"]["metrics"] |= {f"evaluate/{key}": each for key, each in found.items()}
    sentence = verdict(run)
    assert "To blame is reward: it ranks no better" in sentence and sentence.count("To blame") == 1


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
        "(0.04 to 0.2): it learned more than the reward is right about. Lower ppo.steps, or raise "
        "ppo.kl.coef."
    )
    assert verdict(run).endswith(said) is noted


@pytest.mark.parametrize("gold", [DOWN, UNKNOWN])
def test_an_evaluation_that_asks_otherwise_is_named(tmp_path: Path, gold: tuple[float, float, float]) -> None:
    chain = chain_of(OwnStage, "evaluate.temperature=2.5")
    keys = "evaluate.temperature=2.5 and ppo.temperature=0.7"
    sentence = verdict(run_of(tmp_path, chain, **GOOD | {"gold": gold}))
    assert f"To blame is evaluate: it asks otherwise than ppo learned to answer ({keys})." in sentence
    assert sentence.count("To blame") == 1 and "Note" not in sentence
    run = run_of(tmp_path, chain, **GOOD)
    own = Sampled(4.8, 4.6, 5.0, 96).metrics("kl")
    run.stages["ppo"]["metrics"] |= {f"ppo/{key}": value for key, value in own.items()}
    run.stages["evaluate"]["metrics"]["evaluate/kl/ppo"] = 0.56  # by the temperature: the prompts are alike
    improved = verdict(run)
    assert "To blame" not in improved and improved.count("Note") == 1
    assert improved.endswith(f"Note evaluate: it asks otherwise than ppo learned to answer ({keys}).")


def test_a_figure_outside_its_bound_is_noted_where_nobody_is_to_blame(
    tmp_path: Path, chain: dict[str, Stage]
) -> None:
    run = run_of(tmp_path, chain, **GOOD)
    bound = Bound(min=0.5, advice="reward the right length")
    outside, inside = Sampled(0.46, 0.41, 0.52, 96), Sampled(0.6, 0.4, 0.8, 96)
    run.gates.append(GateResult("evaluate", "length_ratio", 0.46, bound, outside))
    run.gates.append(GateResult("evaluate", "stop_rate", 0.6, bound, inside))
    no_row = Sampled(math.nan, math.nan, math.nan, 0)
    run.gates.append(GateResult("evaluate", "win_rate", no_row.value, bound, no_row))
    said = "Note evaluate: length_ratio = 0.46 (95%: 0.41 to 0.52, 96 rows), wanted >= 0.5, which may be"
    assert said in verdict(run) and verdict(run).count("Note") == 1
    assert outcome(run) == "worked"
    gate_of(run, "ppo", "kl", Bound(max=20, advice="raise ppo.kl.coef"), 30)
    assert "To blame is ppo" in verdict(run) and "length_ratio" not in verdict(run)


@pytest.mark.parametrize(("warmup", "is_noted"), [(3, True), (2, False), (0, False)])
def test_a_critic_that_learned_alone_in_most_steps_is_noted(
    tmp_path: Path, warmup: int, is_noted: bool
) -> None:
    run = run_of(tmp_path, chain_of(OwnStage, f"ppo.critic.warmup_steps={warmup}"), **GOOD)
    said = f"Note ppo: in {warmup} of its 4 steps only the critic learned. Lower ppo.critic.warmup_steps."
    assert (said in verdict(run)) == is_noted


def test_a_gold_score_that_is_the_same_for_all_tells_nothing(tmp_path: Path, chain: dict[str, Stage]) -> None:
    run = run_of(tmp_path, chain, **GOOD | {"gold": NONE})
    told = {f"evaluate/gold_mean/{name}": 1.0 for name in ("base", "sft", "ppo")}
    told |= {f"evaluate/gold_deviation/{name}": 0.0 for name in ("base", "sft", "ppo")}
    run.stages["evaluate"]["metrics"] |= told
    said = verdict(run)
    assert said.endswith(
        "the reward's score of the PPO model on new prompts (+0.2). To blame is evaluate: evaluate.gold "
        "gives every answer the same score (1), so it tells no policy from another."
    )
    assert outcome(run) == "cannot be told"
    no_answer_is_right = {f"evaluate/score_deviation/{name}": 0.0 for name in ("base", "sft", "ppo")}
    run.stages["evaluate"]["metrics"] |= no_answer_is_right
    assert "To blame is evaluate" not in verdict(run)
    run.stages["evaluate"]["metrics"]["evaluate/score_deviation/ppo"] = 0.3
    assert "To blame is evaluate" in verdict(run)
    run.stages["evaluate"]["metrics"]["evaluate/gold_mean/ppo"] = 0.5  # the policies differ
    assert "To blame is evaluate" not in verdict(run)


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


def test_prompts_of_another_kind_are_named(tmp_path: Path, chain: dict[str, Stage]) -> None:
    run = run_of(tmp_path, chain, **GOOD | {"gold": UNKNOWN})
    own = Sampled(2.2, 2.0, 2.4, 96).metrics("kl")
    run.stages["ppo"]["metrics"] |= {f"ppo/{key}": value for key, value in own.items()}
    run.stages["evaluate"]["metrics"]["evaluate/kl/ppo"] = 0.27
    found = (
        "ppo moved on the prompts that it learned from (KL 2.2 nats per sequence), and hardly on those of "
        "evaluate (0.27), so these ask for something else. Compare ppo.prompts with evaluate.prompts."
    )
    sentence = verdict(run)
    assert f"To blame is ppo or evaluate: {found}" in sentence and "Note" not in sentence
    run.stages["evaluate"]["metrics"] |= {
        f"evaluate/{key}": value for key, value in Sampled(*UP, 96).metrics("gold_gain/ppo").items()
    }
    improved = verdict(run)
    assert improved.endswith(f"Note evaluate: {found}") and "To blame" not in improved
    run.stages["evaluate"]["metrics"]["evaluate/kl/ppo"] = 2.0
    assert "Note" not in verdict(run) and "To blame" not in verdict(run)


@pytest.mark.parametrize(("share", "named"), [(0.95, True), (0.5, False)])
def test_rows_that_are_mostly_held_out_are_named(tmp_path: Path, share: float, named: bool) -> None:
    chain = chain_of(OwnStage, f"prepare.held_out_fraction={share}")
    run = run_of(tmp_path, chain, **GOOD | {"ppo": NONE, "gold": UNKNOWN})
    sentence = verdict(run)
    said = f" To blame is prepare: {share:.0%} of all rows are held out"
    assert (said in sentence) is named and ("To blame is ppo" in sentence) is not named
    assert "To blame" not in verdict(run_of(tmp_path, chain, **GOOD))


def test_the_last_evaluation_is_judged(tmp_path: Path, chain: dict[str, Stage]) -> None:
    run = run_of(tmp_path, chain | {"evaluate@2": chain["evaluate"]}, **GOOD)
    again = Sampled(*DOWN, 30).metrics("gold_gain/ppo")
    run.stages["evaluate@2"] = {"metrics": {f"evaluate@2/{key}": value for key, value in again.items()}}
    sentence = verdict(run)
    assert "Did not improve: the gold score of the PPO model on new prompts (-0.2)" in sentence
    assert "Improved: the gold score" not in sentence and outcome(run) == "did not work"


def test_the_outcome_in_a_word(tmp_path: Path, chain: dict[str, Stage]) -> None:
    assert outcome(run_of(tmp_path, chain, **GOOD)) == "worked"
    assert (
        outcome(run_of(tmp_path, chain, **GOOD | {"gold": UNKNOWN, "learned": UNKNOWN})) == "cannot be told"
    )
    assert outcome(run_of(tmp_path, chain, **GOOD | {"gold": DOWN})) == "did not work"
