"""Proximal policy optimization against a reward, held near the model it starts from by a KL penalty.

Reads   the SFT model, or what `ppo.init` names instead (policy and reference); a reward; prompts
        (`ppo.prompts`); the score's moments.
Writes  a plain causal-LM directory: the policy with the best held-out score, judged on other prompts; with
        another ppo.peft than none also what was trained of it alone, in `adapter/`.
The loop itself is rlhf/ppo/trainer.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rlhf.config import ConfigError
from rlhf.costs.setup import CostContext
from rlhf.costs.stage_cost import StageCost
from rlhf.data.chat_template import prompt_ids, tokenizer_digest
from rlhf.data.prepared import PreparedData
from rlhf.data.schema import Role
from rlhf.digests import DirectoryDigest, directory_digest
from rlhf.distributed.compute import Compute
from rlhf.models.base import BaseModelFiles
from rlhf.models.peft.config import PeftConfig
from rlhf.models.peft.methods import KINDS, METHODS
from rlhf.models.peft.saved import described, origin_of
from rlhf.models.start import check_start, directory_of, init_digest, init_in_key, inputs_of, misfits
from rlhf.pipeline.job import Job
from rlhf.pipeline.stage import TUNED, Stage
from rlhf.ppo.config import PpoConfig
from rlhf.ppo.cost import ppo_cost
from rlhf.rewards.kinds import reward_digest, reward_directory
from rlhf.rewards.reward import Reward
from rlhf.tracking.redaction import redacted

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlhf.generation.policy_model import PolicyModel
    from rlhf.models.value_head import ScalarModel
    from rlhf.models.weight_sharing import Backbone
    from rlhf.ppo.ptx import PretrainingMix
    from rlhf.ppo.trainer import PolicyTrainer
    from rlhf.rl.advantage import ScoreNormalizer


class PpoStage(PpoConfig, Stage):
    """The keys `ppo.*`: rlhf/ppo/config.py. Values: conf/stages/ppo.yaml."""

    name: ClassVar[str] = "ppo"
    title: ClassVar[str] = "PPO"
    publishes: ClassVar[Literal["policy"]] = "policy"
    headlines: ClassVar[Mapping[str, tuple[str, str]]] = {
        "held_out_score_before": ("score before", "+z.2f"),
        "held_out_score": ("after", "+z.2f"),
        "kl": ("KL", "z.2f"),
        **TUNED,
    }
    version: ClassVar[int] = 6
    samples: ClassVar[bool] = True
    not_in_key: ClassVar[frozenset[str]] = frozenset({
        "prompts", "batch_rows", "micro_batch_tokens", "activation_checkpointing", "max_bad_steps", "max_kl",
        "frozen_placement",
    })  # fmt: skip

    def inputs(self) -> tuple[str, ...]:
        """The model that it starts from, and what the reward and its normalisation need."""
        learned = ("reward",) if self.reward == "learned" else ()
        measured = ("generate",) if self.score.normalize == "sft" else ()
        return ("prepare", *inputs_of(self.init), *learned, *measured)

    def reads_base_model(self) -> bool:
        """Only where it starts from that."""
        return self.init == "base"

    def init_directory(self) -> Path | None:
        """The user's own model."""
        return directory_of(self.init)

    def datasets(self) -> tuple[Role, ...]:
        """Reads prompts, and the rows of the pretraining mix."""
        return ("ppo", self.mixed_role) if self.ptx.coef > 0 else ("ppo",)

    def metrics(self) -> tuple[str, ...]:
        """What `run` publishes."""
        return (
            "first_ratio_deviation", "first_kl", "explained_variance", "kl", "engine_mismatch",
            "held_out_score_before", "held_out_score", "held_out_score_gain", "held_out_score_last",
            "held_out_length", "best_step", "bad_steps",
            "steps", "episodes", "trained_parameters", "artifact_bytes", "adapter_bytes", "token_seconds",
            "token_seconds_base",
        )  # fmt: skip

    @property
    def mixed_role(self) -> Literal["sft", "ptx"]:
        """Whose rows the pretraining mix draws."""
        return "sft" if self.ptx.data is None else "ptx"

    def knobs(self) -> dict[str, Any]:
        """Without the mix's source and the directory it starts from: their content decides, not the place."""
        knobs = super().knobs() | {"init": init_in_key(self.init)}
        del knobs["ptx"]["data"]
        return knobs

    def peft_config(self) -> PeftConfig:
        """Of the policy; the critic is trained in the same way."""
        return self.peft

    def rewards(self) -> Mapping[str, str]:
        """What scores each episode."""
        return {"ppo.reward": self.reward}

    def external_digests(self, digest: DirectoryDigest = directory_digest) -> dict[str, str]:
        """The model or the code that scores, and the model to start from, where they are the user's."""
        return reward_digest(self.reward, digest) | init_digest("ppo.init", self.init, digest)

    def not_checked(self) -> dict[str, str]:
        """Some methods change the policy before its first step."""
        if not METHODS[self.peft.method].starts_apart:
            return {}
        return {
            "first_kl": f"with ppo.peft={self.peft.method} the policy does not start as its own reference"
        }

    def check_data(self, data: PreparedData, base: BaseModelFiles) -> None:
        """A critic can be made of its start, and there are two halves of the held-out prompts."""
        from rlhf.models.value_head import check_scorable

        check_scorable(check_start("ppo.init", self.init, base).architecture)
        held_out = len(data.rows("ppo", "held_out"))
        if held_out < 2:
            raise ConfigError(
                f"ppo.prompts={self.prompts}: {held_out} held-out prompt, but at least 2 are needed: one "
                "half chooses the weights, the other half judges them. Give more prompts, or raise "
                "prepare.held_out_fraction."
            )

    def misfits(self, data: PreparedData, base: BaseModelFiles, chain: Mapping[str, Stage]) -> Iterator[str]:
        """Prompts that leave no room for an answer."""
        virtual = self.peft.tokens if METHODS[self.peft.method].pads else 0
        rows = [*data.rows("ppo", "train"), *data.rows("ppo", "held_out")[: self.evaluate_prompts]]
        yield from misfits(
            "ppo.init", self.init, base, f"ppo.prompts={self.prompts}", rows,
            beside=virtual + self.max_new_tokens,
            mend=f"Lower ppo.max_new_tokens={self.max_new_tokens}, leave out the longest prompts, or start "
            "from a model with a longer context.",
        )  # fmt: skip

    def answering(self, chain: Mapping[str, Stage]) -> Iterator[tuple[str, str]]:
        """The policy."""
        yield "ppo.init", self.init

    def check(self, chain: Mapping[str, Stage]) -> None:
        """Critic and normalisation must fit the methods of tuning and what `generate` measured."""
        has_tokens = self.virtual_tokens_of_reward(chain)
        if has_tokens and METHODS[self.peft.method].pads and self.critic.init == "reward":
            raise ConfigError(
                f"ppo.critic.init=reward: the reward model has virtual tokens ({has_tokens}), and a critic "
                f"on it cannot get those of ppo.peft={self.peft.method} too. Use ppo.critic.init=sft, or "
                "another ppo.peft."
            )
        self.check_moments(chain)

    def virtual_tokens_of_reward(self, chain: Mapping[str, Stage]) -> str | None:
        """Where the reward model's virtual tokens come from, in the user's own keys; None without any."""
        if self.reward == "learned":
            method = dict(chain["reward"])["peft"].method
            return f"reward.peft={method}" if METHODS[method].pads else None
        directory = reward_directory(self.reward, None)
        if directory is None or origin_of(directory) is None:
            return None
        return f"ppo.reward={self.reward}" if described(directory)["peft_type"] in KINDS else None

    def check_moments(self, chain: Mapping[str, Stage]) -> None:
        """The moments that scores are normalised with must be those of the scores that PPO sees.

        Raises:
            ConfigError: in the user's own keys.
        """
        if self.score.normalize != "sft":
            return
        wanted = {"policy": self.init} | {
            name: getattr(self, name) for name in ("reward", "temperature", "max_new_tokens")
        }
        measured = chain["generate"].model_dump()
        for name, value in wanted.items():
            if measured[name] != value:
                raise ConfigError(
                    f"generate.{name}={measured[name]}: ppo.score.normalize=sft takes the score's mean and "
                    f"deviation from `generate`, so this must be {value}. "
                    "Or use ppo.score.normalize=running with ppo.critic.init=sft."
                )

    def cost(self, on: CostContext, chain: Mapping[str, Stage]) -> StageCost:
        """See rlhf/ppo/cost.py."""
        if self.reward != "learned":
            return ppo_cost(self, on, reward_method=None)
        trained = dict(chain["reward"])
        return ppo_cost(self, on, reward_method=trained["peft"].method, reward_init=trained["init"])

    def run(self, job: Job) -> None:
        """Load the four models, train, and publish the best policy."""
        from rlhf.generation.latency import token_seconds
        from rlhf.models.peft.merge import publish_policy

        trainer = self.trainer(job)
        metrics = trainer.train(
            job.data.rows("ppo", "train"), job.data.rows("ppo", "held_out")[: self.evaluate_prompts]
        )
        start = job.start(self.init)
        written = job.compute.main_only(
            lambda: publish_policy(
                job.directory, trainer.best_weights, trainer.policy.tokenizer, start=start.directory,
                key=start.identity,
                settings=job.base.config, dtype=job.compute.dtype, peft=self.peft,
            )
        )  # fmt: skip
        job.publish({**metrics, **written, **token_seconds(trainer.policy.model, job.compute)})

    def trainer(self, job: Job) -> PolicyTrainer:
        """The loop with its four models, before its first step."""
        from rlhf.generation.policy_model import PolicyModel
        from rlhf.models.load import context_left, load_causal_lm
        from rlhf.models.logprobs import check_head
        from rlhf.models.peft.attach import attach, check_reached, count_parameters
        from rlhf.models.recompute import checkpoint_layers
        from rlhf.ppo.trainer import PolicyTrainer
        from rlhf.ppo.update import ActorCritic
        from rlhf.rewards.model import LearnedReward, make_reward
        from rlhf.training.make_engine import make_engine

        self.check_compute(job.compute)
        settings, compute, tokenizer = job.base.config, job.compute, job.start(self.init).load_tokenizer()
        start = job.start(self.init).directory
        policy = load_causal_lm(start, settings, compute.dtype, compute.loads_on)
        check_head(policy)
        backbone = self.backbone(policy, start, compute)
        adapter = attach(policy, self.peft)
        check_reached(policy)
        learned = job.inputs["reward"].path if self.reward == "learned" else None
        frozen_on = compute.loads_on if self.frozen_placement == "sharded" else compute.device
        reward = make_reward(
            self.reward,
            learned,
            settings,
            compute,
            self.micro_batch_tokens,
            job.reward_server,
            backbone,
            frozen_on,
        )
        normalizer = self.normalizer(job)
        critic = self.load_critic(job, reward, normalizer, tokenizer, backbone)
        attach(critic.model, self.peft)
        critic.head.requires_grad_(True)
        critic.offset.requires_grad_(True)
        trained, _ = count_parameters(policy)  # before they are sharded
        model = ActorCritic(policy, critic)
        if self.activation_checkpointing:
            checkpoint_layers(model)
        engine = make_engine(
            model,
            [(policy.parameters(), self.optim), (critic.parameters(), self.critic.optim)],
            compute,
            job.checkpoints.newest,
            in_turns=True,
        )
        reference = (
            PolicyModel(backbone.model, tokenizer, compute)
            if backbone
            else PolicyModel.load(start, settings, compute, tokenizer, device=frozen_on)
        )
        if self.frozen_placement == "sharded":
            self.shard(reference, reward, compute)
        if self.frozen_placement == "offloaded":
            reference.offload()
            if isinstance(reward, LearnedReward):
                reward.offload()
        return PolicyTrainer(
            self,
            engine=engine,
            policy=PolicyModel(
                policy,
                tokenizer,
                compute,
                (lambda: engine.gathered(policy)) if compute.zero != "none" else adapter.merged,
                job.vllm,
            ),
            reference=reference,
            reward=reward,
            normalizer=normalizer,
            mix=self.mix(job, tokenizer, context_left(policy)) if self.ptx.coef > 0 else None,
            job=job,
            trained_parameters=trained,
            mismatch_limit=self.mismatch_limit,
        )

    def mix(self, job: Job, tokenizer: PreTrainedTokenizerBase, context: int) -> PretrainingMix:
        """Of the rows that leave the policy something to learn.

        Raises:
            ConfigError: none does.
        """
        from rlhf.ppo.ptx import PretrainingMix

        rows = job.data.rows(self.mixed_role, "train")
        rows = [row for row in rows if len(prompt_ids(tokenizer, row.prompt)) < context]
        if not rows:
            source = "sft.data" if self.ptx.data is None else f"ppo.ptx.data={self.ptx.data}"
            raise ConfigError(
                f"ppo.ptx.coef={self.ptx.coef:g}: the prompt of each row of {source} alone fills the "
                f"policy's context of {context} tokens, so the mix has nothing to learn. Give ppo.ptx.data "
                "shorter rows."
            )
        return PretrainingMix(self.ptx, tokenizer, rows, job.seed, context)

    @property
    def mismatch_limit(self) -> float:
        """Nats a token of `engine_mismatch` that end the run at once; none without the gate."""
        from rlhf.ppo.trainer import TIMES_THE_BOUND

        bound = self.gates.get("engine_mismatch")
        return math.inf if bound is None or bound.max is None else TIMES_THE_BOUND * bound.max

    def check_compute(self, compute: Compute) -> None:
        """Refuse what cannot be done on these ranks and this device.

        Raises:
            ConfigError: with what can.
        """
        for name in ("batch_episodes", "minibatch_episodes"):
            compute.check_divides(f"ppo.{name}", getattr(self, name))
        if self.ema_decay is not None and compute.shards_weights:
            raise ConfigError(
                "ppo.ema_decay needs whole weights on each rank. Use zero=zero2, or ppo.ema_decay=null."
            )
        if self.frozen_placement == "sharded" and compute.zero == "none":
            raise ConfigError(
                "ppo.frozen_placement=sharded needs DeepSpeed or FSDP2. Use it with zero=zero1, zero2, zero3 "
                "or fsdp2, or use ppo.frozen_placement=replicated."
            )
        if self.frozen_placement != "offloaded":
            return
        if METHODS[self.peft.method].shares and compute.zero == "none":
            raise ConfigError(
                f"ppo.frozen_placement=offloaded: with ppo.peft={self.peft.method} the frozen models share "
                "the policy's weights, so these must stay on the GPU. Use ppo.frozen_placement=replicated."
            )
        if compute.device.type == "cpu":
            raise ConfigError(
                "ppo.frozen_placement=offloaded keeps the reference and reward model in the host's memory "
                "while a GPU does not need them; this run has no GPU. Use ppo.frozen_placement=replicated."
            )

    def backbone(self, policy: PreTrainedModel, start: Path, compute: Compute) -> Backbone | None:
        """What reference, critic and reward model may share with a policy that has no adapter yet.

        None with methods other than lora, whose models are loaded one by one, and with any zero= but none:
        what is sharded belongs to one engine.
        """
        from rlhf.models.weight_sharing import Backbone, sharing

        if not METHODS[self.peft.method].shares or compute.zero != "none":
            return None
        return Backbone(start, sharing(policy))

    def shard(self, reference: PolicyModel, reward: Reward, compute: Compute) -> None:
        """Spread the models that do not train over the ranks."""
        from rlhf.rewards.model import LearnedReward

        if compute.zero == "fsdp2":
            from rlhf.training.fsdp import shard_frozen
        else:
            from rlhf.training.deepspeed import shard_frozen

        shard_frozen(reference.model, compute)
        if isinstance(reward, LearnedReward):
            shard_frozen(reward.model, compute)

    def normalizer(self, job: Job) -> ScoreNormalizer:
        """How raw scores become comparable to the KL penalty."""
        from rlhf.rl.advantage import ScoreNormalizer

        if self.score.normalize == "running":
            return ScoreNormalizer.running(self.score.clip)
        if self.score.normalize == "none":
            return ScoreNormalizer.fixed(0.0, 1.0, self.score.clip)
        metrics = job.inputs["generate"].manifest.metrics
        if metrics["score_deviation"] <= 0.0:
            raise ConfigError(
                "ppo.score.normalize=sft: all responses that `generate` sampled have the same score, so "
                "there is nothing to learn. Use more of them (generate.num_prompts), another reward, or "
                "ppo.score.normalize=none."
            )
        return ScoreNormalizer.fixed(metrics["score_mean"], metrics["score_deviation"], self.score.clip)

    def critic_start(
        self, job: Job, reward: Reward, tokenizer: PreTrainedTokenizerBase
    ) -> Literal["reward", "sft"]:
        """What the critic starts from; of `auto`, with the reason."""
        if self.critic.init != "auto":
            return self.critic.init
        against = self.against_critic_on_reward(reward, tokenizer)
        source = f"sft, the policy's start (ppo.init={self.init}): {against}" if against else "reward"
        job.progress.console.print(f"ppo.critic.init=auto uses {source}.", highlight=False, markup=False)
        return "sft" if against else "reward"

    def against_critic_on_reward(self, reward: Reward, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """Why the critic cannot start from the reward model; None where it can."""
        from rlhf.models.peft.virtual_tokens import virtual_tokens
        from rlhf.rewards.model import LearnedReward

        if not isinstance(reward, LearnedReward):
            return f"ppo.reward={redacted(self.reward)} is no model"
        if self.score.normalize == "running":
            return "ppo.score.normalize=running changes the score's units all the time"
        if reward.digest != tokenizer_digest(tokenizer):
            return "the reward model has another tokenizer or chat template"
        if virtual_tokens(reward.model.model) and METHODS[self.peft.method].pads:
            return f"the reward model has virtual tokens, and gets none of ppo.peft={self.peft.method} too"
        return None

    def load_critic(
        self,
        job: Job,
        reward: Reward,
        normalizer: ScoreNormalizer,
        tokenizer: PreTrainedTokenizerBase,
        backbone: Backbone | None = None,
    ) -> ScalarModel:
        """The critic, speaking the normalised score's units from its first step.

        With a backbone it shares its starting point's weights: `backbone`'s, or the reward model's.
        """
        import torch
        from torch import nn

        from rlhf.models.value_head import ScalarModel, load_scalar_model, reset_head
        from rlhf.models.weight_sharing import sharing
        from rlhf.rewards.model import LearnedReward

        init = self.critic_start(job, reward, tokenizer)
        if init == "sft" and backbone is not None:
            size = backbone.model.config.get_text_config().hidden_size
            zeros = torch.zeros(1, size, device=job.compute.device)
            return ScalarModel(sharing(backbone.model), nn.Parameter(zeros))
        if init == "sft":
            directory = job.start(self.init).directory
            critic = load_scalar_model(directory, job.base.config, job.compute.dtype, new_head=True)
            critic.to(job.compute.loads_on)
            reset_head(critic, deviation=0.0)
            return critic
        assert isinstance(reward, LearnedReward)
        if reward.digest != tokenizer_digest(tokenizer):
            raise ConfigError(
                f"ppo.critic.init=reward: the reward model of ppo.reward={self.reward} has another tokenizer "
                "or chat template than the policy, whose token ids the critic reads. "
                "Use ppo.critic.init=sft; scoring uses text and is not affected."
            )
        if backbone is not None:
            critic = reward.model.sharing_weights()
        else:
            critic = load_scalar_model(reward.directory, job.base.config, job.compute.dtype)
            critic.to(job.compute.loads_on)
        if self.score.normalize == "sft":
            critic.rescale(1 / normalizer.deviation, -normalizer.mean / normalizer.deviation)
        return critic
