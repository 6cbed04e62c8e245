"""PPO finds a rare byte: a rule reward on the untrained tiny model, through the stage itself.

Dimensions: B prompts, V vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlhf.rl.rollout
from helpers.jobs import SmallJob, run_in
from helpers.ppo import ppo_job, ppo_stage, prompts
from rlhf.data.chat_template import prompt_ids
from rlhf.rl.advantage import whiten

TRAIN, HELD_OUT = range(100, 612), range(700, 828)
RARE = (
    "ppo.steps=20", "ppo.batch_episodes=256", "ppo.minibatch_episodes=64", "ppo.max_new_tokens=4",
    "ppo.kl.coef=0.001", "ppo.evaluate_every=20", "ppo.evaluate_prompts=128", "ppo.micro_batch_tokens=16384",
)  # fmt: skip
COMMON = (
    "ppo.reward=python:test_learns:is_ascii", "ppo.steps=12", "ppo.batch_episodes=64",
    "ppo.minibatch_episodes=16", "ppo.max_new_tokens=1", "ppo.evaluate_every=12", "ppo.evaluate_prompts=128",
)  # fmt: skip


def is_ascii(prompts: list[str], responses: list[str]) -> list[float]:
    """1 for a response of the lower half of all bytes: about every second one before training."""
    return [float(response.isascii()) for response in responses]


def is_not_ascii(prompts: list[str], responses: list[str]) -> list[float]:
    return [1.0 - score for score in is_ascii(prompts, responses)]


def run_stage(
    directory: Path, model: Path, *overrides: str, seed: int = 0
) -> tuple[SmallJob, dict[str, float]]:
    job = ppo_job(directory, model, seed)
    job.data.write("ppo", "train", prompts(TRAIN))
    job.data.write("ppo", "held_out", prompts(HELD_OUT))
    torch.manual_seed(seed)
    run_in(ppo_stage(*overrides), job)
    return job, job.summary


def logged(job: SmallJob, name: str) -> list[float]:
    lines: list[dict[str, Any]] = [
        json.loads(line) for line in (job.directory / "metrics.jsonl").read_text().splitlines()
    ]
    return [line[f"ppo/{name}"] for line in lines if f"ppo/{name}" in line]


@torch.no_grad()
def chance_of_e(directory: Path) -> Tensor:
    """Probability [B] that a held-out prompt is answered with an e first, from a published directory."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    ids = [prompt_ids(tokenizer, row.prompt) for row in prompts(HELD_OUT)]
    logp_BV: Tensor = model(input_ids=torch.tensor(ids)).logits[:, -1].log_softmax(-1)
    return logp_BV[:, tokenizer.convert_tokens_to_ids("e")].exp()


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_a_rare_first_byte_becomes_the_rule(tmp_path: Path, tiny_model: Path, seed: int) -> None:
    before_B = chance_of_e(tiny_model)
    assert float(before_B.max()) < 0.01  # one in 259

    job, summary = run_stage(tmp_path / "ppo", tiny_model, *RARE, seed=seed)

    assert summary["held_out_score_before"] < 0.05
    assert summary["held_out_score"] >= 0.9
    after_B = chance_of_e(job.directory)  # what was published, not what was in memory
    assert float(after_B.mean()) >= 0.9
    assert summary["first_ratio_deviation"] < 1e-3
    assert summary["first_kl"] == pytest.approx(0.0, abs=1e-5)
    assert summary["bad_steps"] == 0
    assert summary["episodes"] == 20 * 256
    scores = logged(job, "score")
    assert len(scores) == 20
    assert sum(scores[:4]) / 4 < 0.1 < 0.8 < sum(scores[-4:]) / 4
    entropy = logged(job, "entropy")
    assert entropy[0] > 5.4 > 2.0 > entropy[-1]  # ln 259 = 5.56: it was uniform, and has settled


def test_a_common_property_is_learned_in_few_steps(tmp_path: Path, tiny_model: Path) -> None:
    _, summary = run_stage(tmp_path / "ppo", tiny_model, *COMMON)
    assert 0.35 < summary["held_out_score_before"] < 0.7
    assert summary["held_out_score_last"] > 0.85


def test_the_opposite_reward_teaches_the_opposite(tmp_path: Path, tiny_model: Path) -> None:
    reward = "ppo.reward=python:test_learns:is_not_ascii"
    _, summary = run_stage(tmp_path / "ppo", tiny_model, *COMMON, reward)
    assert 0.3 < summary["held_out_score_before"] < 0.65
    assert summary["held_out_score_last"] > 0.85


def test_with_the_advantage_negated_the_score_falls(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def negated(advantage_BR: Tensor, mask_BR: Tensor, moments: Tensor) -> Tensor:
        return -whiten(advantage_BR, mask_BR, moments)

    monkeypatch.setattr(rlhf.rl.rollout, "whiten", negated)
    job, summary = run_stage(tmp_path / "ppo", tiny_model, *COMMON)
    assert summary["held_out_score_last"] < 0.15
    assert summary["held_out_score"] == summary["held_out_score_before"]  # the best policy is kept: the first
    for name, value in AutoModelForCausalLM.from_pretrained(job.directory).state_dict().items():
        assert torch.equal(value, AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()[name])


def test_the_penalty_holds_the_policy_near_its_reference(tmp_path: Path, tiny_model: Path) -> None:
    _, free = run_stage(tmp_path / "free", tiny_model, *COMMON)
    _, held = run_stage(tmp_path / "held", tiny_model, *COMMON, "ppo.kl.coef=4.0")
    assert free["kl"] > 0.4
    assert abs(held["kl"]) < free["kl"] / 2
