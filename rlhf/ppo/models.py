"""The models of a policy gradient, as the stage's keys describe them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from rlhf.config import ConfigError
from rlhf.data.answers import Answers
from rlhf.data.chat_template import tokenizer_digest
from rlhf.generation.policy_model import PolicyModel
from rlhf.models.load import context_left
from rlhf.models.peft.attach import attach, loads_on
from rlhf.models.peft.methods import METHODS
from rlhf.models.peft.virtual_tokens import virtual_tokens
from rlhf.models.recompute import checkpoint_layers
from rlhf.models.value_head import ActorCritic, ScalarModel, load_scalar_model, reset_head
from rlhf.models.weight_sharing import Backbone, shared_copy
from rlhf.pipeline.job import Job
from rlhf.pipeline.trainable import PolicyLearner, TunedPolicy
from rlhf.ppo.config import CRITIC_START_HINT, PolicyConfig, PpoConfig
from rlhf.ppo.ptx import PretrainingMix
from rlhf.rewards.combined import CombinedReward
from rlhf.rewards.kinds import RewardMix, critic_part
from rlhf.rewards.model import LearnedReward
from rlhf.rewards.reward import Reward
from rlhf.rl.advantage import ScoreNormalizer
from rlhf.tracking.redaction import redacted
from rlhf.training.config import OptimConfig


class Models(NamedTuple):
    """The models of a policy gradient, with their learner, normalizer and pretraining mix."""

    learner: PolicyLearner
    """Policy and critic, an `ActorCritic`, under the engine."""
    policy: PolicyModel
    """The policy as it samples."""
    reference: PolicyModel
    reward: Reward
    normalizer: ScoreNormalizer
    """Normalises the reward's scores."""
    mix: PretrainingMix | None
    """Other rows that the policy learns from; None without `ppo.ptx`."""


def load_models(config: PolicyConfig, job: Job) -> Models:
    """The four models of PPO, or three without a critic, before the first step."""
    compute, policy = job.compute, TunedPolicy.load(job, config.init, config.peft, share=True)
    placement = config.placement(shards_weights=compute.shards_weights)
    reward = job.reward(config.reward, config.micro_batch_tokens, policy.backbone, placement)
    normalizer = score_normalizer(config, job)
    groups: list[tuple[Iterable[nn.Parameter], OptimConfig]] = [(policy.model.parameters(), config.optim)]
    critic = None
    if isinstance(config, PpoConfig):
        critic = load_critic(config, job, reward, normalizer, policy.tokenizer, policy.backbone)
        attach(critic.model, config.peft, compute.device)
        critic.to(compute.loads_on)  # its head, behind what QLoRA took there
        critic.head.requires_grad_(True)
        critic.offset.requires_grad_(True)
        groups.append((critic.parameters(), config.critic.optim))
    model = ActorCritic(policy.model, critic)
    if config.activation_checkpointing:
        checkpoint_layers(model)
    learner = PolicyLearner(job, policy, model, groups, in_turns=critic is not None)
    in_policy = config.shares_reference(shards_weights=compute.shards_weights)
    reference = learner.reference(placement, in_policy=in_policy)
    mix = None
    if isinstance(config, PpoConfig) and config.ptx.coef > 0:
        mix = pretraining_mix(config, job, policy.tokenizer, context_left(policy.model))
    return Models(learner, learner.sampler(), reference, reward, normalizer, mix)


def pretraining_mix(
    config: PpoConfig, job: Job, tokenizer: PreTrainedTokenizerBase, context: int
) -> PretrainingMix:
    """The pretraining mix. Rows without anything to learn are left out: their prompt fills the context.

    Raises:
        ConfigError: no row is left.
    """
    rows, ids = job.data.rows(config.mixed_role, "train"), job.tokens(config.mixed_role, "train", tokenizer)
    answers = Answers.of(rows, ids, context, all_turns=False)
    if not answers:
        source = "sft.data" if config.ptx.data is None else f"ppo.ptx.data={config.ptx.data}"
        raise ConfigError(
            f"ppo.ptx.coef={config.ptx.coef:g}: the prompt of each row of {source} alone fills the "
            f"policy's context of {context} tokens, so the mix has nothing to learn. Give ppo.ptx.data "
            "shorter rows."
        )
    return PretrainingMix(config.ptx, answers, job.seed)


def score_normalizer(config: PolicyConfig, job: Job) -> ScoreNormalizer:
    """How raw scores become comparable to the KL penalty."""
    if config.score.normalize == "running":
        return ScoreNormalizer.running(config.score.clip)
    if config.score.normalize == "none":
        return ScoreNormalizer.fixed(0.0, 1.0, config.score.clip)
    metrics = job.inputs["generate"].manifest.metrics
    if metrics["score_deviation"] <= 0.0:
        raise ConfigError(
            f"{job.stage}.score.normalize=sft: all responses that `generate` sampled have the same score, so "
            "there is nothing to learn. Use more of them (generate.num_prompts), another reward, or "
            f"{job.stage}.score.normalize=none."
        )
    return ScoreNormalizer.fixed(metrics["score_mean"], metrics["score_deviation"], config.score.clip)


def load_critic(
    config: PpoConfig,
    job: Job,
    reward: Reward,
    normalizer: ScoreNormalizer,
    tokenizer: PreTrainedTokenizerBase,
    backbone: Backbone | None = None,
) -> ScalarModel:
    """The critic. From the first step its values are in units of the normalised score.

    Args:
        backbone: if given, the critic shares its start's weights: those of the backbone or of the reward
            model.
    """
    scorer = critic_scorer(config.reward, reward)
    init = critic_start(config, job, scorer, tokenizer)
    read_to = loads_on(config.peft, job.compute)
    if init == "sft" and backbone is not None:
        size = backbone.model.config.get_text_config().hidden_size
        zeros = torch.zeros(1, size, device=job.compute.device)
        return ScalarModel(shared_copy(backbone.model), nn.Parameter(zeros))
    if init == "sft":
        directory = job.start(config.init).directory
        critic = load_scalar_model(
            directory, job.base.config, job.compute.dtype, read_to, job.compute, new_head=True
        )
        reset_head(critic, deviation=0.0)
        return critic
    assert scorer is not None
    if scorer.model.digest != tokenizer_digest(tokenizer):
        raise ConfigError(
            f"ppo.critic.init=reward: the reward model of ppo.reward={config.reward} has another tokenizer "
            "or chat template than the policy, whose token ids the critic reads. "
            "Use ppo.critic.init=sft; scoring uses text and is not affected."
        )
    if backbone is not None:
        critic = scorer.model.model.shared_copy()
    else:
        directory = scorer.model.directory
        critic = load_scalar_model(directory, job.base.config, job.compute.dtype, read_to, job.compute)
    critic.rescale(scorer.gain, scorer.bias)
    if config.score.normalize == "sft":
        critic.rescale(1 / normalizer.deviation, -normalizer.mean / normalizer.deviation)
    return critic


class CriticScorer(NamedTuple):
    """The reward model that a critic starts from. The reward is about gain * its score + bias."""

    model: LearnedReward
    gain: float
    bias: float


def critic_scorer(source: str | RewardMix, reward: Reward) -> CriticScorer | None:
    """The reward model that a critic can start from: the reward itself, or the only model in a sum of
    rewards; None if there is no such model."""
    if isinstance(reward, LearnedReward):
        return CriticScorer(reward, 1.0, 0.0)
    part = critic_part(source)
    if part is None or not isinstance(reward, CombinedReward):
        return None
    index = reward.mix.of.index(part)
    model = reward.rewards[index]
    assert isinstance(model, LearnedReward)
    if not reward.mix.normalize:
        return CriticScorer(model, part.weight, 0.0)
    assert reward.moments is not None
    mean, deviation = reward.moments[reward.mix.labels[index]]
    return CriticScorer(model, part.weight / deviation, -part.weight * mean / deviation)


def critic_start(
    config: PpoConfig, job: Job, scorer: CriticScorer | None, tokenizer: PreTrainedTokenizerBase
) -> Literal["reward", "sft"]:
    """What the critic starts from. For `auto` the choice and its reason are printed."""
    if config.critic.init != "auto":
        return config.critic.init
    against = against_critic_on_reward(config, scorer, tokenizer)
    source = f"sft, the policy's start (ppo.init={config.init}): {against}" if against else "reward"
    job.progress.console.print(f"ppo.critic.init=auto uses {source}.", highlight=False, markup=False)
    return "sft" if against else "reward"


def against_critic_on_reward(
    config: PpoConfig, scorer: CriticScorer | None, tokenizer: PreTrainedTokenizerBase
) -> str | None:
    """Why the critic cannot start from the reward model; None where it can."""
    if scorer is None:
        said = redacted(str(config.reward))
        return f"ppo.reward={said} is no model{'' if isinstance(config.reward, str) else CRITIC_START_HINT}"
    if config.score.normalize == "running":
        return "ppo.score.normalize=running changes the score's units all the time"
    if scorer.model.digest != tokenizer_digest(tokenizer):
        return "the reward model has another tokenizer or chat template"
    if virtual_tokens(scorer.model.model.model) and METHODS[config.peft.method].pads:
        return f"the reward model has virtual tokens, and gets none of ppo.peft={config.peft.method} too"
    return None
