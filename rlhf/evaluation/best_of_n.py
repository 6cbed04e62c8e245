"""Best-of-n: of several answers to a prompt, take the one with the highest reward. It needs no training, but
more time per answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf.data.schema import PromptRow
from rlhf.rewards.combined import usable_scores
from rlhf.rewards.reward import Reward, with_token_ids
from rlhf.rl.rollout import Rollout


def best_answers(
    reward: Reward, rows: Sequence[PromptRow], rollout: Rollout, texts: Sequence[str], *, of: int, key: str
) -> Tensor:
    """Indices of the best answer to each prompt, long [B].

    Args:
        rows: B prompts.
        rollout: `of` answers per prompt, next to each other.
        of: number of answers per prompt. Answers without a score come last; of equal ones the first is taken.
        key: the reward's config key, for error messages.

    Raises:
        ConfigError: a score is infinite, or no answer has one.
    """
    repeated = with_token_ids([row for row in rows for _ in range(of)], rollout.response_ids)
    score_BN = usable_scores(reward, repeated, texts, key).score_B.view(len(rows), of)
    return score_BN.nan_to_num(nan=-math.inf).argmax(-1) + torch.arange(len(rows)) * of


def kl_bound(of: int) -> float:
    """Largest KL from the sampling policy, in nats per sequence: log n - (n - 1) / n.

    Source: Beirami et al. 2024, arXiv:2401.01879, theorem 3.1. The KL is lower if answers have equal scores.
    """
    return math.log(of) - (of - 1) / of
