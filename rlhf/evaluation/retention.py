"""What a policy still knows: perplexity of general texts, and multiple-choice questions.

Dimensions: B continuations, R continuation tokens (padded).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlhf.data.chat import continuation_ids
from rlhf.data.schema import QuestionRow, TextRow
from rlhf.generation.policy import Policy
from rlhf.rl.rollout import Rollout


def retention(
    policy: Policy, rows: Sequence[TextRow | QuestionRow], micro_batch_tokens: int
) -> dict[str, float]:
    """What the rows allow: `question_accuracy`; `perplexity` of all texts, and where they are from several
    sets `text_loss_SET` of each, in nats a token."""
    texts = [row for row in rows if isinstance(row, TextRow)]
    questions = [row for row in rows if isinstance(row, QuestionRow)]
    known = {}
    if texts:
        logp_BR, mask_BR = continuation_logp(policy, [("", row.text) for row in texts], micro_batch_tokens)
        known["perplexity"] = math.exp(mean_loss(logp_BR, mask_BR))
        names = dict.fromkeys(row.source for row in texts)
        for name in names if len(names) > 1 else ():
            of_set_B = torch.tensor([row.source == name for row in texts])
            known[f"text_loss_{name}"] = mean_loss(logp_BR[of_set_B], mask_BR[of_set_B])
    if questions:
        known["question_accuracy"] = question_accuracy(policy, questions, micro_batch_tokens)
    return known


def forgetting(metrics: Mapping[str, float], policies: Sequence[str]) -> dict[str, float]:
    """Each policy's `retention` against that of the policy called base; without a name, the last policy's.

    `retention_loss` is the logarithm of `retention_perplexity_ratio`: nats a token.

    Args:
        metrics: as `retention` gives them, with /POLICY behind each name.
    """
    changes: dict[str, dict[str, float]] = {}
    for name in policies:
        change = changes[name] = {}
        if "perplexity/base" in metrics:
            ratio = metrics[f"perplexity/{name}"] / metrics["perplexity/base"]
            change["retention_perplexity_ratio"], change["retention_loss"] = ratio, math.log(ratio)
        if "question_accuracy/base" in metrics:
            lost = metrics[f"question_accuracy/{name}"] - metrics["question_accuracy/base"]
            change["question_accuracy_change"] = lost
    named = {f"{metric}/{name}": value for name in policies for metric, value in changes[name].items()}
    return named | changes[policies[-1]]


def mean_loss(logp_BR: Tensor, mask_BR: Tensor) -> float:
    """Mean negative log-likelihood of all true mask entries, nats a token; padding may hold anything."""
    total = torch.where(mask_BR, logp_BR, 0.0).sum(dtype=torch.float64)
    return -float(total) / int(mask_BR.sum())


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
