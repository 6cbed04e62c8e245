"""Whether PPO's own verdict can be believed: what cannot be learned does not pass, what can does."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.ppo import ppo_job, ppo_learner, ppo_stage, prompts
from rlhf.evaluation.sampled import Sampled
from rlhf.pipeline.run import GateResult
from rlhf.rewards.reward import Prompts, Reward

SMALL = (
    "ppo.steps=3", "ppo.batch_episodes=16", "ppo.minibatch_episodes=8", "ppo.max_new_tokens=3",
    "ppo.evaluate_every=1", "ppo.optim.warmup_fraction=0.0", "ppo.critic.optim.warmup_fraction=0.0",
)  # fmt: skip
TRAIN, HELD_OUT = prompts(range(100, 164)), prompts(range(700, 748))


def of_a_hash(prompts: Prompts, completions: Sequence[str]) -> Tensor:
    """0 to 1, by a hash of the text: nothing about an answer says what another one would score."""
    digests = (hashlib.sha256(completion.encode()).digest() for completion in completions)
    return torch.tensor([digest[0] / 255 for digest in digests])


def small_letters(prompts: Prompts, completions: Sequence[str]) -> Tensor:
    """How many characters are of the lower half of all bytes."""
    return torch.tensor([float(sum(c.isascii() for c in completion)) for completion in completions])


def gain_gate(directory: Path, model: Path, reward: Reward, seed: int, *overrides: str) -> GateResult:
    """The gate `held_out_score_gain` of a whole training."""
    torch.manual_seed(seed)
    stage = ppo_stage(*SMALL, *overrides)
    summary = ppo_learner(stage, ppo_job(directory, model, seed), reward).train(TRAIN, HELD_OUT)
    name, bound = "held_out_score_gain", stage.gates["held_out_score_gain"]
    assert bound is not None
    return GateResult("ppo", name, summary[name], bound, Sampled.found(name, summary))


def test_a_reward_that_cannot_be_learned_does_not_pass(tmp_path: Path, tiny_model: Path) -> None:
    """A true gain of 0 lies below a 95% interval in one of 40 trainings: among 8, two are 1.5% likely."""
    gates = [gain_gate(tmp_path / str(seed), tiny_model, of_a_hash, seed) for seed in range(8)]
    assert [gate.outcome for gate in gates].count("passed") <= 1
    assert all(gate.sampled is not None and gate.sampled.rows == 24 for gate in gates)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_reward_that_can_be_learned_passes(tmp_path: Path, tiny_model: Path, seed: int) -> None:
    longer = ("ppo.steps=8", "ppo.batch_episodes=64", "ppo.evaluate_every=4")
    gate = gain_gate(tmp_path / "job", tiny_model, small_letters, seed, *longer)
    assert gate.outcome == "passed", str(gate)
