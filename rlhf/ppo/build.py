"""The models of a policy gradient and its loop, built from the stage's keys. PPO has four models; without a
critic there are three."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.config import ConfigError
from rlhf.data.answers import Answers
from rlhf.data.chat_template import tokenizer_digest
from rlhf.distributed.compute import Compute
from rlhf.generation.policy_model import PolicyModel
from rlhf.models.load import context_left, load_causal_lm
from rlhf.models.logprobs import check_policy
from rlhf.models.peft.attach import Adapter, attach, check_reached, count_parameters, loads_on
from rlhf.models.peft.methods import METHODS
from rlhf.models.peft.virtual_tokens import virtual_tokens
from rlhf.models.recompute import checkpoint_layers
from rlhf.models.value_head import ScalarModel, load_scalar_model, reset_head
from rlhf.models.weight_sharing import Backbone, sharing
from rlhf.pipeline.job import Job
from rlhf.ppo.config import WHICH, PolicyConfig, PpoConfig
from rlhf.ppo.ptx import PretrainingMix
from rlhf.ppo.trainer import PolicyTrainer
from rlhf.ppo.update import ActorAlone, ActorCritic, Objective, PpoObjective
from rlhf.rewards.combined import CombinedReward
from rlhf.rewards.kinds import RewardMix, critic_part
from rlhf.rewards.model import LearnedReward
from rlhf.rewards.reward import Reward
from rlhf.rl.advantage import ScoreNormalizer
from rlhf.tracking.redaction import redacted
from rlhf.training.config import OptimConfig
from rlhf.training.engine import Access, Engine
from rlhf.training.make_engine import make_engine


def build_trainer(config: PpoConfig, job: Job, mismatch_limit: float) -> PolicyTrainer:
    """PPO's loop with its four models, before its first step."""

    def critic(
        reward: Reward,
        normalizer: ScoreNormalizer,
        tokenizer: PreTrainedTokenizerBase,
        backbone: Backbone | None,
    ) -> tuple[ScalarModel, OptimConfig]:
        return load_critic(config, job, reward, normalizer, tokenizer, backbone), config.critic.optim

    def mix(tokenizer: PreTrainedTokenizerBase, context: int) -> PretrainingMix | None:
        return pretraining_mix(config, job, tokenizer, context) if config.ptx.coef > 0 else None

    return build_loop(config, PpoObjective(config), job, mismatch_limit, critic=critic, mix=mix)


LoadCritic = Callable[
    [Reward, ScoreNormalizer, PreTrainedTokenizerBase, Backbone | None], tuple[ScalarModel, OptimConfig]
]


def build_loop(
    config: PolicyConfig,
    objective: Objective,
    job: Job,
    mismatch_limit: float,
    *,
    critic: LoadCritic | None = None,
    mix: Callable[[PreTrainedTokenizerBase, int], PretrainingMix | None] = lambda tokenizer, context: None,
) -> PolicyTrainer:
    """The loop with its models, before its first step.

    Args:
        critic: loads it, and says how it is trained; None for an algorithm without one.
        mix: makes the pretraining mix of rows that fit into so many tokens, if there is one.
    """
    settings, compute, tokenizer = job.base.config, job.compute, job.start(config.init).load_tokenizer()
    start = job.start(config.init).directory
    policy = load_causal_lm(start, settings, compute.dtype, loads_on(config.peft, compute), compute)
    compute.ask_once(lambda: check_policy(policy))
    backbone = shared_backbone(config, policy, start, compute)
    adapter = attach(policy, config.peft, compute.device)
    compute.ask_once(lambda: check_reached(policy))
    placement = config.placement(shards_weights=compute.shards_weights)
    reward = job.reward(config.reward, config.micro_batch_tokens, backbone, placement)
    normalizer = score_normalizer(config, job)
    groups: list[tuple[Iterable[nn.Parameter], OptimConfig]] = [(policy.parameters(), config.optim)]
    model: nn.Module = ActorAlone(policy)
    if critic is not None:
        scalar, optim = critic(reward, normalizer, tokenizer, backbone)
        attach(scalar.model, config.peft, compute.device)
        scalar.to(compute.loads_on)  # its head, behind what QLoRA took there
        scalar.head.requires_grad_(True)
        scalar.offset.requires_grad_(True)
        groups.append((scalar.parameters(), optim))
        model = ActorCritic(policy, scalar)
    trained, _ = count_parameters(policy)  # before they are sharded
    if config.activation_checkpointing:
        checkpoint_layers(model)
    engine = make_engine(  # the trainer restores it, when all models are loaded
        model,
        groups,
        compute,
        job.checkpoints.newest,
        in_turns=critic is not None,
    )
    access = policy_access(engine, policy, adapter, compute)
    if backbone is not None:
        reference = PolicyModel(backbone.model, tokenizer, compute)
    elif config.shares_reference(shards_weights=compute.shards_weights):
        reference = PolicyModel(policy, tokenizer, compute, without(adapter, access))
    else:
        reference = PolicyModel.load(start, settings, compute, tokenizer, placement=placement)
    return PolicyTrainer(
        config,
        objective,
        engine=engine,
        policy=PolicyModel(
            policy,
            tokenizer,
            compute,
            access,
            job.vllm,
            job.local_sampling,
        ),
        reference=reference,
        reward=reward,
        normalizer=normalizer,
        mix=mix(tokenizer, context_left(policy)),
        job=job,
        trained_parameters=trained,
        mismatch_limit=mismatch_limit,
    )


def pretraining_mix(
    config: PpoConfig, job: Job, tokenizer: PreTrainedTokenizerBase, context: int
) -> PretrainingMix:
    """The mix of the rows that leave the policy something to learn.

    Raises:
        ConfigError: no row does.
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


def shared_backbone(
    config: PolicyConfig, policy: PreTrainedModel, start: Path, compute: Compute
) -> Backbone | None:
    """The weights that reference, critic and reward model share with the policy, which has no adapter yet.

    None if they cannot: only LoRA leaves the weights as they are, and with `zero=` they belong to one engine
    (whose policy, with its adapter turned off, may be the reference).
    """
    if not METHODS[config.peft.method].shares or compute.zero != "none":
        return None
    return Backbone(start, sharing(policy))


def policy_access(engine: Engine, policy: PreTrainedModel, adapter: Adapter, compute: Compute) -> Access:
    """How the policy that trains is run."""
    if compute.zero == "none":
        return Access(adapter.merged)
    together = (lambda: engine.by_layers(policy)) if compute.shards_weights else None
    return Access(lambda: engine.gathered(policy), together, engine.gathered_weights)


Opens = Callable[[], AbstractContextManager[None]]


def without(adapter: Adapter, access: Access) -> Access:
    """How the policy's start is run, in the policy's own weights: with the adapter turned off."""

    def opened(context: Opens) -> Opens:
        @contextmanager
        def both() -> Iterator[None]:
            with adapter.off(), context():
                yield

        return both

    return Access(opened(access.alone), access.together and opened(access.together), access.weights)


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
    """The critic. Its values are in units of the normalised score from the first step on.

    With a backbone, the critic shares the weights of its start: `backbone`'s, or the reward model's.
    """
    scorer = critic_scorer(config.reward, reward)
    init = critic_start(config, job, scorer, tokenizer)
    read_to = loads_on(config.peft, job.compute)
    if init == "sft" and backbone is not None:
        size = backbone.model.config.get_text_config().hidden_size
        zeros = torch.zeros(1, size, device=job.compute.device)
        return ScalarModel(sharing(backbone.model), nn.Parameter(zeros))
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
        critic = scorer.model.model.sharing_weights()
    else:
        directory = scorer.model.directory
        critic = load_scalar_model(directory, job.base.config, job.compute.dtype, read_to, job.compute)
    critic.rescale(scorer.gain, scorer.bias)
    if config.score.normalize == "sft":
        critic.rescale(1 / normalizer.deviation, -normalizer.mean / normalizer.deviation)
    return critic


class CriticScorer(NamedTuple):
    """The reward model that a critic starts from: the score is about gain * its score + bias."""

    model: LearnedReward
    gain: float
    bias: float


def critic_scorer(source: str | RewardMix, reward: Reward) -> CriticScorer | None:
    """What a critic can start from: the reward, or the only model in a sum of rewards; None without one."""
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
        return f"ppo.reward={said} is no model{'' if isinstance(config.reward, str) else WHICH}"
    if config.score.normalize == "running":
        return "ppo.score.normalize=running changes the score's units all the time"
    if scorer.model.digest != tokenizer_digest(tokenizer):
        return "the reward model has another tokenizer or chat template"
    if virtual_tokens(scorer.model.model.model) and METHODS[config.peft.method].pads:
        return f"the reward model has virtual tokens, and gets none of ppo.peft={config.peft.method} too"
    return None
