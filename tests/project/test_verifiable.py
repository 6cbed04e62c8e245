"""Rewards that a rule checks, as the documents show them: the packaged sums, and GSM8K where it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.chains import Outcome, run_main

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k-train" / "train.jsonl.gz"
SMALL = (
    "+experiment=arithmetic", "model=tiny", "device=cpu", "ppo.steps=2", "ppo.batch_episodes=16",
    "ppo.minibatch_episodes=8", "grpo.steps=2", "grpo.batch_episodes=16", "grpo.minibatch_episodes=8",
    "ppo.evaluate_every=2", "ppo.evaluate_prompts=8", "evaluate.num_prompts=8",
    "run_name=sums",
)  # fmt: skip
POLICIES = {"sft", "ppo", "grpo", "grpo@rloo"}

pytestmark = pytest.mark.slow


def run(directory: Path, *overrides: str) -> Outcome:
    return run_main(directory, [*SMALL, *overrides], directory / "runs" / "sums")


def check(outcome: Outcome) -> dict[str, float]:
    """All that is compared was measured by the rule; the prompts of the evaluation are in no training."""
    assert outcome.code == 0, outcome.err
    stages = outcome.summary["stages"]
    assert set(outcome.statuses.values()) == {"ran"} and stages.keys() >= POLICIES
    assert stages["prepare"]["metrics"]["prepare/leaks"] == 0
    measured: dict[str, float] = stages["evaluate"]["metrics"]
    for policy in POLICIES:
        assert 0 <= measured[f"evaluate/gold_mean/{policy}"] <= 1
        assert measured[f"evaluate/gold_unscored/{policy}"] == 0
    assert measured["evaluate/gold_gain_low/ppo"] <= measured["evaluate/gold_gain_high/ppo"]
    return measured


def test_the_sums(tmp_path: Path) -> None:
    outcome = run(tmp_path, "sft.epochs=0.1")
    check(outcome)
    rows = outcome.summary["stages"]["prepare"]["metrics"]
    assert (rows["prepare/ppo_prompts"], rows["prepare/evaluation_prompts"]) == (1055, 259)


@pytest.mark.skipif(not GSM8K.is_file(), reason=f"{GSM8K} is not there")
def test_gsm8k(tmp_path: Path) -> None:
    """Its answers are worked solutions that end in the number. `prepare` sets problems aside to evaluate."""
    outcome = run(
        tmp_path,
        f"sft.data={{path: '{GSM8K}', limit: 40, fields: {{prompt: question, completion: answer}}}}",
        f"ppo.prompts={{path: '{GSM8K}', limit: 200, fields: {{prompt: question}}}}",
        "evaluate.prompts=ppo.prompts", "ppo.reward=verify:math", "ppo.max_new_tokens=8",
        "sft.max_tokens=512",
    )  # fmt: skip
    check(outcome)
