"""The sentence at a run's end: what improved, what did not, and who is to blame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf.config import Bound
from rlhf.evaluation.sampled import Sampled
from rlhf.pipeline.run import GateResult, Run
from rlhf.report.verdict import verdict

NAMES = {
    "sft": ("sft", "held_out_loss_change"), "reward": ("reward", "accuracy_over_baseline"),
    "ppo": ("ppo", "held_out_score_gain"), "gold": ("evaluate", "gold_gain"),
    "learned": ("evaluate", "score_gain"),
}  # fmt: skip
UP, DOWN, NONE, UNKNOWN = (0.2, 0.1, 0.3), (-0.2, -0.3, -0.1), (0.0, 0.0, 0.0), (0.1, -0.1, 0.3)
GOOD = {"sft": DOWN, "reward": UP, "ppo": UP, "gold": UP, "learned": UP}


def run_of(directory: Path, **figures: tuple[float, float, float]) -> Run:
    """A run that measured these, each with its interval."""
    stages: dict[str, dict[str, Any]] = {"prepare": {"metrics": {"prepare/sft_rows": 9.0}}}
    for name, figure in figures.items():
        stage, metric = NAMES[name]
        metrics = stages.setdefault(stage, {"metrics": {}})["metrics"]
        metrics |= {f"{stage}/{key}": value for key, value in Sampled(*figure, 30).metrics(metric).items()}
    return Run(directory, stages)


def test_all_is_well(tmp_path: Path) -> None:
    assert verdict(run_of(tmp_path, **GOOD)) == (
        "Improved: SFT's loss on held-out answers (-0.2); the reward model's ranking against chance and "
        "length (+0.2); PPO's score on held-out prompts (+0.2); the gold score on new prompts (+0.2)."
    )


@pytest.mark.parametrize(
    ("changed", "not_improved", "blamed"),
    [
        ({"sft": UP}, "SFT's loss on held-out answers (+0.2)", "sft: it learned nothing"),
        ({"sft": UP, "ppo": NONE}, "SFT's loss on held-out answers (+0.2); PPO's score", "sft: it learned"),
        ({"reward": NONE, "ppo": NONE}, "the reward model's ranking", "reward: it ranks no better"),
        ({"ppo": NONE, "gold": NONE}, "PPO's score on held-out prompts (+0)", "ppo: the reward model"),
        ({"ppo": DOWN, "gold": DOWN}, "PPO's score on held-out prompts (-0.2)", "ppo: the reward model"),
        ({"gold": DOWN}, "the gold score on new prompts (-0.2)", "reward: PPO raised its score"),
        ({"ppo": UNKNOWN, "gold": DOWN}, "the gold score on new prompts", "ppo: what it publishes is no"),
        ({"ppo": NONE, "reward": UNKNOWN}, "PPO's score on held-out prompts (+0)", "reward or ppo: PPO did"),
    ],
)  # fmt: skip
def test_one_stage_is_to_blame(
    tmp_path: Path, changed: dict[str, tuple[float, float, float]], not_improved: str, blamed: str
) -> None:
    sentence = verdict(run_of(tmp_path, **GOOD | changed))
    assert f"Did not improve: {not_improved}" in sentence
    assert f" To blame is {blamed}" in sentence
    assert sentence.endswith(".") and ".." not in sentence


def test_a_reward_model_that_cannot_be_judged_blames_nobody(tmp_path: Path) -> None:
    sentence = verdict(run_of(tmp_path, **GOOD | {"reward": UNKNOWN}))
    assert (
        "Cannot be told from so few rows: the reward model's ranking against chance and length (+0.1)"
        in sentence
    )
    assert "To blame" not in sentence and "Did not improve" not in sentence


def test_nothing_can_be_said(tmp_path: Path) -> None:
    assert verdict(run_of(tmp_path)) == (
        "Nothing can be said: no stage of this run measures whether anything improved."
    )
    few = verdict(run_of(tmp_path, sft=UNKNOWN, reward=UNKNOWN))
    assert few.startswith("Nothing can be said. Cannot be told from so few rows: SFT's loss")


def test_where_nobody_knows_the_gold_score_the_learned_one_is_told(tmp_path: Path) -> None:
    figures = {name: figure for name, figure in GOOD.items() if name not in ("gold", "reward")}
    assert "the reward's score on new prompts (+0.2)" in verdict(run_of(tmp_path, **figures))
    assert "To blame is ppo: its reward is not learned" in verdict(
        run_of(tmp_path, **figures | {"ppo": NONE})
    )
    assert "To blame is ppo: what it publishes scores no" in verdict(
        run_of(tmp_path, **figures | {"learned": DOWN})
    )


def test_what_is_no_better_is_compared_with_what_ppo_started_from(tmp_path: Path) -> None:
    """Which is the SFT model, the base model or a directory."""
    sentence = verdict(run_of(tmp_path, **GOOD | {"ppo": UNKNOWN, "gold": DOWN}))
    assert sentence.endswith("no better than what it started from, by the gold score.")


def test_a_gate_of_something_else_is_told_too(tmp_path: Path) -> None:
    run = run_of(tmp_path, **GOOD)
    run.gates = [GateResult("ppo", "kl", 31.0, Bound(max=20.0, advice="raise ppo.kl.coef"))]
    assert verdict(run).endswith(" To blame is ppo (kl = 31): its gate failed.")
