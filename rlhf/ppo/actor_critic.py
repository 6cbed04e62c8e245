"""Policy and critic as one module, so that one engine and one optimizer hold both."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.models.logprobs import Sequences, TokenStatistics, response_statistics
from rlhf.models.value_head import ScalarModel


class ActorCritic(nn.Module):
    """Evaluates responses; both halves see the same token ids, one after the other."""

    def __init__(self, policy: PreTrainedModel, critic: ScalarModel) -> None:
        super().__init__()
        self.policy, self.critic = policy, critic

    def forward(
        self, half: Literal["policy", "critic"], batch: Sequences, temperature: float = 1.0
    ) -> TokenStatistics | Tensor:
        """One half's opinion of every response token.

        Returns:
            policy: log-probability and entropy in nats, at the sampling temperature.
            critic: V(prompt + y_<t) in units of the normalised reward, fp32 [N] (the response tokens of a
            micro-batch laid end to end).
        """
        if half == "policy":
            return response_statistics(self.policy, batch, temperature)
        return self.critic.values(batch)
