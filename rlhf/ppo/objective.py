"""The objective of a policy gradient: from a rollout to advantages and losses.

`advantage` and `policy_loss` of a stage are names in the tables here, or `python:MODULE:FUNCTION` for a
function of the user's. The estimators are in rlhf/rl, the losses in rlhf/losses.
Dimensions: B episodes, R response tokens (padded).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from rlhf.config import STAGE
from rlhf.losses.policy import (
    PolicyLoss,
    clipped_policy_loss,
    kl_loss,
    loss_weights,
)
from rlhf.losses.value import clipped_value_loss
from rlhf.ppo.config import PolicyConfig, PpoConfig
from rlhf.ppo.group_config import GrpoConfig
from rlhf.ppo.own_functions import OwnEstimator, OwnLoss
from rlhf.rl.advantage import AdaptiveKL, FixedKL, OverlongPenalty, ScoreNormalizer
from rlhf.rl.group import (
    batch_advantage,
    group_advantage,
    group_spread,
    leave_one_out_advantage,
    neighbours,
)
from rlhf.rl.rollout import Advantages, Experience, RewardRule, Rollout, critic_advantages, make_experience


class Rewarded(NamedTuple):
    """The input of an advantage estimator: the episodes of all ranks."""

    reward_BR: Tensor
    """Units of the normalised score, the KL penalty included; 0 on padding."""
    mask_BR: Tensor
    """bool, right-padded, true on the sampled tokens of episodes with a score."""
    group_size: int
    """Episodes per prompt; they are neighbours."""
    value_BR: Tensor | None
    """The critic's, in units of the reward; None without a critic."""

    @property
    def group_B(self) -> Tensor:
        """long; episodes with the same number answer the same prompt."""
        return neighbours(len(self.reward_BR), self.group_size)


class Estimator(Protocol):
    """Computes advantages from rewards."""

    def __call__(self, rewarded: Rewarded, config: Any, /) -> Tensor | Advantages:
        """
        Args:
            config: the stage's keys, such as `config.gamma`.

        Returns:
            advantage_BR; values outside the mask are ignored. With a critic: `Advantages` with its targets.
        """


class Loss(Protocol):
    """A policy's loss on a micro-batch."""

    def __call__(
        self, logp_BR: Tensor, sampled_logp_BR: Tensor, advantage_BR: Tensor, mask_BR: Tensor, /, *,
        total_tokens: int, weight_B: Tensor | None, config: Any,
    ) -> Tensor | PolicyLoss:  # fmt: skip
        """See `rlhf.losses.policy.clipped_policy_loss`.

        Args:
            config: the stage's keys, such as `config.clip`.

        Returns:
            A scalar that carries the gradient, a sum over tokens / total_tokens; or that with its figures.
        """


def gae(rewarded: Rewarded, config: PpoConfig) -> Advantages:
    """Generalized advantage estimation, whitened."""
    assert rewarded.value_BR is not None
    return critic_advantages(
        rewarded.reward_BR, rewarded.mask_BR, rewarded.value_BR, gamma=config.gamma, lam=config.lam
    )


def grpo(rewarded: Rewarded, config: GrpoConfig) -> Tensor:
    """Distance from the group's mean, in standard deviations of the group."""
    return group_advantage(
        rewarded.reward_BR, rewarded.mask_BR, rewarded.group_B, divide_by_deviation=config.divide_by_deviation
    )


def rloo(rewarded: Rewarded, config: GrpoConfig) -> Tensor:
    """Distance from the mean of the other answers of the group."""
    return leave_one_out_advantage(rewarded.reward_BR, rewarded.mask_BR, rewarded.group_B)


def reinforce_plus_plus(rewarded: Rewarded, config: GrpoConfig) -> Tensor:
    """The sum of rewards from each token on, whitened over all tokens of the batch."""
    return batch_advantage(rewarded.reward_BR, rewarded.mask_BR, None)


def reinforce_plus_plus_baseline(rewarded: Rewarded, config: GrpoConfig) -> Tensor:
    """The same sums minus the group's mean, whitened over all tokens of the batch."""
    return batch_advantage(rewarded.reward_BR, rewarded.mask_BR, rewarded.group_B)


def clipped(
    logp_BR: Tensor, sampled_logp_BR: Tensor, advantage_BR: Tensor, mask_BR: Tensor, *,
    total_tokens: int, weight_B: Tensor | None, config: PolicyConfig, ratio: Literal["token", "sequence"],
) -> PolicyLoss:  # fmt: skip
    """PPO's clipped loss with the stage's bounds."""
    return clipped_policy_loss(
        logp_BR, sampled_logp_BR, advantage_BR, mask_BR, clip=config.clip, clip_high=config.clip_high,
        dual_clip=config.dual_clip, total_tokens=total_tokens, weight_B=weight_B, ratio=ratio,
    )  # fmt: skip


ADVANTAGES: Mapping[str, Estimator] = {
    "gae": gae, "grpo": grpo, "rloo": rloo, "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
}  # fmt: skip
POLICY_LOSSES: Mapping[str, Loss] = {
    "clip": partial(clipped, ratio="token"), "gspo": partial(clipped, ratio="sequence"),
}  # fmt: skip


class Scored(NamedTuple):
    """The models' outputs for a rollout: fp32 [B, R], on the CPU."""

    logp_BR: Tensor
    """Nats, under the policy."""
    reference_logp_BR: Tensor
    """Nats, under the reference."""
    value_BR: Tensor | None
    """The critic's, in units of the normalised score; None without a critic."""


class Objective(ABC):
    """What differs between policy gradient algorithms: advantages, losses and their metrics."""

    has_critic: ClassVar[bool]
    figures: tuple[str, ...] = ()
    """Names of sums that it adds to each update's figures."""

    def __init__(self, config: PolicyConfig) -> None:
        """Raises:
        ConfigError: a function of the user's cannot be imported.
        """
        self._config = config
        self._advantage = ADVANTAGES.get(config.advantage) or OwnEstimator(
            config.advantage, has_critic=self.has_critic
        )
        self.loss = POLICY_LOSSES.get(config.policy_loss) or OwnLoss(config.policy_loss)
        self.kl = (
            AdaptiveKL(config.kl.coef, config.kl.target, config.kl.horizon)
            if config.kl.controller == "adaptive"
            else FixedKL(config.kl.coef)
        )

    def rule(self, normalizer: ScoreNormalizer) -> RewardRule:
        """The rule from scores to rewards."""
        score = self._config.score
        return RewardRule(normalizer, self.kl.coef, score.missing_stop, score.missing_stop_penalty)

    def experience(
        self, rollout: Rollout, score_B: Tensor, scored: Scored, normalizer: ScoreNormalizer
    ) -> Experience:
        """Rewards and advantages.

        Args:
            score_B: raw score units; NaN for no score.
        """

        return make_experience(
            rollout, logp_BR=scored.logp_BR, reference_logp_BR=scored.reference_logp_BR, score_B=score_B,
            rule=self.rule(normalizer), advantages=partial(self.advantages, value_BR=scored.value_BR),
        )  # fmt: skip

    def advantages(self, reward_BR: Tensor, mask_BR: Tensor, *, value_BR: Tensor | None) -> Advantages:
        """Advantages of rewards by the estimator of `STAGE.advantage`: see `make_experience`."""
        rewarded = Rewarded(reward_BR, mask_BR, self._config.group_size, value_BR)
        found = self._advantage(rewarded, self._config)
        return found if isinstance(found, Advantages) else Advantages(found, None)

    def try_functions(self, device: torch.device) -> None:
        """Call the user's own functions before anything trains, as a step would, on answers to two made-up
        prompts.

        Args:
            device: where losses are computed.

        Raises:
            ConfigError: a function raises, or returns something unusable.
        """
        if not (isinstance(self._advantage, OwnEstimator) or isinstance(self.loss, OwnLoss)):
            return
        size = 2 * self._config.group_size
        ids = [torch.arange(1 + place % 3) for place in range(size)]  # lengths differ: some is padding
        rollout = Rollout([torch.arange(2)] * size, ids, torch.ones(size, dtype=torch.bool))
        ones_BR = torch.ones(rollout.mask_BR.shape)
        scored = Scored(-ones_BR, -ones_BR, ones_BR if self.has_critic else None)
        normalizer = ScoreNormalizer.fixed(0.0, 1.0, None)
        experience = self.experience(rollout, torch.arange(float(size)), scored, normalizer)
        logp_BR = (-ones_BR).to(device).requires_grad_()
        tokens = int(rollout.mask_BR.sum())
        found, _ = self.policy_loss(logp_BR, experience, total_tokens=tokens, num_episodes=size)
        if isinstance(self.loss, OwnLoss) and not bool(found.loss.isfinite()):
            raise self.loss.error(f"returned {found.loss.item()} for made-up answers.")

    def rollout_metrics(self, experience: Experience) -> dict[str, float]:
        """Metrics of a scored rollout that only this algorithm has."""
        return {}

    @abstractmethod
    def policy_loss(
        self, logp_BR: Tensor, part: Experience, *, total_tokens: int, num_episodes: int
    ) -> tuple[PolicyLoss, Mapping[str, Tensor]]:
        """The policy's loss on a micro-batch, on logp_BR's device.

        Args:
            logp_BR: nats, of the policy that trains; carries the gradient.
            total_tokens: response tokens of the whole optimizer step, over all ranks.
            num_episodes: of the whole optimizer step, over all ranks.

        Returns:
            The loss; and the policy's part of `figures`, as sums over tokens.
        """

    def critic_loss(
        self, value_BR: Tensor, part: Experience, *, total_tokens: int
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The critic's loss on a micro-batch, and its part of `figures`. Called only with a critic."""
        raise NotImplementedError

    def token_loss(
        self, logp_BR: Tensor, part: Experience, mask_BR: Tensor, total_tokens: int, weight_B: Tensor | None
    ) -> PolicyLoss:
        """The loss of a micro-batch by `STAGE.policy_loss`. Arguments: see `clipped_policy_loss`."""
        device = logp_BR.device
        found = self.loss(
            logp_BR, part.logp_BR.to(device), part.advantage_BR.to(device), mask_BR,
            total_tokens=total_tokens, weight_B=weight_B, config=self._config,
        )  # fmt: skip
        assert isinstance(found, PolicyLoss)
        return found


class PpoObjective(Objective):
    """PPO: advantages from a critic, the clipped policy loss, the critic's squared error."""

    has_critic: ClassVar[bool] = True
    figures = ("value_loss", "value_clip_fraction")

    def __init__(self, config: PpoConfig) -> None:
        super().__init__(config)
        self.config = config

    def policy_loss(
        self, logp_BR: Tensor, part: Experience, *, total_tokens: int, num_episodes: int
    ) -> tuple[PolicyLoss, Mapping[str, Tensor]]:
        """The policy loss, as a mean over tokens."""
        mask_BR = part.mask_BR.to(logp_BR.device)
        return self.token_loss(logp_BR, part, mask_BR, total_tokens, None), {}

    def critic_loss(
        self, value_BR: Tensor, part: Experience, *, total_tokens: int
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """See rlhf/losses/value.py."""
        device = value_BR.device
        found = clipped_value_loss(
            value_BR, part.value_BR.to(device), part.return_BR.to(device), part.mask_BR.to(device),
            clip=self.config.value_clip, total_tokens=total_tokens,
        )  # fmt: skip
        figures = {
            "value_loss": found.loss.detach() * total_tokens, "value_clip_fraction": found.clipped,
        }  # fmt: skip
        return found.loss, figures


class GroupObjective(Objective):
    """GRPO and its relatives: advantages from the answers to the same prompt, which are neighbours."""

    has_critic = False

    def __init__(self, config: GrpoConfig) -> None:
        super().__init__(config)
        self.config = config
        self.kl_in_loss = config.kl.place == "loss"
        self.figures = ("kl_loss",) if self.kl_in_loss else ()

    def rule(self, normalizer: ScoreNormalizer) -> RewardRule:
        """The rule, with a penalty for long answers, and without the KL if the loss has it."""
        config, overlong = self.config, None
        if config.overlong.buffer is not None:
            longest = config.max_new_tokens
            overlong = OverlongPenalty(longest, config.overlong.buffer, config.overlong.penalty)
        rule = replace(super().rule(normalizer), overlong=overlong, kl_estimator=config.kl.estimator)
        return replace(rule, kl_coef=0.0) if self.kl_in_loss else rule

    def rollout_metrics(self, experience: Experience) -> dict[str, float]:
        """Spread of the raw scores within groups: a group without spread teaches nothing."""
        if self.config.samples_per_prompt == 1:
            return {}
        size, score_B = self.config.samples_per_prompt, experience.score_B.double()
        spread_B = group_spread(score_B, neighbours(len(score_B), size))
        scores = [score_n[~score_n.isnan()] for score_n in score_B.view(-1, size)]
        deviations = [float(each.std()) for each in scores if len(each) > 1]
        return {
            "groups_without_spread": float((spread_B == 0.0).double().mean()),
            "group_deviation": sum(deviations) / max(1, len(deviations)),
        }

    def policy_loss(
        self, logp_BR: Tensor, part: Experience, *, total_tokens: int, num_episodes: int
    ) -> tuple[PolicyLoss, Mapping[str, Tensor]]:
        """The policy loss, plus the KL to the reference with `kl.place=loss`."""
        device, mask_BR = logp_BR.device, part.mask_BR.to(logp_BR.device)
        weight_B = self.weights(mask_BR, total_tokens, num_episodes)
        found = self.token_loss(logp_BR, part, mask_BR, total_tokens, weight_B)
        if not self.kl_in_loss:
            return found, {}
        scored_BR = mask_BR & ~part.score_B.isnan().to(device)[:, None]  # no score, nothing to learn
        reference_BR = part.reference_logp_BR.to(device)
        kl = kl_loss(logp_BR, reference_BR, scored_BR, total_tokens=total_tokens, weight_B=weight_B)
        return found._replace(loss=found.loss + self.kl.coef * kl), {"kl_loss": kl.detach() * total_tokens}

    def weights(self, mask_BR: Tensor, total_tokens: int, num_episodes: int) -> Tensor | None:
        """Factor of each sequence's loss for `grpo.loss_mean`."""
        return loss_weights(
            mask_BR.sum(1), self.config.loss_mean, total_tokens=total_tokens, num_episodes=num_episodes,
            longest=self.config.max_new_tokens,
        )  # fmt: skip

    def try_functions(self, device: torch.device) -> None:
        """Also checks that a loss of the user's own uses `weight_B`."""
        super().try_functions(device)
        if not isinstance(self.loss, OwnLoss) or self.config.loss_mean == "token":
            return
        ones_BR = torch.ones(2, 3, device=device)
        found = [
            self.loss(
                (-ones_BR).requires_grad_(), -ones_BR, ones_BR, ones_BR > 0, total_tokens=6,
                weight_B=torch.tensor([1.0, weight], device=device), config=self.config,
            ).loss
            for weight in (1.0, 2.0)
        ]  # fmt: skip
        if torch.equal(*found):
            raise self.loss.error(
                f"returns the same loss whatever weight_B is, so loss_mean={self.config.loss_mean} would do "
                "nothing.",
                f"Multiply each token's loss by weight_B[:, None], or use {STAGE}.loss_mean=token.",
            )
