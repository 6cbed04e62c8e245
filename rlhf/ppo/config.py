"""The keys that PPO and the policy gradients without a critic share, and PPO's own.

Values: conf/stages/ppo.yaml. The others' own keys: rlhf/ppo/group_config.py.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rlhf.config import Strict
from rlhf.data.sources import PromptSource, SourceConfig
from rlhf.models.peft.config import Peft
from rlhf.models.peft.methods import METHODS
from rlhf.pipeline.fields import LENGTH, UNKEYED, Batch, Function, Memory, Model, Rows, Score
from rlhf.rewards.kinds import critic_part
from rlhf.training.config import OptimConfig

CRITIC_START_HINT = " (of several rewards: the only model, in a sum, with a positive weight)"


class KlConfig(Strict):
    """`STAGE.kl.*`: the penalty for leaving the model that the policy starts from."""

    coef: NonNegativeFloat
    """Coefficient of the penalty: normalised reward per nat. With adaptive, the first value."""
    controller: Literal["fixed", "adaptive"]
    """fixed keeps coef; adaptive changes it until the KL is near target."""
    target: PositiveFloat
    """adaptive: the wanted KL, nats per sequence."""
    horizon: PositiveFloat
    """adaptive: episodes over which it reacts; a longer horizon reacts more slowly."""


class CriticConfig(Strict):
    """`ppo.critic.*`: the model that predicts returns; it trains together with the policy."""

    init: Literal["auto", "reward", "sft"]
    """What the critic starts from: the reward model, rescaled to the normalised score; or (`sft`) the
    policy's start, `ppo.init`, with a head of zeros. `auto` uses the reward model if it fits: a model
    scores, with the policy's tokenizer and template, under a fixed normalisation. The run says which."""
    optim: OptimConfig
    warmup_steps: NonNegativeInt
    """First steps, in which only the critic learns. The schedules of the policy's learning rate and of the KL
    coefficient begin after them."""


class ScoreConfig(Strict):
    """`STAGE.score.*`: from a raw score to the reward of a whole response."""

    normalize: Literal["sft", "running", "none"]
    """Normalise scores with the mean and deviation of the start's scores (`sft`: measured by `generate` with
    the model that the policy starts from), of all scores so far (`running`), or not (`none`)."""
    clip: PositiveFloat | None
    """Standard deviations at which a normalised score is cut."""
    missing_stop: float | None
    """Normalised score of a response without a stop token; null keeps its own."""
    missing_stop_penalty: NonNegativeFloat
    """Subtracted from the normalised score of a response without a stop token."""

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if self.missing_stop is not None and self.missing_stop_penalty > 0:
            raise ValueError(
                "Set only one of KEY.missing_stop, a score, and KEY.missing_stop_penalty, which is "
                "subtracted. KEY.missing_stop_penalty=0 turns the penalty off"
            )
        return self


class PtxConfig(Strict):
    """`ppo.ptx.*`: the pretraining-mix loss (Ouyang et al. 2022, arXiv:2203.02155, eq. 2)."""

    coef: NonNegativeFloat
    """Weight of this loss, added to the policy loss; 0 turns it off."""
    data: Annotated[SourceConfig | None, Rows("ptx", otherwise="sft")]
    """General texts or conversations that the policy should not forget: whole texts, and the answers
    of conversations. Null uses sft.data."""
    rows: PositiveInt
    """Rows of `data` per optimizer step."""


class PolicyConfig(Strict):
    """The keys of every stage that samples from a policy, scores the responses and learns from them."""

    init: Model
    """The model that the policy starts from, which is the reference too: `base`, a stage that makes a policy
    (`sft`, `dpo`, ...), or a `save_pretrained` directory. Unless it is `sft`, no SFT stage is needed."""
    reward: Score
    """What scores a response: `learned` (the reward stage's model), `vader`, `model:DIRECTORY` (a one-label
    classification model), `python:MODULE:FUNCTION`, `trl:FUNCTION`, `verify:NAME`, `judge:URL`, or the URL of
    a server; or a list of several: docs/rewards.md."""
    steps: Annotated[PositiveInt, LENGTH]
    """Number of rollouts. The policy learns from each of them in `epochs` passes."""
    batch_episodes: Batch
    """Episodes per rollout, over all ranks."""
    minibatch_episodes: Batch
    """Episodes per optimizer step, over all ranks."""
    epochs: PositiveInt
    """Passes over the episodes of each rollout."""
    stop_epochs_kl: PositiveFloat | None
    """Skip the remaining epochs once the mean of rho - 1 - log rho passes this many nats per token."""
    max_new_tokens: PositiveInt
    """A longer response is cut off."""
    temperature: PositiveFloat
    """Divides the logits of both policy and reference, in sampling and in training."""
    optim: OptimConfig
    peft: Peft
    kl: KlConfig
    score: ScoreConfig
    clip: float = Field(gt=0, lt=1)
    """Distance of the probability ratio from 1 beyond which a token gets no gradient to move further away."""
    clip_high: PositiveFloat | None
    """The same distance for ratios above 1; null uses clip."""
    dual_clip: float | None = Field(gt=1)
    """Ratio above which a token with a negative advantage gets no gradient; null for no limit."""
    advantage: str
    """The advantage estimator. Each stage lists its own."""
    policy_loss: str
    """The policy loss on a micro-batch. Each stage lists its own."""
    evaluate_every: PositiveInt
    """Steps between evaluations on held-out prompts; the policy with the best score on one half of them is
    published, and judged on the other half."""
    evaluate_prompts: int = Field(ge=2)
    """Number of held-out prompts that are evaluated, the first ones."""
    max_bad_steps: Annotated[NonNegativeInt, UNKEYED]
    """Most steps that may be skipped because a reward, loss or gradient is not finite. One more ends the
    run."""
    max_kl: Annotated[PositiveFloat | None, UNKEYED]
    """The run stops before it learns from a rollout with a larger KL, nats per sequence from the reference;
    null for no limit."""
    batch_rows: Memory | None
    """Rows that are decoded together on each rank; null for all. Lower it when memory runs out while
    sampling."""
    frozen_placement: Annotated[Literal["auto", "replicated", "sharded", "offloaded"], UNKEYED]
    """Reference and reward model: whole on every rank (replicated); sharded over them (ZeRO-3 inference, or
    FSDP2); or in each rank's host memory, and whole on its GPU only while they are used (offloaded). `auto`
    shards them where `zero=` shards the weights that train, and replicates them elsewhere. With LoRA the
    reference is the policy without its adapter, and only the reward model is placed, unless whole copies are
    wanted of sharded weights."""
    micro_batch_tokens: Memory
    """Tokens per forward pass; lower it when memory runs out."""
    activation_checkpointing: Annotated[bool, UNKEYED]
    """Keep only the input of each layer and compute its activations again in the backward pass. Less memory,
    more time, the same result."""

    def placement(self, *, shards_weights: bool) -> Literal["replicated", "sharded", "offloaded"]:
        """Where reference and reward model are, if the weights that train are sharded or not."""
        if self.frozen_placement == "auto":
            return "sharded" if shards_weights else "replicated"
        return self.frozen_placement

    def shares_reference(self, *, shards_weights: bool) -> bool:
        """Whether the reference is the policy with its adapter turned off: not where the policy's weights are
        sharded and the reference is wanted whole."""
        shares = METHODS[self.peft.method].shares
        return shares and (not shards_weights or self.placement(shards_weights=True) == "sharded")

    @property
    def group_size(self) -> int:
        """Episodes that answer the same prompt."""
        return 1

    @property
    def resamples(self) -> int:
        """Most times that groups with equal scores are replaced by answers to other prompts."""
        return 0

    @property
    def warmup_steps(self) -> int:
        """First steps, in which the policy does not learn."""
        return 0

    @property
    def scores_by_rule(self) -> bool:
        """Whether no scoring model exists that a critic could start from."""
        return critic_part(self.reward) is None

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        if self.minibatch_episodes > self.batch_episodes:
            raise ValueError(
                f"KEY.minibatch_episodes={self.minibatch_episodes} is more than "
                f"KEY.batch_episodes={self.batch_episodes}. Lower it, or raise the other"
            )
        if self.kl.controller == "adaptive" and self.kl.horizon <= 0.2 * self.batch_episodes:
            raise ValueError(
                f"KEY.kl.horizon={self.kl.horizon:g} episodes is too short for "
                f"KEY.batch_episodes={self.batch_episodes}: the coefficient could turn negative. "
                "Use at least ten times the batch"
            )
        return self


class PpoConfig(PolicyConfig):
    """All keys of the PPO stage. Sources of the details: docs/algorithms/ppo.md."""

    prompts: Annotated[PromptSource | None, Rows("ppo")]
    """The prompts that PPO answers and learns from: a source, or `sft.data` or `reward.pairs` for the prompts
    of those rows. `auto` uses the demo's; if some data is yours, the prompts of sft.data, else those of
    reward.pairs."""
    critic: CriticConfig
    ptx: PtxConfig
    advantage: Annotated[str, Function("gae")]
    """The advantage estimator. gae: generalized advantage estimation, with gamma and lam. Or your own,
    `python:MODULE:FUNCTION`."""
    policy_loss: Annotated[str, Function("clip")]
    """The policy's loss on a micro-batch. clip: the clipped objective, with each token's probability ratio.
    Or your own, `python:MODULE:FUNCTION`."""
    gamma: float = Field(gt=0, le=1)
    """Discount per token; 1 if the length should not matter."""
    lam: float = Field(ge=0, le=1)
    """Lambda of GAE: 0 relies on the critic only, 1 on the sampled rewards only."""
    value_clip: PositiveFloat | None
    """Distance of a value from the rollout's value beyond which it gets no gradient to move further away, in
    units of the normalised reward; null for no limit."""

    @property
    def warmup_steps(self) -> int:
        """First steps, in which only the critic learns."""
        return self.critic.warmup_steps

    @property
    def mixed_role(self) -> Literal["sft", "ptx"]:
        """The role whose rows the pretraining mix draws."""
        return "sft" if self.ptx.data is None else "ptx"

    @property
    def critic_on_reward(self) -> bool:
        """Whether the critic starts from the reward model, as far as the config decides it."""
        fits = not self.scores_by_rule and self.score.normalize != "running"
        return self.critic.init == "reward" or (self.critic.init == "auto" and fits)

    @model_validator(mode="after")
    def _critic(self) -> Self:
        if self.critic.warmup_steps >= self.steps:
            raise ValueError(
                f"KEY.critic.warmup_steps={self.critic.warmup_steps} leaves none of KEY.steps={self.steps} "
                "in which the policy learns. Lower it"
            )
        if self.critic.init == "reward" and self.score.normalize == "running":
            raise ValueError(
                "KEY.critic.init=reward: such a critic needs scores in fixed units. "
                "Use KEY.score.normalize=sft, or KEY.critic.init=sft"
            )
        if self.critic.init == "reward" and self.scores_by_rule:
            raise ValueError(
                f"KEY.critic.init=reward: {self.reward} is no model to start from{CRITIC_START_HINT}. "
                "Use KEY.critic.init=sft"
            )
        return self
