"""Policy and critic as one module, so that one engine and one optimizer hold both."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.models.policy import Sequences, response_statistics
from rlhf.models.scalar import ScalarModel


class ActorCriticOutput(NamedTuple):
    """Per response token, fp32 [N]; N counts the response tokens of a micro-batch laid end to end."""

    logp_N: Tensor
    """Nats, at the sampling temperature."""
    entropy_N: Tensor
    """Nats; detached."""
    value_N: Tensor
    """Units of the normalised reward: V(prompt + y_<t)."""


class ActorCritic(nn.Module):
    """Evaluates responses; both halves see the same token ids."""

    def __init__(self, policy: PreTrainedModel, critic: ScalarModel) -> None:
        super().__init__()
        self.policy, self.critic = policy, critic

    def forward(self, batch: Sequences, temperature: float) -> ActorCriticOutput:
        """Log-probability, entropy and value of every response token."""
        statistics = response_statistics(self.policy, batch, temperature)
        return ActorCriticOutput(statistics.logp_N, statistics.entropy_N, self.critic.values(batch))
