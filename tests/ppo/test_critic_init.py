"""`ppo.critic.init=auto` starts the critic from the reward model where that fits, and says which it took."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from helpers.jobs import TINY, on_cpu, small_job, tiny_base
from helpers.models import write_reward
from helpers.ppo import length, ppo_stage
from rlhf.data.chat_template import PLAIN
from rlhf.models.base import load_tokenizer
from rlhf.ppo.models import load_critic
from rlhf.rewards.model import LearnedReward, load_learned_reward
from rlhf.rewards.reward import Reward
from rlhf.rl.advantage import ScoreNormalizer


def learned(tiny_model: Path, directory: Path, template: str | None = None) -> LearnedReward:
    """A published reward model on the tiny one."""
    write_reward(directory, tiny_model, template)
    return load_learned_reward(directory, TINY, on_cpu(), 1000)


@pytest.mark.parametrize(
    ("kind", "overrides", "words"),
    [
        ("learned", (), "uses reward."),
        ("learned", ("ppo.score.normalize=running",), "uses sft, .*running changes the score's units"),
        ("foreign", (), "uses sft, .*the reward model has another tokenizer or chat template"),
        ("rule", (), r"uses sft, the policy's start \(ppo.init=sft\): ppo.reward=python:.* is no model"),
    ],
)
def test_what_auto_takes(
    tiny_model: Path, tmp_path: Path, kind: str, overrides: tuple[str, ...], words: str
) -> None:
    out = io.StringIO()
    console = Console(file=out, width=300)
    job = small_job("ppo", tmp_path / "job", tiny_base(tiny_model), {"sft": tiny_model}, console=console)
    stage = ppo_stage("ppo.critic.init=auto", *overrides)
    rewards: dict[str, Reward] = {
        "learned": learned(tiny_model, tmp_path / "learned"),
        "foreign": learned(tiny_model, tmp_path / "foreign", PLAIN),
        "rule": length,
    }
    reward = rewards[kind]
    normalizer = ScoreNormalizer.running(None) if overrides else ScoreNormalizer.fixed(0.0, 1.0, None)
    critic = load_critic(stage, job, reward, normalizer, load_tokenizer(tiny_model, TINY))
    assert re.search(f"ppo.critic.init=auto {words}", out.getvalue())
    assert bool(critic.head.weight.any()) == (kind == "learned" and not overrides)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_critic_on_the_reward_model_has_the_runs_precision(
    tiny_model: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    """Its files are fp32; the head stays so."""
    reward = learned(tiny_model, tmp_path / "learned")
    compute = on_cpu(dtype=dtype)
    job = small_job("ppo", tmp_path / "job", tiny_base(tiny_model), {"sft": tiny_model}, compute=compute)
    stage, normalizer = ppo_stage("ppo.critic.init=auto"), ScoreNormalizer.fixed(0.0, 1.0, None)
    critic = load_critic(stage, job, reward, normalizer, load_tokenizer(tiny_model, TINY))
    assert critic.model.get_input_embeddings().weight.dtype == dtype
    assert critic.head.weight.dtype == torch.float32
