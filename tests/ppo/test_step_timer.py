"""A PPO step says where its time went."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.ppo import ppo_job, ppo_learner, ppo_stage, prompts, take_step
from rlhf.data.chat_template import prompt_ids
from rlhf.ppo.trainer import PolicyTrainer
from rlhf.rewards.function import function_reward
from rlhf.tracking.timer import StepTimer

NAMES = ["generate", "reward", "reference", "score", "advantages", "update", "optimizer"]


def test_every_step_has_its_own_seconds(tmp_path: Path, tiny_model: Path) -> None:
    stage = ppo_stage("ppo.batch_episodes=8", "ppo.minibatch_episodes=4", "ppo.max_new_tokens=4")
    reward = function_reward("python:helpers.ppo:starts_with_e")
    trainer = ppo_learner(stage, ppo_job(tmp_path / "ppo", tiny_model), reward)
    for step in (1, 2):
        metrics = take_step(trainer, prompts(range(8)), step)
        assert [name for name in metrics if name.startswith("seconds_")] == [f"seconds_{n}" for n in NAMES]
        assert all(metrics[f"seconds_{name}"] > 0 for name in NAMES)
        assert trainer.phases.seconds == {}  # nothing is left over for the next step
        assert metrics["prompt_tokens"] == sum(map(len, learner_prompts(trainer)))
        assert metrics["response_tokens"] == 8 * metrics["length"]


def learner_prompts(trainer: PolicyTrainer) -> list[list[int]]:
    return [prompt_ids(trainer.policy.tokenizer, row.prompt) for row in prompts(range(8))]


def test_a_phase_entered_again_adds_up_and_one_that_fails_counts_nothing() -> None:
    phases = StepTimer(torch.device("cpu"))
    with phases("update"):
        pass
    first = phases.seconds["update"]
    with phases("update"):
        pass
    assert phases.seconds["update"] > first
    with pytest.raises(ZeroDivisionError), phases("reward"):
        _ = 1 / 0
    assert list(phases.taken()) == ["seconds_update"]
    assert phases.taken() == {}
