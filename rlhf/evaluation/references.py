"""How likely a policy finds answers that people wrote."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhf.data.chat import exchange_ids
from rlhf.data.schema import Message
from rlhf.generation.policy import Policy
from rlhf.rl.rollout import Rollout


def answer_loss(
    policy: Policy, asked: Sequence[list[Message]], references: Sequence[str], micro_batch_tokens: int
) -> float:
    """Mean negative log-likelihood of the references behind the prompts, in nats a token; all count alike."""
    encoded = [
        exchange_ids(policy.tokenizer, prompt, reference)
        for prompt, reference in zip(asked, references, strict=True)
    ]
    as_rollout = Rollout(
        prompt_ids=[torch.tensor(ids[:given]) for ids, given in encoded],
        response_ids=[torch.tensor(ids[given:]) for ids, given in encoded],
        stopped=torch.ones(len(encoded), dtype=torch.bool),
    )
    logp_BR = policy.log_probabilities(as_rollout, 1.0, micro_batch_tokens)
    return -float(logp_BR.sum(dtype=torch.float64)) / int(as_rollout.response_lengths.sum())
