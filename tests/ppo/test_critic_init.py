"""`ppo.critic.init=auto` starts the critic from the reward model where that fits, and says which it took."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from small_job import on_cpu, small_job
from small_ppo import MODEL, length, ppo_stage

from rlhf.data.chat_template import PLAIN
from rlhf.models.base import BaseModelFiles, load_tokenizer
from rlhf.models.value_head import load_scalar_model, reset_head, save_scalar_model
from rlhf.ppo.build import load_critic
from rlhf.rewards.model import LearnedReward, load_learned_reward
from rlhf.rewards.reward import Reward
from rlhf.rl.advantage import ScoreNormalizer


def learned(tiny_model: Path, directory: Path, template: str | None = None) -> LearnedReward:
    """A published reward model on the tiny one."""
    scalar = load_scalar_model(tiny_model, MODEL, torch.float32, new_head=True)
    tokenizer = load_tokenizer(tiny_model, MODEL)
    tokenizer.chat_template = template or tokenizer.chat_template
    torch.manual_seed(3)
    reset_head(scalar)
    directory.mkdir()
    save_scalar_model(scalar, tokenizer, directory)
    return load_learned_reward(directory, MODEL, on_cpu(), 1000)


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
    base = BaseModelFiles(tiny_model, "tiny", MODEL)
    job = small_job("ppo", tmp_path / "job", base, {"sft": tiny_model}, console=Console(file=out, width=300))
    stage = ppo_stage("ppo.critic.init=auto", *overrides)
    rewards: dict[str, Reward] = {
        "learned": learned(tiny_model, tmp_path / "learned"),
        "foreign": learned(tiny_model, tmp_path / "foreign", PLAIN),
        "rule": length,
    }
    reward = rewards[kind]
    normalizer = ScoreNormalizer.running(None) if overrides else ScoreNormalizer.fixed(0.0, 1.0, None)
    critic = load_critic(stage, job, reward, normalizer, load_tokenizer(tiny_model, MODEL))
    assert re.search(f"ppo.critic.init=auto {words}", out.getvalue())
    assert bool(critic.head.weight.any()) == (kind == "learned" and not overrides)
