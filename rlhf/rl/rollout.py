"""The tensors of an episode: as sampled (`Rollout`), and with what the models say of it (`Experience`).

Dimensions: B episodes, R response tokens (prompt excluded).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rlhf.rl.advantage import (
    OverlongPenalty,
    ScoreNormalizer,
    generalized_advantage,
    masked_moments,
    missing_stop,
    token_rewards,
    whiten,
)


@dataclass(frozen=True, eq=False)
class Responses:
    """Prompts and a response to each, sampled or given, not padded."""

    prompt_ids: list[Tensor]
    """Each long [prompt length]."""
    response_ids: list[Tensor]
    """Each long [response length >= 1]."""

    def __post_init__(self) -> None:
        assert len(self.prompt_ids) == len(self.response_ids)
        assert all(len(ids) > 0 for ids in self.response_ids), "every response has at least one token"

    def __len__(self) -> int:
        return len(self.response_ids)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt with its response."""
        return [len(p) + len(r) for p, r in zip(self.prompt_ids, self.response_ids, strict=True)]

    @property
    def response_lengths(self) -> Tensor:
        """Long [B], tokens; a stop token counts."""
        return torch.tensor([len(ids) for ids in self.response_ids], dtype=torch.long)

    @property
    def mask_BR(self) -> Tensor:
        """Bool, right-padded to the longest response; true on every response token, a stop token included.

        From the lengths, never from token ids: the padding id and the stop id may be the same.
        """
        return length_mask(self.response_lengths)


@dataclass(frozen=True, eq=False)
class Rollout(Responses):
    """What the policy answered, one entry per episode. A sampled stop token is the response's last."""

    stopped: Tensor
    """Bool [B]: the response ended with a stop token, not at the length limit."""
    sampled_logp: list[Tensor] | None = None
    """Each fp32 [response length], nats, as the generation engine reports them; None if it does not."""

    def __post_init__(self) -> None:
        super().__post_init__()
        assert len(self.stopped) == len(self)
        if self.sampled_logp is not None:
            assert [len(logp) for logp in self.sampled_logp] == [len(ids) for ids in self.response_ids]

    def select(self, indices: Tensor) -> Rollout:
        """The episodes at `indices` (long [any number]), in that order."""
        chosen: list[int] = indices.tolist()
        return Rollout(
            prompt_ids=[self.prompt_ids[i] for i in chosen],
            response_ids=[self.response_ids[i] for i in chosen],
            stopped=self.stopped[indices],
            sampled_logp=None if self.sampled_logp is None else [self.sampled_logp[i] for i in chosen],
        )

    @staticmethod
    def concatenate(rollouts: list[Rollout]) -> Rollout:
        """All episodes, in order. Either every rollout or none has the engine's log-probabilities."""
        sampled_logps = [rollout.sampled_logp for rollout in rollouts if rollout.sampled_logp is not None]
        return Rollout(
            prompt_ids=list(chain.from_iterable(rollout.prompt_ids for rollout in rollouts)),
            response_ids=list(chain.from_iterable(rollout.response_ids for rollout in rollouts)),
            stopped=torch.cat([rollout.stopped for rollout in rollouts]),
            sampled_logp=list(chain.from_iterable(sampled_logps)) if sampled_logps else None,
        )


def length_mask(length_B: Tensor) -> Tensor:
    """Bool [B, R]: row b is true on its first length_B[b] tokens; R is the longest length."""
    longest = int(length_B.max()) if len(length_B) else 0
    return torch.arange(longest, device=length_B.device) < length_B[:, None]


@dataclass(frozen=True)
class RewardRule:
    """How a score and the KL penalty become a reward per token."""

    normalizer: ScoreNormalizer
    kl_coef: float
    """Normalised reward per nat."""
    missing_stop_score: float | None
    """Normalised score that replaces the score of a response cut by the length limit; None keeps it."""
    missing_stop_penalty: float
    """Subtracted from such a response's normalised score; unused with a replacement."""
    overlong: OverlongPenalty | None = None
    """What long responses lose."""
    kl_estimator: Literal["k1", "k3"] = "k1"


class Values(NamedTuple):
    """What a critic adds to an experience."""

    value_BR: Tensor
    """Units of the normalised reward, from the critic at the rollout: V(prompt + y_<t)."""
    return_BR: Tensor
    """Units of the normalised reward; the critic's target, not whitened."""


class Advantages(NamedTuple):
    """What an estimator makes of rewards."""

    advantage_BR: Tensor
    """0 on padding."""
    values: Values | None
    """None without a critic."""


def critic_advantages(
    reward_BR: Tensor, mask_BR: Tensor, value_BR: Tensor, *, gamma: float, lam: float
) -> Advantages:
    """`generalized_advantage`, whitened over the whole rollout, and the critic's targets."""
    advantage_BR, return_BR = generalized_advantage(reward_BR, value_BR, mask_BR, gamma=gamma, lam=lam)
    whitened_BR = whiten(advantage_BR, mask_BR, masked_moments(advantage_BR, mask_BR))
    return Advantages(whitened_BR, Values(value_BR, return_BR))


def make_experience(
    rollout: Rollout,
    *,
    logp_BR: Tensor,
    reference_logp_BR: Tensor,
    score_B: Tensor,
    rule: RewardRule,
    advantages: Callable[[Tensor, Tensor], Advantages],
) -> Experience:
    """Rewards and advantages.

    From an episode without a score nothing is learned: its reward and advantages are 0, and its returns are
    the values that the critic gave it. Moments leave it out.

    Args:
        rollout: all episodes, of all ranks: moments of a part would make the result depend on their number.
        logp_BR: nats, under the sampling policy, from the training kernels.
        reference_logp_BR: nats, under the frozen reference.
        score_B: raw score units; NaN for no score.
        advantages: the estimator, of reward_BR (units of the normalised reward) and a mask that is true on
            the tokens of episodes with a score. Outside of it advantages are 0.
    """
    mask_BR = rollout.mask_BR
    scored_BR = mask_BR & ~score_B.isnan()[:, None]
    rule.normalizer.update(masked_moments(score_B, score_B.isfinite()))
    normalized_B = missing_stop(
        rule.normalizer.apply(score_B),
        rollout.stopped,
        replacement=rule.missing_stop_score,
        penalty=rule.missing_stop_penalty,
    )
    if rule.overlong is not None:
        normalized_B = normalized_B + rule.overlong(rollout.response_lengths)
    reward_BR = token_rewards(
        logp_BR, reference_logp_BR, mask_BR, normalized_B, kl_coef=rule.kl_coef,
        kl_estimator=rule.kl_estimator,
    )  # fmt: skip
    reward_BR = torch.where(scored_BR, reward_BR, 0.0)
    advantage_BR, values = advantages(reward_BR, scored_BR)
    if values is not None:
        own_BR = torch.where(mask_BR & ~scored_BR, values.value_BR, values.return_BR)
        values = Values(values.value_BR, own_BR)
    return Experience(
        rollout=rollout,
        score_B=score_B,
        logp_BR=logp_BR,
        reference_logp_BR=reference_logp_BR,
        reward_BR=reward_BR,
        advantage_BR=advantage_BR,
        values=values,
    )


@dataclass(frozen=True, eq=False)
class Experience:
    """A scored rollout. The [B, R] tensors are fp32, on the CPU, right-padded as `mask_BR` says."""

    rollout: Rollout
    score_B: Tensor
    """Raw score units, before normalisation, clipping and the missing-stop rule; for metrics. NaN for no
    score."""
    logp_BR: Tensor
    """Nats, under the policy at the rollout, from the training kernels."""
    reference_logp_BR: Tensor
    """Nats, under the frozen reference."""
    reward_BR: Tensor
    """Units of the normalised reward; KL penalty included."""
    advantage_BR: Tensor
    """Unitless where the estimator divides by a deviation, else in units of the normalised reward."""
    values: Values | None
    """None without a critic."""

    def __post_init__(self) -> None:
        shape = self.mask_BR.shape
        assert self.score_B.shape == shape[:1]
        from_models = (self.logp_BR, self.reference_logp_BR)
        for x_BR in (*from_models, self.reward_BR, self.advantage_BR, *(self.values or ())):
            assert x_BR.shape == shape, f"{tuple(x_BR.shape)} for responses of {tuple(shape)}"

    def __len__(self) -> int:
        return len(self.rollout)

    @property
    def mask_BR(self) -> Tensor:
        """Bool, true on every sampled token. The rollout's, so that the two cannot disagree."""
        return self.rollout.mask_BR

    @property
    def value_BR(self) -> Tensor:
        """The critic's, which there must be."""
        assert self.values is not None
        return self.values.value_BR

    @property
    def return_BR(self) -> Tensor:
        """The critic's target, which there must be."""
        assert self.values is not None
        return self.values.return_BR

    @property
    def scored_BR(self) -> Tensor:
        """Bool, true on the sampled tokens of episodes with a score."""
        return self.mask_BR & ~self.score_B.isnan()[:, None]

    def select(self, indices: Tensor) -> Experience:
        """The episodes at `indices` (long [any number]), in that order; R shrinks to the longest of them."""
        rollout = self.rollout.select(indices)
        longest = int(rollout.response_lengths.max())
        return Experience(
            rollout=rollout,
            score_B=self.score_B[indices],
            logp_BR=self.logp_BR[indices, :longest],
            reference_logp_BR=self.reference_logp_BR[indices, :longest],
            reward_BR=self.reward_BR[indices, :longest],
            advantage_BR=self.advantage_BR[indices, :longest],
            values=self.values and Values(*(x_BR[indices, :longest] for x_BR in self.values)),
        )


def minibatches(
    num_episodes: int, minibatch_size: int, generator: torch.Generator, group_size: int = 1
) -> list[Tensor]:
    """Shuffled episode indices, each long [minibatch_size]: every episode in exactly one minibatch.

    Call it anew for each epoch, so that each is shuffled differently. The last minibatch is smaller when the
    sizes do not divide.

    Args:
        group_size: so many neighbouring episodes stay together; it divides both sizes.
    """
    assert num_episodes > 0 and minibatch_size > 0
    assert num_episodes % group_size == minibatch_size % group_size == 0
    first = torch.randperm(num_episodes // group_size, generator=generator) * group_size
    order = (first[:, None] + torch.arange(group_size)).flatten()
    return [order[start : start + minibatch_size] for start in range(0, num_episodes, minibatch_size)]
