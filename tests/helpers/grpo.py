"""The GRPO stage and its trainer on the tiny model, without the chain around them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from helpers.experiments import build_stage
from helpers.jobs import SmallJob, small_job, tiny_base
from helpers.ppo import length
from rlhf.ppo.trainer import PolicyTrainer
from rlhf.rewards.reward import Prompts, Reward
from rlhf.stages.grpo import GrpoStage

SETTINGS = (
    "model=tiny", "ppo.reward=python:helpers.ppo:starts_with_e", "ppo.critic.init=sft", "grpo.peft=none",
    "ppo.temperature=1.0", "ppo.score.normalize=none", "ppo.score.missing_stop_penalty=0.0",
    "ppo.score.clip=null",
    "ppo.max_new_tokens=8", "grpo.steps=3", "grpo.batch_episodes=16", "grpo.minibatch_episodes=8",
    "grpo.optim.lr=6e-3", "grpo.optim.warmup_fraction=0.0", "grpo.evaluate_every=2",
)  # fmt: skip


def grpo_stage(*overrides: str) -> GrpoStage:
    """The stage as the command line builds it."""
    return build_stage(GrpoStage, *SETTINGS, *overrides)


def grpo_job(directory: Path, model: Path, seed: int = 0) -> SmallJob:
    """What the pipeline would hand to the stage, with the untrained model as its SFT model. Checkpoints lie
    beside its directory, for all jobs there."""
    checkpoints = directory.with_name("checkpoints")
    return small_job("grpo", directory, tiny_base(model), {"sft": model}, checkpoints=checkpoints, seed=seed)


def grpo_trainer(directory: Path, model: Path, *overrides: str, reward: Reward = length) -> PolicyTrainer:
    """A trainer as the stage makes it, with another reward."""
    torch.manual_seed(0)
    trainer = grpo_stage(*overrides).trainer(grpo_job(directory, model))
    trainer.reward = reward
    return trainer


def constant(prompts: Prompts, completions: Sequence[str]) -> Tensor:
    """A reward that nothing can be learned from."""
    return torch.full((len(completions),), 0.3)


class OfSomePrompts:
    """The response's length, but one and the same score for answers to a prompt that begins with `dull`; NaN
    is none."""

    def __init__(self, dull: str, score: float = 7.0) -> None:
        self.dull, self.score = dull, score

    def __call__(self, prompts: Prompts, completions: Sequence[str]) -> Tensor:
        lengths_B = length(prompts, completions)
        dull_B = torch.tensor([row.prompt[-1]["content"].startswith(self.dull) for row in prompts])
        return torch.where(dull_B, self.score, lengths_B)
