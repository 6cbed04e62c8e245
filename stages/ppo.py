"""Proximal policy optimization against a reward, held near the model it starts from by a KL penalty.

Reads   the SFT model, or what `ppo.init` names instead (policy and reference); a reward; prompts
        (`ppo.prompts`); the score's moments.
Writes  a plain causal-LM directory: the policy with the best held-out score, judged on other prompts; with
        another ppo.peft than none also what was trained of it alone, in `adapter/`.
The loop itself is rlhf/ppo/trainer.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rlhf.config import ConfigError
from rlhf.costs.setup import CostContext
from rlhf.costs.stage_cost import StageCost
from rlhf.data.prepared import PreparedData
from rlhf.distributed.compute import Compute
from rlhf.models.base import BaseModelFiles
from rlhf.models.peft.config import PeftConfig
from rlhf.models.peft.methods import KINDS, METHODS
from rlhf.models.peft.saved import described, origin_of
from rlhf.models.start import check_start, misfits
from rlhf.pipeline.job import Job
from rlhf.pipeline.stage import TUNED, Purpose, Stage
from rlhf.ppo.config import PpoConfig
from rlhf.ppo.cost import ppo_cost
from rlhf.rewards.kinds import reward_directory

if TYPE_CHECKING:
    from rlhf.ppo.trainer import PolicyTrainer


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
    purpose: ClassVar[Purpose] = Purpose(
        "held_out_score_gain", "PPO's score on held-out prompts", 1,
        "PPO found no policy that scores better",
    )  # fmt: skip
    version: ClassVar[int] = 7
    samples: ClassVar[bool] = True
    divided: ClassVar[tuple[str, ...]] = ("batch_episodes", "minibatch_episodes")
    not_in_key: ClassVar[frozenset[str]] = frozenset({
        "prompts", "batch_rows", "micro_batch_tokens", "activation_checkpointing", "max_bad_steps", "max_kl",
        "frozen_placement",
    })  # fmt: skip

    def inputs(self) -> tuple[str, ...]:
        """Also what normalises the scores."""
        return (*super().inputs(), *(("generate",) if self.score.normalize == "sft" else ()))

    def starts_from(self) -> tuple[str, str]:
        """The model that it trains."""
        return "init", self.init

    def datasets(self) -> tuple[str, ...]:
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

    def knobs(self) -> dict[str, Any]:
        """Without the mix's source: its content decides, not the place."""
        knobs = super().knobs()
        del knobs["ptx"]["data"]
        return knobs

    def peft_config(self) -> PeftConfig:
        """Of the policy; the critic is trained in the same way."""
        return self.peft

    def rewards(self) -> Mapping[str, str]:
        """What scores each episode."""
        return {"ppo.reward": self.reward}

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
        held_out = data.rows("ppo", "held_out")[: self.evaluate_prompts]
        rows = itertools.chain(data.rows("ppo", "train"), held_out)
        yield from misfits(
            "ppo.init", self.init, base, f"ppo.prompts={self.prompts}", rows,
            beside=virtual + self.max_new_tokens,
            mend=f"Lower ppo.max_new_tokens={self.max_new_tokens}, leave out the longest prompts, or start "
            "from a model with a longer context.",
        )  # fmt: skip

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
                job.directory, job.checkpoints.best, trainer.policy.tokenizer, start=start.directory,
                key=start.identity,
                settings=job.base.config, dtype=job.compute.dtype, peft=self.peft,
            )
        )  # fmt: skip
        job.publish({**metrics, **written, **token_seconds(trainer.policy.model, job.compute)})

    def trainer(self, job: Job) -> PolicyTrainer:
        """The loop with its four models, before its first step."""
        from rlhf.ppo.build import build_trainer

        self.check_compute(job.compute)
        return build_trainer(self, job, self.mismatch_limit)

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
        super().check_compute(compute)
        if self.ema_decay is not None and compute.shards_weights:
            raise ConfigError(
                "ppo.ema_decay needs whole weights on each rank. Use zero=zero2, or ppo.ema_decay=null."
            )
        if self.frozen_placement == "sharded" and compute.zero == "none":
            raise ConfigError(
                "ppo.frozen_placement=sharded needs DeepSpeed or FSDP2. Use it with zero=zero1, zero2, "
                "zero3, fsdp2 or hsdp, or use ppo.frozen_placement=replicated."
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
