"""The PPO stage and its trainer on the tiny model, without the chain around them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from helpers.encoded import answers_of
from helpers.experiments import build_stage
from helpers.jobs import TINY, SmallJob, small_job, tiny_base, user
from rlhf.data.schema import PromptRow, SftRow
from rlhf.models.base import load_tokenizer
from rlhf.models.peft.attach import attach
from rlhf.models.peft.config import PeftConfig
from rlhf.models.peft.saved import save_adapter
from rlhf.models.value_head import ActorCritic, ScalarModel, load_scalar_model, reset_head, save_scalar_model
from rlhf.ppo.ptx import PretrainingMix
from rlhf.ppo.trainer import ForwardPass, PolicyTrainer
from rlhf.rewards.reward import Prompts, Reward
from rlhf.rl.rollout import Experience
from rlhf.stages.ppo import PpoStage
from rlhf.training.trained import load_trained

if TYPE_CHECKING:
    import pytest

SETTINGS = (
    "model=tiny", "ppo.peft=none", "ppo.temperature=1.0", "ppo.critic.init=sft", "ppo.score.normalize=none",
    "ppo.score.missing_stop_penalty=0.0", "ppo.kl.coef=0.0", "ppo.optim.lr=6e-3", "ppo.critic.optim.lr=6e-3",
    "ppo.reward=python:helpers.ppo:starts_with_e",
)  # fmt: skip
SMALL = (
    "ppo.steps=4", "ppo.batch_episodes=16", "ppo.minibatch_episodes=8", "ppo.max_new_tokens=12",
    "ppo.optim.warmup_fraction=0.0", "ppo.critic.optim.warmup_fraction=0.0",
)  # fmt: skip
QUESTIONS = ["Hi", "What is rain?", "Name a colour, a river and a town.", "7 + 5 = ?"]
ROWS = [PromptRow(user(f"{QUESTIONS[n % 4]} {n}")) for n in range(16)]


def starts_with_e(prompts: list[str], responses: list[str]) -> list[float]:
    """1 for a response that begins with the letter e; an untrained byte model says it once in 259."""
    return [float(response.startswith("e")) for response in responses]


def signal_at(trainer: PolicyTrainer, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let SIGTERM come while the trainer takes this step, as the operating system would tell of it."""
    take = trainer.step

    def interrupted(rows: Sequence[PromptRow]) -> dict[str, float]:
        if trainer.learner.done + 1 == step:
            trainer.job.checkpoints.signals._handle(15, None)
        return take(rows)

    monkeypatch.setattr(trainer, "step", interrupted)


def prompts(numbers: range) -> list[PromptRow]:
    """Short questions of different lengths."""
    return [PromptRow(user(f"{number}?")) for number in numbers]


def ppo_stage(*overrides: str) -> PpoStage:
    """The stage as the command line builds it."""
    return build_stage(PpoStage, *SETTINGS, *overrides)


def ppo_job(directory: Path, model: Path, seed: int = 0, checkpoints: Path | None = None) -> SmallJob:
    """What the pipeline would hand to the stage, with the untrained model as its SFT model."""
    return small_job("ppo", directory, tiny_base(model), {"sft": model}, checkpoints=checkpoints, seed=seed)


def ppo_learner(
    stage: PpoStage, job: SmallJob, reward: Reward, mix_rows: Sequence[SftRow] = ()
) -> PolicyTrainer:
    """A trainer as the stage makes it, with another reward, and other rows to mix in."""
    without_mix = stage.model_copy(update={"ptx": stage.ptx.model_copy(update={"coef": 0.0})})
    trainer = without_mix.trainer(job)
    trainer.config, trainer.reward = stage, reward
    if mix_rows:
        answers = answers_of(trainer.policy.tokenizer, mix_rows, 1024)
        trainer.mix = PretrainingMix(stage.ptx, answers, job.seed)
    return trainer


def take_step(trainer: PolicyTrainer, rows: Sequence[PromptRow], number: int) -> dict[str, float]:
    """One step, as the loop takes it; counted from 1."""
    trainer.learner.begin(number, trainer.config.steps, {0: trainer.config.warmup_steps})
    return {"lr": trainer.learner.rates[0], **trainer.step(rows)}


def experience_of(trainer: PolicyTrainer, rows: Sequence[PromptRow]) -> tuple[Experience, ForwardPass | None]:
    """What a step learns from, and what its `score` kept."""
    answered = trainer.sample(rows)
    scored, graph = trainer.score(answered.rollout)
    rollout, score_B = answered.rollout, answered.score_B
    return trainer.objective.experience(rollout, score_B, scored, trainer.normalizer), graph


def resumed_learner(directory: Path, model: Path, reward: Reward, *overrides: str) -> PolicyTrainer:
    """As a new process would make it: only the checkpoints beside its directory are of an earlier one."""
    torch.manual_seed(0)
    job = ppo_job(directory, model, checkpoints=directory.with_name("checkpoints"))
    return ppo_learner(ppo_stage(*overrides), job, reward)


def actor_critic(trainer: PolicyTrainer) -> ActorCritic:
    """What its engine trains."""
    assert isinstance(trainer.engine.model, ActorCritic)
    return trainer.engine.model


def critic_of(trainer: PolicyTrainer) -> ScalarModel:
    """The critic, which there must be."""
    critic = actor_critic(trainer).critic
    assert critic is not None
    return critic


def length(prompts: Prompts, completions: Sequence[str]) -> Tensor:
    """A reward that differs from answer to answer."""
    return torch.tensor([float(len(completion.encode())) for completion in completions])


class MakeTrainer(Protocol):
    """Make a trainer: always the same weights, data and random numbers."""

    def __call__(
        self, *overrides: str, reward: Reward = ..., mix_rows: Sequence[SftRow] = ...
    ) -> PolicyTrainer: ...


class Counting:
    """A reward that is the same for a whole batch, and rises (or falls) from call to call."""

    def __init__(self, change: float) -> None:
        self.change, self.calls = change, 0

    def __call__(self, prompts: Prompts, completions: Sequence[str]) -> Tensor:
        self.calls += 1
        return torch.full((len(completions),), self.change * self.calls)


def best_weights(trainer: PolicyTrainer) -> dict[str, Tensor]:
    """A copy of those that would be published."""
    kept = load_trained(trainer.job.checkpoints.best)
    return {name: weight.clone() for name, weight in kept.items()}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def shake(trainer: PolicyTrainer) -> None:
    """Move policy and critic away from where they were, always to the same place."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.engine.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def reward_model(directory: Path, sft: Path, method: str, dtype: torch.dtype = torch.float32) -> Path:
    """What the reward stage would publish; every weight that trains has been moved."""
    torch.manual_seed(5)
    scalar = load_scalar_model(sft, TINY, dtype, new_head=True)
    reset_head(scalar)
    adapter = attach(scalar.model, PeftConfig.model_validate({"method": method}))
    with torch.no_grad():
        for parameter in scalar.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    directory.mkdir(exist_ok=True)
    save_adapter(adapter, directory, sft, "key", scalar.head.weight)
    adapter.merge()
    save_scalar_model(scalar, load_tokenizer(sft, TINY), directory)
    return directory
