"""The likelihood of reference answers under a policy. Dimensions: B references, R their tokens (padded)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf.data.chat_template import exchange_ids
from rlhf.data.schema import Answer, Message
from rlhf.generation.policy_model import PolicyModel
from rlhf.rl.rollout import Responses


def reference_losses(
    policy: PolicyModel,
    prompts: Sequence[list[Message]],
    references: Sequence[Answer],
    micro_batch_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each reference after its prompt, in nats, fp64 [B]; and its tokens, [B].

    Tokens beyond the context are left out of both. If the prompt fills the context, both are 0.
    """
    nats_B = torch.zeros(len(references), dtype=torch.float64)
    tokens_B = torch.zeros(len(references), dtype=torch.long)
    encoded = [
        exchange_ids(policy.tokenizer, prompt, reference)
        for prompt, reference in zip(prompts, references, strict=True)
    ]
    context = policy.context_length
    rows = [row for row, (_, given) in enumerate(encoded) if given < context]
    if rows:
        in_context = Responses(
            prompt_ids=[torch.tensor(ids[:given]) for ids, given in map(encoded.__getitem__, rows)],
            response_ids=[torch.tensor(ids[given:context]) for ids, given in map(encoded.__getitem__, rows)],
        )
        logp_BR = policy.log_probabilities(in_context, 1.0, micro_batch_tokens)
        nats_B[rows], tokens_B[rows] = -logp_BR.sum(-1, dtype=torch.float64), in_context.response_lengths
    return nats_B, tokens_B
