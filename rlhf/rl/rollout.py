"""The tensors of an episode. Dimensions: B episodes, R response tokens (prompt excluded)."""

from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from rlhf.rl.padding import length_mask


@dataclass(frozen=True, eq=False)
class Rollout:
    """Prompts and what the policy answered, one entry an episode, not padded."""

    prompt_ids: list[Tensor]
    """Each long [prompt length]."""
    response_ids: list[Tensor]
    """Each long [response length >= 1], up to and including the stop token when one was sampled."""
    stopped: Tensor
    """Bool [B]: whether the answer ended by itself, instead of by the length limit."""
    sampled_logp: list[Tensor] | None = None
    """Each fp32 [response length], nats, as the generation engine reports them; None when it does not."""

    def __post_init__(self) -> None:
        assert len(self.prompt_ids) == len(self.response_ids) == len(self.stopped)
        assert all(len(ids) > 0 for ids in self.response_ids), "every episode has at least one sampled token"
        if self.sampled_logp is not None:
            assert [len(logp) for logp in self.sampled_logp] == [len(ids) for ids in self.response_ids]

    def __len__(self) -> int:
        return len(self.response_ids)

    @property
    def response_lengths(self) -> Tensor:
        """Long [B], tokens; the stop token counts."""
        return torch.tensor([len(ids) for ids in self.response_ids], dtype=torch.long)

    @property
    def mask_BR(self) -> Tensor:
        """Bool, right-padded to the longest response; true on every sampled token, the stop token included.

        From the lengths, never from token ids: the padding id and the stop id may be the same.
        """
        return length_mask(self.response_lengths)

    def select(self, indices: Tensor) -> "Rollout":
        """The episodes at `indices` (long [any number]), in that order."""
        chosen: list[int] = indices.tolist()
        return Rollout(
            prompt_ids=[self.prompt_ids[i] for i in chosen],
            response_ids=[self.response_ids[i] for i in chosen],
            stopped=self.stopped[indices],
            sampled_logp=None if self.sampled_logp is None else [self.sampled_logp[i] for i in chosen],
        )

    @staticmethod
    def concatenate(rollouts: "list[Rollout]") -> "Rollout":
        """All episodes, in order. Either every rollout or none has the engine's log-probabilities."""
        sampled_logps = [rollout.sampled_logp for rollout in rollouts if rollout.sampled_logp is not None]
        return Rollout(
            prompt_ids=list(chain.from_iterable(rollout.prompt_ids for rollout in rollouts)),
            response_ids=list(chain.from_iterable(rollout.response_ids for rollout in rollouts)),
            stopped=torch.cat([rollout.stopped for rollout in rollouts]),
            sampled_logp=list(chain.from_iterable(sampled_logps)) if sampled_logps else None,
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

    def select(self, indices: Tensor) -> "Experience":
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
