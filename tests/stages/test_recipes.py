"""Chains with named instances on the tiny model: what each round learns from, reuse, and going on."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest

from helpers.chains import Chain, Outcome, RealChain
from rlhf.data.schema import Message, PromptRow
from rlhf.stages.generate import repeats_question

REWARD = (
    "def score(prompts, responses):\n    return [float(sum(map(ord, each)) % 97) for each in responses]\n"
)
ROUNDS = (
    "recipe=iterated_dpo", "recipe.rounds=2", "ppo.reward=python:rule:score", "evaluate.gold=null",
    "dpo.optim.lr=1e-2", "dpo.batch_rows=4", "dpo.peft=none", "gates=warn", "why=true",
    "generate.num_prompts=null",
)  # fmt: skip


def rounds(chain: Chain, *overrides: str) -> Outcome:
    (chain.directory / "rule.py").write_text(REWARD)
    found = chain.run(*ROUNDS, *overrides)
    assert found.code == 0, found.err
    return found


@pytest.mark.slow
def test_each_round_learns_from_the_answers_of_the_one_before(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    first = rounds(chain)
    names = ["prepare", "sft", "dpo", "generate@2", "dpo@2", "evaluate"]
    assert re.search(r"^dpo@2\.data +stage:generate@2 ", first.out, re.MULTILINE)
    assert first.statuses == dict.fromkeys(names, "ran")

    answers = [json.loads(line) for line in (first.artifact("generate@2") / "pairs.jsonl").open()]
    learned = first.summary["stages"]["dpo@2"]["metrics"]
    counts = [learned[f"dpo@2/{split}_rows"] for split in ("train", "held_out")]
    assert sum(counts) == len(answers) and min(counts) >= 2
    asked = [(row["policy"], row["prompt"]) for row in map(json.loads, samples(first)) if "policy" in row]
    assert ("dpo", answers[0]["prompt"]) in asked
    measured = first.summary["stages"]["evaluate"]["metrics"]
    assert {"evaluate/score_mean/dpo@2", "evaluate/kl/dpo@2", "evaluate/score_gain"} <= measured.keys()
    assert measured["evaluate/score_gain"] == measured["evaluate/score_gain/dpo@2"]
    assert not [*(tmp_path / "store").glob("*/.*.rows")], "the prepared rows are gone"
    report = (first.directory / "report.md").read_text()
    assert (
        "| DPO 2 |" in report
        and "seconds, all its stages" in report
        and "peak memory of its stage, GiB" in report
    )
    assert (first.directory / "policies.png").exists()
    policies = first.summary["policies"]
    assert [each["title"] for each in policies.values()] == ["base", "SFT", "DPO", "DPO 2"]
    assert policies["dpo@2"]["seconds"] > policies["dpo"]["seconds"] > policies["sft"]["seconds"] > 0

    again = rounds(chain)
    assert again.statuses == dict.fromkeys(names, "reused")

    other = rounds(chain, "dpo@2.beta=0.7")
    ran = {name for name, status in other.statuses.items() if status == "ran"}
    assert ran == {"dpo@2", "evaluate"}
    assert "dpo@2 runs" in other.out and "beta" in other.out.partition("dpo@2 runs")[2].splitlines()[0]

    split = rounds(chain, "prepare.held_out_fraction=0.25", "stage=dpo@2")
    assert split.key("dpo@2") != first.key("dpo@2")


def samples(outcome: Outcome) -> list[str]:
    return (outcome.directory / "samples.jsonl").read_text().splitlines()


def test_answers_that_all_score_the_same_make_no_pairs(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    (tmp_path / "constant.py").write_text("def score(prompts, texts):\n    return [1.0 for _ in texts]\n")
    found = chain.run(*ROUNDS, "stage=dpo@2", "ppo.reward=python:constant:score")
    assert found.code == 2
    assert "dpo@2.data=stage:generate@2: generate@2 made no rows." in found.err
    assert "only if two of its answers have different scores" in found.err
    assert found.statuses["generate@2"] == "ran", "what is finished is kept"
    assert not [*(tmp_path / "store").glob("*/.*.rows")]


def test_a_score_of_the_prompt_alone_fails_a_gate(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    # the prompts come first
    swapped = "def score(texts, prompts):\n    return [float(sum(text.encode())) for text in texts]\n"
    (tmp_path / "swapped.py").write_text(swapped)
    rule = ("ppo.reward=python:swapped:score", "generate.policy=base", "generate.gates.stop_rate=null")
    found = chain.run("stage=generate", *rule, "gates=enforce")
    assert found.code == 3
    assert "Gate failed: generate: within_prompt_share = 0 " in found.out
    assert "does it read the prompt only, or are the answers alike?" in found.out
    assert "First failed gate: generate/within_prompt_share = 0 " in found.summary["verdict"]


def test_a_gate_of_a_named_instance_fails_and_the_next_stage_does_not_run(tmp_path: Path) -> None:
    """Its own bound, which nothing meets; the first dpo has the same gates and passes."""
    off = ("dpo.gates.held_out_loss_change=null", "dpo.gates.accuracy_over_baseline=null")
    chain = ("dpo.init=base", "dpo@2.init=dpo", "dpo@3.init=dpo@2", "dpo.peft=none")
    own = "dpo@2.gates.skipped_steps.max=-1"
    found = Chain(tmp_path).run("stage=dpo@3", *chain, *off, own, "gates=enforce")
    assert found.code == 3, found.err
    assert "Gate failed: dpo@2: skipped_steps = 0, wanted <= -1. Try: lower dpo@2.optim.lr," in found.out
    assert found.out.count("Gate failed: ") == 1
    assert found.statuses == {"prepare": "ran", "dpo": "ran", "dpo@2": "ran"}


def test_scores_in_another_order_fail_a_gate(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    (tmp_path / "in_order.py").write_text(
        "def right(prompts, texts):\n    return [float(sum(text.encode())) for text in texts]\n"
        "def wrong(prompts, texts):\n    return right(prompts, sorted(texts))\n"
    )
    keys = (
        "stage=generate", "generate.policy=base", "generate.gates.stop_rate=null", "gates=enforce",
        "generate.samples_per_prompt=24",
    )  # fmt: skip
    right = chain.run(*keys, "ppo.reward=python:in_order:right")
    assert right.code == 0, right.out
    assert right.summary["stages"]["generate"]["metrics"]["generate/score_reliability"] == 1
    wrong = chain.run(*keys, "ppo.reward=python:in_order:wrong")
    assert wrong.code == 3
    assert "does it return its scores in the order of its arguments" in wrong.out
    assert "First failed gate: generate/score_reliability" in wrong.summary["verdict"]


@pytest.mark.parametrize(
    ("asked", "said", "repeats"),
    [("Say it  twice.", " Say it twice.\n", True), ("Say it", "Say it twice", False), ("", "", False)],
)
def test_an_answer_that_repeats_the_question(asked: str, said: str, repeats: bool) -> None:
    row = PromptRow([Message(role="user", content="Hello"), Message(role="user", content=asked)])
    assert repeats_question(row, said) is repeats
    assert not repeats_question(PromptRow([]), said), "a text without a prompt"


def test_a_prompt_with_one_scored_answer_says_nothing_of_the_reward(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    (tmp_path / "rare.py").write_text(
        "def score(prompts, texts):\n"
        "    return [float(n) if n % 2 == 0 else None for n, _ in enumerate(texts)]\n"
    )
    keys = ("ppo.reward=python:rare:score", "generate.policy=base", "generate.samples_per_prompt=2")
    off = ("generate.gates.stop_rate=null", "generate.gates.score_reliability=null")
    found = chain.run("stage=generate", *keys, "gates=enforce", *off)
    assert found.code == 0, found.out
    assert found.summary["stages"]["generate"]["metrics"]["generate/within_prompt_share_rows"] == 0


def test_without_a_reward_no_gate_waits_for_scores(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    keys = ("gates=enforce", "generate.policy=base", "generate.gates.stop_rate=null", "generate.reward=null")
    found = chain.run("stage=generate", *keys)
    assert found.code == 0, found.err
    assert "Gate score_deviation does not apply: generate.reward=null." in found.out
    (tmp_path / "long.py").write_text(
        "def score(prompts, texts):\n    return [float(len(text)) for text in texts]\n"
    )
    alone = ("generate.samples_per_prompt=1", "ppo.reward=python:long:score")
    one = chain.run("stage=generate", *keys[:-1], *alone)
    assert one.code == 0, one.err
    assert "Gate within_prompt_share does not apply: generate.samples_per_prompt=1." in one.out


def test_the_score_is_that_of_both_reward_models(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    found = chain.run(
        "stage=generate", "generate.reward=[learned,learned@fast]", "ppo.reward=vader",
        "generate.policy=base", "reward@fast.optim.lr=1e-2", "gates=warn",
    )  # fmt: skip
    assert found.code == 0, found.err
    metrics = found.summary["stages"]["generate"]["metrics"]
    parts = [metrics[f"generate/score_mean/{name}"] for name in ("learned", "fast")]
    assert metrics["generate/score_mean"] == pytest.approx(sum(parts), abs=1e-5)
    assert parts[0] != parts[1]


@pytest.mark.slow
def test_killed_in_a_later_round_it_ends_as_if_undisturbed(tmp_path: Path) -> None:
    chain = RealChain(tmp_path)
    (tmp_path / "rule.py").write_text(REWARD)
    settings = (*ROUNDS, "stage=dpo@2", "dpo.epochs=3", "sft.epochs=1")
    undisturbed = chain.run_once(*settings)
    process = chain.start_until("dpo@2", 2, "killed", *settings, "checkpoint.every_steps=1")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    out, _ = chain.run("killed", *settings)
    assert "dpo@2: continues from step " in out
    assert chain.weights("killed", "dpo@2") == chain.weights(undisturbed, "dpo@2")


@pytest.mark.slow
def test_two_ranks_learn_from_made_rows_as_one_does(tmp_path: Path) -> None:
    chain = RealChain(tmp_path)
    (tmp_path / "rule.py").write_text(REWARD)
    settings = (*ROUNDS, "stage=dpo@2", "sft.epochs=1")
    one = chain.run_once(*settings)
    chain.run("two", *settings, "launch.processes=2", "zero=fsdp2")
    expected, found = chain.curve(one), chain.curve("two")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-3, abs=1e-3), key
