"""The tensors of an episode. Dimensions: B episodes, R response tokens (prompt excluded)."""

from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor


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


def length_mask(length_B: Tensor) -> Tensor:
    """Bool [B, R]: row b is true on its first length_B[b] tokens; R is the longest length."""
    longest = int(length_B.max()) if len(length_B) else 0
    return torch.arange(longest, device=length_B.device) < length_B[:, None]


def is_right_padded(mask_BR: Tensor) -> bool:
    """Whether every row is a run of true followed by a run of false, either of which may be empty."""
    return not bool((mask_BR[:, 1:] & ~mask_BR[:, :-1]).any())
