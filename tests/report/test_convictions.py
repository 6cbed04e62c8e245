"""Which stage a failed gate convicts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.verdicts import (
    DOWN,
    GOOD,
    LENGTH,
    NONE,
    PERPLEXITY,
    UNKNOWN,
    UP,
    OwnStage,
    chain_of,
    gate_of,
    run_of,
    verdict,
)
from rlhf.config import Bound
from rlhf.evaluation.sampled import Sampled
from rlhf.pipeline.run import GateResult
from rlhf.pipeline.stage import Stage
from rlhf.report.verdict import outcome


@pytest.fixture(scope="module")
def chain() -> dict[str, Stage]:
    return chain_of()


def test_shuffled_pairs_are_named(tmp_path: Path, chain: dict[str, Stage]) -> None:
    """The reward model ranks at chance. Few held-out pairs cannot tell; then PPO's outcome points there."""
    assert "To blame is reward: it ranks no better than" in verdict(
        run_of(tmp_path, chain, **GOOD | {"reward": (-0.2, -0.4, 0.0), "gold": DOWN})
    )
    assert "To blame is reward: PPO raised its score" in verdict(
        run_of(tmp_path, chain, **GOOD | {"reward": UNKNOWN, "gold": DOWN})
    )
    run = run_of(tmp_path, chain, **GOOD | {"reward": UNKNOWN, "gold": UNKNOWN})
    gate_of(run, "ppo", "explained_variance", Bound(min=0.0, advice="raise the critic's rate"), -0.8)
    assert "To blame is reward: nobody can tell that it ranks better than chance" in verdict(run)


def test_sft_on_garbage_is_named(tmp_path: Path, chain: dict[str, Stage]) -> None:
    """It learns the garbage well, and PPO inherits what it forgot: the first that lost it is to blame."""
    run = run_of(tmp_path, chain, **GOOD | {"gold": DOWN})
    gate_of(run, "evaluate", "retention_perplexity_ratio", PERPLEXITY, 3.2, "sft ppo")
    sentence = verdict(run)
    assert (
        "To blame is sft: its policy lost what the base model knew (retention_perplexity_ratio/sft = 3.2"
        in sentence
    )
    assert sentence.count("To blame") == 1 and outcome(run) == "did not work"


def test_ppo_that_forgot_by_itself_is_named(tmp_path: Path, chain: dict[str, Stage]) -> None:
    run = run_of(tmp_path, chain, **GOOD)
    gate_of(run, "evaluate", "retention_perplexity_ratio", PERPLEXITY, 1.02, "sft")
    gate_of(run, "evaluate", "retention_perplexity_ratio", PERPLEXITY, 2.0, "ppo")
    assert "To blame is ppo: its policy lost what the base model knew" in verdict(run)


def test_a_reward_trained_on_length_is_named(tmp_path: Path, chain: dict[str, Stage]) -> None:
    """Without a gold score too."""
    figures = {name: figure for name, figure in GOOD.items() if name != "gold"}
    run = run_of(tmp_path, chain, **figures)
    run.stages["reward"]["metrics"]["reward/length_correlation"] = 0.83
    gate_of(run, "evaluate", "length_ratio", LENGTH, 1.71, "ppo")
    sentence = verdict(run)
    assert "To blame is reward: PPO changed the length of the answers (length_ratio/ppo = 1.71" in sentence
    assert "the reward's scores go with length by +0.83" in sentence and sentence.count("To blame") == 1


def test_a_reward_that_hardly_pays_for_length_is_not_named(tmp_path: Path, chain: dict[str, Stage]) -> None:
    run = run_of(tmp_path, chain, **GOOD)
    run.stages["reward"]["metrics"]["reward/length_correlation"] = 0.08
    gate_of(run, "evaluate", "length_ratio", LENGTH, 2.02, "ppo")
    sentence = verdict(run)
    assert "To blame is ppo: PPO changed the length of the answers (length_ratio/ppo = 2.02" in sentence
    assert "go with length by +0.08). The reward hardly pays for length: is what ppo starts from" in sentence


def test_a_reward_that_pays_for_a_word_is_named(tmp_path: Path, chain: dict[str, Stage]) -> None:
    run = run_of(tmp_path, chain, **GOOD)
    gate_of(run, "evaluate", "word_gain", Bound(max=0.6, advice="read the answers"), 0.71, "ppo")
    sentence = verdict(run)
    assert "To blame is reward: PPO put one word into the answers (word_gain/ppo = 0.71" in sentence
    assert "may pay for a word and not for what is said" in sentence
    answers = [("sft", "my cat"), ("sft", "A dog"), ("ppo", "Amazing cat!"), ("ppo", "an amazing dog")]
    (tmp_path / "artifacts" / "evaluate").mkdir(parents=True)
    rows = [json.dumps({"policy": policy, "response": text}) for policy, text in answers]
    (tmp_path / "artifacts" / "evaluate" / "responses.jsonl").write_text("\n".join(rows))
    assert 'To blame is reward: PPO put the word "amazing" into the answers' in verdict(run)
    run.stages["evaluate"]["metrics"] |= {"evaluate/length_mean/sft": 8.0, "evaluate/length_mean/ppo": 29.0}
    assert "To blame is sft: its answers have 8 tokens, and those of PPO 29, so" in verdict(run)


def test_answers_that_no_longer_end_are_named(tmp_path: Path, chain: dict[str, Stage]) -> None:
    run = run_of(tmp_path, chain, **GOOD)
    gate_of(run, "evaluate", "stop_rate_change", Bound(min=-0.3, advice="read the answers"), -0.64, "ppo")
    sentence = verdict(run)
    assert "To blame is ppo: far fewer of its answers end by themselves than before" in sentence
    assert sentence.count("To blame") == 1 and outcome(run) == "did not work"


def test_what_sft_forgot_is_named_also_where_ppo_cannot_be_told(
    tmp_path: Path, chain: dict[str, Stage]
) -> None:
    run = run_of(tmp_path, chain, **GOOD)
    bound = Bound(max=1.15, advice="lower sft.optim.lr")
    sampled = Sampled(1.26, 1.14, 1.39, 226)
    run.gates.append(GateResult("evaluate", "retention_perplexity_ratio", 1.26, bound, sampled))
    own = Sampled(1.37, 1.25, 1.5, 226).metrics("retention_perplexity_ratio/sft")
    run.stages["evaluate"]["metrics"] |= {f"evaluate/{key}": value for key, value in own.items()}
    assert "To blame is sft: its policy lost what the base model knew" in verdict(run)
    assert outcome(run) == "did not work"
    run.gates[-1] = replace(run.gates[-1], value=1.0, sampled=Sampled(1.0, 0.9, 1.1, 226))
    assert "To blame" not in verdict(run) and outcome(run) == "worked"


def test_a_reward_that_counts_against_itself_is_named(tmp_path: Path) -> None:
    """The reward model ranks well, and the policy was paid for what it likes least."""
    chain = chain_of(OwnStage, "ppo.reward=[{source: learned, weight: -1}]")
    run = run_of(tmp_path, chain, **GOOD | {"gold": DOWN})
    gate_of(run, "evaluate", "gold_correlation", Bound(min=0.2, advice="look at the reward"), -0.72)
    sentence = verdict(run)
    assert (
        "To blame is ppo: ppo.reward[0] counts learned with a weight of -1, so it pays for what that likes "
        "least, and goes against the gold score (gold_correlation = -0.72" in sentence
    )
    assert "exchanged" not in sentence and sentence.count("To blame") == 1


def test_data_of_which_most_was_left_out_is_named(tmp_path: Path, chain: dict[str, Stage]) -> None:
    """And not the reward model, which learned from the rest."""
    run = run_of(tmp_path, chain, **GOOD | {"reward": UNKNOWN, "ppo": NONE, "gold": NONE})
    gate_of(run, "prepare", "bad_share", Bound(max=0.5, advice="look at the rows"), 0.956)
    sentence = verdict(run)
    assert "To blame is prepare: it left out most rows of a data set (bad_share = 0.956" in sentence
    assert sentence.count("To blame") == 1


@pytest.mark.parametrize(("value", "exchanged"), [(-0.7, True), (-0.005, False), (0.02, False)])
def test_a_reward_that_does_not_go_with_gold_is_named(
    tmp_path: Path, chain: dict[str, Stage], value: float, exchanged: bool
) -> None:
    run = run_of(tmp_path, chain, **GOOD | {"gold": DOWN})
    gate_of(run, "evaluate", "gold_correlation", Bound(min=0.2, advice="look at the reward"), value)
    sentence = verdict(run)
    goes = "goes against" if exchanged else "does not go with"
    blamed = "reward or evaluate" if exchanged else "reward"
    assert f"To blame is {blamed}: it {goes} the gold score (gold_correlation = {value:g}" in sentence
    asks = (
        "Are the better and the worse answers of reward.pairs exchanged, or does evaluate.gold give the worse"
    )
    assert (asks in sentence) is exchanged
    own = chain_of(OwnStage, "ppo.reward=verify:number", "ppo.critic.init=sft")
    alone = run_of(tmp_path, own, **GOOD | {"gold": DOWN})
    gate_of(alone, "evaluate", "gold_correlation", Bound(min=0.2, advice="look at the reward"), value)
    assert f"To blame is the reward of ppo: it {goes} the gold score" in verdict(alone)
    assert "exchanged" not in verdict(alone)


def test_answers_that_were_cut_off_before_are_named(tmp_path: Path, chain: dict[str, Stage]) -> None:
    run = run_of(tmp_path, chain, **GOOD)
    gate_of(run, "sft", "cut_share", Bound(max=0.2, advice="look at the data"), 0.79)
    assert "To blame is sft: the answers that it learned were cut off before it read them" in verdict(run)


@pytest.mark.parametrize(("ratio", "named"), [(584.0, True), (1.02, False)])
def test_a_broken_model_of_ones_own_is_named_before_what_it_breaks(
    tmp_path: Path, ratio: float, named: bool
) -> None:
    """Its answers do not end, and PPO goes far: both would be blamed on something else."""
    chain = chain_of(OwnStage, "ppo.init=./mine")
    run = run_of(tmp_path, chain, **GOOD | {"ppo": UNKNOWN, "gold": UNKNOWN})
    for policy, value in (("init", ratio), ("ppo", 90.0)):
        found = Sampled(value, value - 0.1, value + 0.1, 200).metrics(f"retention_perplexity_ratio/{policy}")
        run.stages["evaluate"]["metrics"] |= {f"evaluate/{key}": each for key, each in found.items()}
    gate_of(run, "generate", "stop_rate", Bound(min=0.3, advice="look"), 0.0)
    gate_of(run, "ppo", "kl", Bound(max=20.0, advice="look"), 134.8)
    gate_of(run, "evaluate", "retention_perplexity_ratio", Bound(max=1.15, advice="look"), 90.0)
    sentence = verdict(run)
    said = "To blame is ppo.init: the model that it names lost what the base model knows, before any step"
    assert (said in sentence) is named
    assert ("To blame is model.chat_template" in sentence) is not named
    assert sentence.count("To blame") == 1


def test_ppo_without_kl_is_named(tmp_path: Path, chain: dict[str, Stage]) -> None:
    """And not the reward model, which it left behind."""
    run = run_of(tmp_path, chain, **GOOD | {"gold": DOWN})
    gate_of(run, "ppo", "kl", Bound(max=20.0, advice="raise ppo.kl.coef"), 64.0)
    sentence = verdict(run)
    assert "To blame is ppo: the policy went too far from its start (kl = 64" in sentence
    assert sentence.count("To blame") == 1


def test_answers_that_do_not_belong_to_their_prompts_are_named(
    tmp_path: Path, chain: dict[str, Stage]
) -> None:
    run = run_of(tmp_path, chain, **GOOD)
    gate_of(run, "sft", "prompt_gain", Bound(min=0.02, advice="read sft.data"), 0.001)
    sentence = verdict(run)
    assert (
        "To blame is sft: what it learned to answer does not depend on the prompts (prompt_gain = 0.001"
        in sentence
    )


def test_exchanged_columns_are_named(tmp_path: Path, chain: dict[str, Stage]) -> None:
    run = run_of(tmp_path, chain, **GOOD)
    gate_of(run, "generate", "echo_rate", Bound(max=0.1, advice="read sft.data"), 0.25)
    assert "To blame is sft: the answers repeat the question (echo_rate = 0.25" in verdict(run)


def test_a_broken_template_is_named(tmp_path: Path, chain: dict[str, Stage]) -> None:
    run = run_of(tmp_path, chain, sft=DOWN, reward=UP)
    gate_of(run, "generate", "stop_rate", Bound(min=0.3, advice="raise ppo.max_new_tokens"), 0.02)
    assert "To blame is model.chat_template, or what generate asks: most answers do not end" in verdict(run)


@pytest.mark.parametrize(
    ("policy", "foreign", "value", "said"),
    [
        ("base", 1.0, 0.26, "To blame is model.chat_template: most answers do not end by themselves"),
        ("base", 1.0, 0.9, "Note model.chat_template: it asks the base model otherwise"),
        ("base", 0.0, 0.26, "Note generate: stop_rate = 0.26"),
        ("sft", 1.0, 0.26, "Note generate: stop_rate = 0.26"),  # which learned to answer in it
    ],
)
def test_another_familys_template_is_named(
    tmp_path: Path, policy: str, foreign: float, value: float, said: str
) -> None:
    """Also where PPO improved all the same, and few rows cannot tell that answers do not end."""
    run = run_of(tmp_path, chain_of(OwnStage, f"ppo.init={policy}"), **GOOD)
    run.stages["prepare"]["metrics"]["prepare/foreign_template"] = foreign
    sampled = Sampled(value, value - 0.1, value + 0.1, 16)
    run.gates.append(GateResult("generate", "stop_rate", value, Bound(min=0.3, advice="look"), sampled))
    sentence = verdict(run)
    assert said in sentence
    assert ("chat_template" in sentence) is ("chat_template" in said)
    assert ("To blame" in sentence) is ("To blame" in said)


@pytest.mark.parametrize(("tokens", "named"), [(61.0, True), (12.0, False)])
def test_answers_that_are_longer_than_they_may_be_are_named(
    tmp_path: Path, chain: dict[str, Stage], tokens: float, named: bool
) -> None:
    run = run_of(tmp_path, chain, sft=DOWN, reward=UP)
    most = chain["generate"].max_new_tokens  # type: ignore[attr-defined]  # GenerateStage's
    run.stages["sft"]["metrics"]["sft/answer_tokens"] = tokens
    gate_of(run, "generate", "stop_rate", Bound(min=0.3, advice="raise ppo.max_new_tokens"), 0.12)
    said = f"those that sft learned have 61 tokens on average, and generate.max_new_tokens={most}."
    sentence = verdict(run)
    assert ("To blame is sft or generate: most answers do not end" in sentence and said in sentence) is named
    assert ("To blame is model.chat_template" in sentence) is not named


def test_a_word_far_from_the_start_is_no_fault_of_the_reward_model(
    tmp_path: Path, chain: dict[str, Stage]
) -> None:
    """As seen where PPO ran without a KL penalty: a reward model is right near its pairs."""
    run = run_of(tmp_path, chain, **GOOD)
    gate_of(run, "ppo", "kl", Bound(max=20.0, advice="raise ppo.kl.coef"), 101.0)
    gate_of(run, "evaluate", "word_gain", Bound(max=0.5, advice="read the answers"), 0.94, "ppo")
    assert "To blame is ppo: the policy went too far from its start (kl = 101" in verdict(run)
    assert "To blame is reward" not in verdict(run)
    run.stages["reward"]["metrics"]["reward/length_correlation"] = 0.91  # for this it pays itself
    gate_of(run, "evaluate", "length_ratio", LENGTH, 1.7, "ppo")
    assert "To blame is reward: PPO changed the length of the answers" in verdict(run)


def test_a_stage_that_reads_what_failed_is_not_convicted(tmp_path: Path, chain: dict[str, Stage]) -> None:
    run = run_of(tmp_path, chain, **GOOD | {"reward": NONE})
    gate_of(run, "ppo", "kl", Bound(max=20.0, advice="raise ppo.kl.coef"), 64.0)
    sentence = verdict(run)
    assert "To blame is reward: it ranks no better" in sentence and sentence.count("To blame") == 1
