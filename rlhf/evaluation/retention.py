"""What a policy still knows: perplexity of plain sentences, and multiple-choice questions.

Dimensions: B continuations, R continuation tokens (padded).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf.data.chat import continuation_ids
from rlhf.data.schema import QuestionRow, TextRow
from rlhf.generation.policy import Policy
from rlhf.rl.rollout import Rollout


def text_perplexity(policy: Policy, rows: Sequence[TextRow], micro_batch_tokens: int) -> float:
    """exp of the mean negative log-likelihood per token of plain texts; every token counts alike."""
    logp_BR, mask_BR = continuation_logp(policy, [("", row.text) for row in rows], micro_batch_tokens)
    return perplexity(logp_BR, mask_BR)


def perplexity(logp_BR: Tensor, mask_BR: Tensor) -> float:
    """exp(-mean), the mean over all true mask entries; padding may hold anything."""
    total = torch.where(mask_BR, logp_BR, 0.0).sum(dtype=torch.float64)
    return math.exp(-float(total) / int(mask_BR.sum()))


def question_accuracy(policy: Policy, rows: Sequence[QuestionRow], micro_batch_tokens: int) -> float:
    """Share of questions whose right answer is the likeliest one per character."""
    choices = [(f"Question: {row.question}\nAnswer:", f" {choice}") for row in rows for choice in row.choices]
    logp_BR, _ = continuation_logp(policy, choices, micro_batch_tokens)
    logp_B = logp_BR.sum(-1, dtype=torch.float64)
    right, start = 0, 0
    for row in rows:
        right += likeliest_choice(logp_B[start : start + len(row.choices)], row.choices) == row.answer
        start += len(row.choices)
    return right / len(rows)


def likeliest_choice(logp_B: Tensor, choices: Sequence[str]) -> int:
    """The choice with the highest log-likelihood per character, so that long ones are not at a disadvantage.

    Source: `acc_norm` of EleutherAI's lm-evaluation-harness.

    Args:
        logp_B: nats, of each whole choice.
    """
    return int((logp_B / torch.tensor([float(len(choice)) for choice in choices])).argmax())


def continuation_logp(
    policy: Policy, texts: Sequence[tuple[str, str]], micro_batch_tokens: int
) -> tuple[Tensor, Tensor]:
    """Nats of every token of each (context, continuation), fp32 [B, R], 0 on padding; and the mask."""
    encoded = [continuation_ids(policy.tokenizer, context, continuation) for context, continuation in texts]
    as_rollout = Rollout(
        prompt_ids=[torch.tensor(context) for context, _ in encoded],
        response_ids=[torch.tensor(continuation) for _, continuation in encoded],
        stopped=torch.zeros(len(encoded), dtype=torch.bool),
    )
    logp_BR = policy.log_probabilities(as_rollout, temperature=1.0, micro_batch_tokens=micro_batch_tokens)
    return logp_BR, as_rollout.mask_BR
