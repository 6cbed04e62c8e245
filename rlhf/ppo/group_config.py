"""The keys of policy gradients without a critic. Values: conf/stages/grpo.yaml."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from rlhf.config import Strict
from rlhf.pipeline.fields import Function
from rlhf.ppo.config import KlConfig, PolicyConfig


class GroupKlConfig(KlConfig):
    """`grpo.kl.*`: the penalty for leaving the model that the policy starts from."""

    place: Literal["reward", "loss"]
    """Where the penalty is applied: in each token's reward (as in PPO), or as a term of the loss."""
    estimator: Literal["k1", "k3"]
    """k1 is the log-ratio of policy and reference; k3 is never below 0 and has less variance (Schulman 2020).
    In the loss only k3 is possible."""

    @model_validator(mode="after")
    def _has_gradient(self) -> Self:
        if self.place == "loss" and self.estimator == "k1":
            raise ValueError(
                "KEY.estimator=k1 does nothing with KEY.place=loss: its gradient is 0 on average. "
                "Use KEY.estimator=k3, or KEY.place=reward"
            )
        return self


class OverlongConfig(Strict):
    """`grpo.overlong.*`: a penalty for responses near the length limit (DAPO, Yu et al. 2025, eq. 13)."""

    buffer: PositiveInt | None
    """Tokens before `max_new_tokens` over which the penalty grows from 0; null for no penalty."""
    penalty: NonNegativeFloat
    """The penalty at the limit, subtracted from the normalised score."""


class GrpoConfig(PolicyConfig):
    """All keys of the GRPO stage. Sources of the details: docs/algorithms/grpo.md."""

    kl: GroupKlConfig
    advantage: Annotated[str, Function("grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline")]
    """The advantage estimator: what a reward is compared with. grpo: the group's mean, in standard deviations
    of the group. rloo: the mean of the group's other answers. reinforce_plus_plus: all tokens of the batch,
    in their standard deviations; _baseline subtracts the group's mean first. Or your own,
    `python:MODULE:FUNCTION`."""
    policy_loss: Annotated[str, Function("clip", "gspo")]
    """The policy's loss on a micro-batch. clip: PPO's clipped objective, with each token's probability ratio.
    gspo: the same with one ratio of the whole answer (with loss_mean=sequence and a much smaller clip, such
    as 3e-4). Or your own, `python:MODULE:FUNCTION`."""
    samples_per_prompt: PositiveInt
    """Answers to each prompt, a group. `batch_episodes` and `minibatch_episodes` count answers, and are
    multiples of it."""
    divide_by_deviation: bool
    """For advantage=grpo: divide by the group's deviation. false is Dr. GRPO's (with loss_mean=constant)."""
    loss_mean: Literal["token", "sequence", "constant"]
    """token: the mean over all tokens (DAPO). sequence: the mean over answers of the mean over their tokens
    (GRPO's paper). constant: the sum over tokens, divided by answers x max_new_tokens (Dr. GRPO)."""
    overlong: OverlongConfig
    max_resamples: NonNegativeInt
    """Most times per step that groups with equal scores, which teach nothing, are replaced by answers to
    other prompts (DAPO's dynamic sampling). 0 replaces none."""

    @property
    def group_size(self) -> int:
        """Episodes that answer the same prompt."""
        return self.samples_per_prompt

    @property
    def resamples(self) -> int:
        """Most times per step that groups with equal scores are replaced."""
        return self.max_resamples

    @model_validator(mode="after")
    def _groups(self) -> Self:
        size = self.samples_per_prompt
        for name in ("batch_episodes", "minibatch_episodes"):
            episodes = getattr(self, name)
            if episodes % size:
                near = max(1, episodes // size) * size
                raise ValueError(
                    f"KEY.{name}={episodes} is no multiple of KEY.samples_per_prompt={size}: it counts "
                    f"answers, and a group stays together. Use {near} or {near + size}"
                )
        if size == 1 and self.advantage in ("grpo", "rloo", "reinforce_plus_plus_baseline"):
            raise ValueError(
                f"KEY.samples_per_prompt=1: KEY.advantage={self.advantage} compares the answers to a prompt, "
                "so it needs two of them. Raise it, or use KEY.advantage=reinforce_plus_plus"
            )
        if size == 1 and self.max_resamples > 0:
            raise ValueError(
                "KEY.samples_per_prompt=1: a single answer's score is always equal to itself, so "
                f"KEY.max_resamples={self.max_resamples} would replace every group. Use KEY.max_resamples=0"
            )
        return self

    @model_validator(mode="after")
    def _losses(self) -> Self:
        if self.policy_loss != "gspo":
            return self
        if self.loss_mean != "sequence":
            raise ValueError(
                f"KEY.policy_loss=gspo has one ratio a response, so its loss is a mean over responses, not "
                f"KEY.loss_mean={self.loss_mean}. Use KEY.loss_mean=sequence, or KEY.policy_loss=clip"
            )
        if self.advantage == "reinforce_plus_plus" and self.kl.place == "reward":
            raise ValueError(
                "KEY.policy_loss=gspo clips a response as a whole, but with "
                "KEY.advantage=reinforce_plus_plus and KEY.kl.place=reward each token has an advantage of "
                "its own. Use KEY.kl.place=loss, or KEY.policy_loss=clip"
            )
        return self

    @model_validator(mode="after")
    def _long_answers(self) -> Self:
        if self.overlong.buffer is None:
            return self
        if self.overlong.buffer > self.max_new_tokens:
            raise ValueError(
                f"KEY.overlong.buffer={self.overlong.buffer} is more than "
                f"KEY.max_new_tokens={self.max_new_tokens}: every response would lose something. Lower it"
            )
        if self.score.missing_stop is not None or self.score.missing_stop_penalty > 0:
            raise ValueError(
                "KEY.overlong.buffer beside KEY.score.missing_stop or KEY.score.missing_stop_penalty: a "
                "response that is cut would be punished twice. Use KEY.overlong.buffer=null, or "
                "KEY.score.missing_stop=null KEY.score.missing_stop_penalty=0"
            )
        return self
