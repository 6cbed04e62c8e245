"""What `ppo.*` can be told. Values: conf/stages/ppo.yaml."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rlhf.config import OptimConfig, Peft, Strict
from rlhf.data.sources import PromptSource, SourceConfig
from rlhf.models.start import Init
from rlhf.rewards.source import RewardSource


class KlConfig(Strict):
    """`ppo.kl.*`: the penalty for leaving the SFT model."""

    coef: NonNegativeFloat
    """Normalised reward per nat; the starting value when adaptive."""
    controller: Literal["fixed", "adaptive"]
    """Whether coef stays, or is steered towards target."""
    target: PositiveFloat
    """adaptive: nats a sequence to steer for."""
    horizon: PositiveFloat
    """adaptive: episodes; longer reacts more slowly."""


class CriticConfig(Strict):
    """`ppo.critic.*`: the model of values, which learns beside the policy."""

    init: Literal["auto", "reward", "sft"]
    """From the reward model, rescaled to the normalised score; or (`sft`) the trunk of the policy's start,
    `ppo.init`, under a zero head. `auto` takes the reward model where it fits: a model scores, with the
    policy's tokenizer and template, under a fixed normalisation; and says which it took."""
    optim: OptimConfig
    warmup_steps: NonNegativeInt
    """First steps in which only the critic learns; the policy's learning rate and the KL coefficient begin
    their schedules behind them."""


class ScoreConfig(Strict):
    """`ppo.score.*`: from a raw score to the reward of a whole response."""

    normalize: Literal["sft", "running", "none"]
    """With the moments of the scores that the policy starts with (`sft`: measured by `generate` of the model
    of `ppo.init`), of all scores so far, or not."""
    clip: PositiveFloat | None
    """Deviations beyond which a normalised score is cut."""
    missing_stop: float | None
    """Normalised score of a response without a stop token; null keeps its own."""
    missing_stop_penalty: NonNegativeFloat
    """Taken from such a response's score instead."""

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if self.missing_stop is not None and self.missing_stop_penalty > 0:
            raise ValueError("set missing_stop or missing_stop_penalty, not both")
        return self


class PtxConfig(Strict):
    """`ppo.ptx.*`: the pretraining-mix loss (Ouyang et al. 2022, arXiv:2203.02155, eq. 2)."""

    coef: NonNegativeFloat
    """Weight beside the policy loss; 0 turns it off."""
    data: SourceConfig | None
    """Texts or exchanges that shall not be forgotten: whole texts, and the answers of exchanges. Null takes
    sft.data."""
    rows: PositiveInt
    """Rows of it per optimizer step."""


class PpoConfig(Strict):
    """Every knob of the PPO stage. Sources of the details: docs/algorithms/ppo.md."""

    prompts: PromptSource | None
    """Whose responses are scored and learned from; prepared by `prepare`. A source, or `sft.data` or
    `reward.pairs` for the prompts of those rows. `auto` is the demo's, and beside data of yours the prompts
    of sft.data, or else of reward.pairs."""
    init: Init
    """The model that the policy starts from: `sft`, `base`, or a `save_pretrained` directory. The reference
    is the same one. Without `sft` no SFT stage is run for it."""
    reward: RewardSource
    """What scores a response: `learned` (the reward stage's model), `vader`, `model:DIRECTORY` (a one-label
    classification model), `python:MODULE:FUNCTION`, or the URL of a server."""
    steps: PositiveInt
    """Rollouts; each one is learned from `epochs` times."""
    batch_episodes: PositiveInt
    """Episodes per rollout, over all ranks."""
    minibatch_episodes: PositiveInt
    """Episodes per optimizer step, over all ranks."""
    epochs: PositiveInt
    """Passes over the episodes of a rollout."""
    stop_epochs_kl: PositiveFloat | None
    """Skip the remaining epochs once the mean of rho - 1 - log rho passes this many nats a token."""
    max_new_tokens: PositiveInt
    """A longer response is cut off."""
    temperature: PositiveFloat
    """Divides the logits of policy and reference alike, when sampling and when training."""
    optim: OptimConfig
    peft: Peft
    critic: CriticConfig
    kl: KlConfig
    score: ScoreConfig
    ptx: PtxConfig
    gamma: float = Field(gt=0, le=1)
    """Discount per token; 1 where the length should not matter."""
    lam: float = Field(ge=0, le=1)
    """Of the advantages: 0 trusts the critic alone, 1 the sampled rewards alone."""
    clip: float = Field(gt=0, lt=1)
    """How far the probability ratio may leave 1 and still earn gradient."""
    clip_high: PositiveFloat | None
    """The same upwards; null takes clip."""
    dual_clip: float | None = Field(gt=1)
    """Ratio beyond which a token with a negative advantage stops earning gradient; null for never."""
    value_clip: PositiveFloat | None
    """How far, in units of the normalised reward, the critic may leave the rollout's value and still earn
    gradient; null for any distance."""
    ema_decay: float | None = Field(gt=0, lt=1)
    """Publish an exponential moving average of the policy's weights; null for the weights themselves."""
    evaluate_every: PositiveInt
    """Steps between evaluations on held-out prompts; the policy with the best score on one half of them is
    published, and judged on the other half."""
    evaluate_prompts: int = Field(ge=2)
    """The first so many held-out prompts."""
    max_bad_steps: NonNegativeInt
    """Steps skipped for a non-finite reward, loss or gradient before the run stops."""
    max_kl: PositiveFloat | None
    """Nats a sequence from the SFT model beyond which the run stops, before it learns from them; null for
    never."""
    batch_rows: PositiveInt | None
    """Rows decoded together on each rank; null for all. Lower it when memory runs out while sampling."""
    frozen: Literal["replicated", "sharded", "offloaded"]
    """Reference and reward model: whole on every rank; sharded over them (ZeRO-3 inference, or FSDP2); or in
    each rank's host memory, and whole on its GPU only while they are used."""
    micro_batch_tokens: PositiveInt
    """Tokens per forward pass; lower it when memory runs out."""
    activation_checkpointing: bool
    """Keep no activations of a layer but its input; the rest is computed anew: the same result, later."""

    @property
    def scores_by_rule(self) -> bool:
        """No model scores."""
        return self.reward == "vader" or self.reward.startswith(("python:", "http:", "https:"))

    @property
    def critic_on_reward(self) -> bool:
        """Whether the critic starts from the reward model, as far as the config tells."""
        fits = not self.scores_by_rule and self.score.normalize != "running"
        return self.critic.init == "reward" or (self.critic.init == "auto" and fits)

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        if self.minibatch_episodes > self.batch_episodes:
            raise ValueError(
                f"minibatch_episodes={self.minibatch_episodes} is more than "
                f"batch_episodes={self.batch_episodes}"
            )
        if self.critic.warmup_steps >= self.steps:
            raise ValueError(
                f"critic.warmup_steps={self.critic.warmup_steps} leaves none of steps={self.steps} in which "
                "the policy learns. Lower it"
            )
        if self.kl.controller == "adaptive" and self.kl.horizon <= 0.2 * self.batch_episodes:
            raise ValueError(
                f"kl.horizon={self.kl.horizon:g} episodes is too short for "
                f"batch_episodes={self.batch_episodes}: the coefficient could turn negative. "
                "Use at least ten times the batch"
            )
        if self.critic.init == "reward" and self.score.normalize == "running":
            raise ValueError(
                "critic.init=reward needs a fixed normalisation to speak its units. "
                "Use score.normalize=sft, or critic.init=sft"
            )
        if self.critic.init == "reward" and self.scores_by_rule:
            raise ValueError(
                f"critic.init=reward: {self.reward} is no model to start from. Use critic.init=sft"
            )
        return self
