"""The tensors of an episode: as sampled (`Rollout`), and with what the models say of it (`Experience`).

Dimensions: B episodes, R response tokens (prompt excluded).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from rlhf.rl.advantage import (
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


def make_experience(
    rollout: Rollout,
    *,
    logp_BR: Tensor,
    reference_logp_BR: Tensor,
    value_BR: Tensor,
    score_B: Tensor,
    rule: RewardRule,
    gamma: float,
    lam: float,
) -> Experience:
    """Rewards, advantages (whitened over the whole rollout) and returns.

    Args:
        rollout: all episodes, of all ranks: moments of a part would make the result depend on their number.
        logp_BR: nats, under the sampling policy, from the training kernels.
        reference_logp_BR: nats, under the frozen reference.
        value_BR: units of the normalised reward.
        score_B: raw score units; finite.
    """
    mask_BR = rollout.mask_BR
    rule.normalizer.update(masked_moments(score_B, score_B.isfinite()))
    normalized_B = missing_stop(
        rule.normalizer.apply(score_B),
        rollout.stopped,
        replacement=rule.missing_stop_score,
        penalty=rule.missing_stop_penalty,
    )
    reward_BR = token_rewards(logp_BR, reference_logp_BR, mask_BR, normalized_B, kl_coef=rule.kl_coef)
    advantage_BR, return_BR = generalized_advantage(reward_BR, value_BR, mask_BR, gamma=gamma, lam=lam)
    whitened_BR = whiten(advantage_BR, mask_BR, masked_moments(advantage_BR, mask_BR))
    return Experience(
        rollout=rollout,
        score_B=score_B,
        logp_BR=logp_BR,
        reference_logp_BR=reference_logp_BR,
        value_BR=value_BR,
        reward_BR=reward_BR,
        advantage_BR=whitened_BR,
        return_BR=return_BR,
    )


@dataclass(frozen=True, eq=False)
class Experience:
    """A scored rollout. The [B, R] tensors are fp32, on the CPU, right-padded as `mask_BR` says."""

    rollout: Rollout
    score_B: Tensor
    """Raw score units, before normalisation, clipping and the missing-stop rule; for metrics."""
    logp_BR: Tensor
    """Nats, under the policy at the rollout, from the training kernels."""
    reference_logp_BR: Tensor
    """Nats, under the frozen reference."""
    value_BR: Tensor
    """Units of the normalised reward, from the critic at the rollout: V(prompt + y_<t)."""
    reward_BR: Tensor
    """Units of the normalised reward; KL penalty included."""
    advantage_BR: Tensor
    """Whitened, so unitless."""
    return_BR: Tensor
    """Units of the normalised reward; the critic's target, not whitened."""

    def __post_init__(self) -> None:
        shape = self.mask_BR.shape
        assert self.score_B.shape == shape[:1]
        from_models = (self.logp_BR, self.reference_logp_BR, self.value_BR)
        for x_BR in (*from_models, self.reward_BR, self.advantage_BR, self.return_BR):
            assert x_BR.shape == shape, f"{tuple(x_BR.shape)} for responses of {tuple(shape)}"

    def __len__(self) -> int:
        return len(self.rollout)

    @property
    def mask_BR(self) -> Tensor:
        """Bool, true on every sampled token. The rollout's, so that the two cannot disagree."""
        return self.rollout.mask_BR

    def select(self, indices: Tensor) -> Experience:
        """The episodes at `indices` (long [any number]), in that order; R shrinks to the longest of them."""
        rollout = self.rollout.select(indices)
        longest = int(rollout.response_lengths.max())
        return Experience(
            rollout=rollout,
            score_B=self.score_B[indices],
            logp_BR=self.logp_BR[indices, :longest],
            reference_logp_BR=self.reference_logp_BR[indices, :longest],
            value_BR=self.value_BR[indices, :longest],
            reward_BR=self.reward_BR[indices, :longest],
            advantage_BR=self.advantage_BR[indices, :longest],
            return_BR=self.return_BR[indices, :longest],
        )


def minibatches(num_episodes: int, minibatch_size: int, generator: torch.Generator) -> list[Tensor]:
    """Shuffled episode indices, each long [minibatch_size]: every episode in exactly one minibatch.

    Call it anew for each epoch, so that each is shuffled differently. The last minibatch is smaller when the
    sizes do not divide.
    """
    assert num_episodes > 0 and minibatch_size > 0
    order = torch.randperm(num_episodes, generator=generator)
    return [order[start : start + minibatch_size] for start in range(0, num_episodes, minibatch_size)]
