"""The retention set: perplexity of general texts, and multiple-choice questions.

Dimensions: B texts, questions or continuations, R continuation tokens (padded).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.data.chat_template import continuation_ids
from rlhf.data.schema import QuestionRow, TextRow
from rlhf.evaluation.intervals import difference, ratio, share
from rlhf.evaluation.sampled import Sampled
from rlhf.generation.policy_model import PolicyModel
from rlhf.rl.rollout import Responses


class Retained(NamedTuple):
    """One policy's results, row by row. Tensors are empty if there are no such rows."""

    sources: list[str]
    """The name of each text's set."""
    nats_B: Tensor
    """Negative log-likelihood of each text, in nats."""
    tokens_B: Tensor
    """Tokens of each text."""
    right_B: Tensor
    """1 for a question whose right answer has the highest log-likelihood per character, else 0."""

    def metrics(self) -> dict[str, float]:
        """`question_accuracy`, and `perplexity` of all texts. For several sets of texts also `text_loss_SET`
        of each set, in nats per token."""
        metrics: dict[str, float] = {}
        if len(self.nats_B):
            metrics |= exponential(ratio(self.nats_B, self.tokens_B)).metrics("perplexity")
            names = dict.fromkeys(self.sources)
            for name in names if len(names) > 1 else ():
                of_set_B = torch.tensor([source == name for source in self.sources])
                metrics[f"text_loss_{name}"] = ratio(self.nats_B[of_set_B], self.tokens_B[of_set_B]).value
        if len(self.right_B):
            metrics |= share(self.right_B).metrics("question_accuracy")
        return metrics


def retention(
    policy: PolicyModel, rows: Sequence[TextRow | QuestionRow], micro_batch_tokens: int
) -> Retained:
    """Measure one policy on all rows."""
    texts = [row for row in rows if isinstance(row, TextRow)]
    questions = [row for row in rows if isinstance(row, QuestionRow)]
    nats_B, tokens_B = torch.zeros(0), torch.zeros(0)
    if texts:
        logp_BR, mask_BR = continuation_logp(policy, [("", row.text) for row in texts], micro_batch_tokens)
        nats_B, tokens_B = -logp_BR.sum(-1, dtype=torch.float64), mask_BR.sum(-1)
    right_B = right_answers(policy, questions, micro_batch_tokens) if questions else torch.zeros(0)
    return Retained([row.source for row in texts], nats_B, tokens_B, right_B)


def forgetting(retained: Retained, base: Retained) -> dict[str, float]:
    """A policy compared with the base model, row by row.

    `retention_loss` is the logarithm of `retention_perplexity_ratio`: nats per token. Empty for an endpoint,
    which gives no likelihoods.
    """
    changes: dict[str, float] = {}
    if len(base.nats_B) and len(retained.nats_B):
        loss = ratio(retained.nats_B - base.nats_B, base.tokens_B)
        changes |= loss.metrics("retention_loss")
        changes |= exponential(loss).metrics("retention_perplexity_ratio")
    if len(base.right_B) and len(retained.right_B):
        changes |= difference(retained.right_B - base.right_B).metrics("question_accuracy_change")
    return changes


def exponential(logarithm: Sampled) -> Sampled:
    """The exponential of a figure and its interval."""
    value, low, high = torch.tensor(logarithm[:3], dtype=torch.float64).exp().tolist()
    return Sampled(value, low, high, logarithm.rows)


def right_answers(policy: PolicyModel, rows: Sequence[QuestionRow], micro_batch_tokens: int) -> Tensor:
    """fp64 [B]: 1 for a question whose right answer has the highest log-likelihood per character, else 0."""
    choices = [(f"Question: {row.question}\nAnswer:", f" {choice}") for row in rows for choice in row.choices]
    logp_BR, _ = continuation_logp(policy, choices, micro_batch_tokens)
    logps = logp_BR.sum(-1, dtype=torch.float64).split([len(row.choices) for row in rows])
    right = [
        likeliest_choice(logp_B, row.choices) == row.answer for row, logp_B in zip(rows, logps, strict=True)
    ]
    return torch.tensor(right, dtype=torch.float64)


def likeliest_choice(logp_B: Tensor, choices: Sequence[str]) -> int:
    """Index of the choice with the highest log-likelihood per character, so that long choices have no
    disadvantage.

    Source: `acc_norm` of EleutherAI's lm-evaluation-harness.

    Args:
        logp_B: log-likelihood of each full choice, in nats.
    """
    return int((logp_B / torch.tensor([float(len(choice)) for choice in choices])).argmax())


def continuation_logp(
    policy: PolicyModel, texts: Sequence[tuple[str, str]], micro_batch_tokens: int
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the continuation tokens in nats, fp32 [B, R], 0 on padding; and the mask.

    Args:
        texts: pairs of context and continuation.
    """
    encoded = [continuation_ids(policy.tokenizer, context, continuation) for context, continuation in texts]
    continuations = Responses(
        prompt_ids=[torch.tensor(context) for context, _ in encoded],
        response_ids=[torch.tensor(continuation) for _, continuation in encoded],
    )
    logp_BR = policy.log_probabilities(continuations, 1.0, micro_batch_tokens)
    return logp_BR, continuations.mask_BR
