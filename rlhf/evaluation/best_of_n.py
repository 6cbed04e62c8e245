"""Of several answers of one policy to a prompt, the one that a reward likes best: a policy that needs no
training, only time when it answers.
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
    """Which answers to take: their indices, long [B].

    Args:
        rows: B prompts.
        rollout: `of` answers to each, neighbours.
        of: a prompt's answers. Those without a score come last, and of equal ones the first is taken.
        key: of the reward, for complaints.

    Raises:
        ConfigError: a score is infinite, or no answer has one.
    """
    repeated = with_token_ids([row for row in rows for _ in range(of)], rollout.response_ids)
    score_BN = usable_scores(reward, repeated, texts, key).score_B.view(len(rows), of)
    return score_BN.nan_to_num(nan=-math.inf).argmax(-1) + torch.arange(len(rows)) * of


def kl_bound(of: int) -> float:
    """At most how far it is from the policy that answers, in nats a sequence: log n - (n - 1) / n.

    Source: Beirami et al. 2024, arXiv:2401.01879, theorem 3.1. It is less where answers share a score.
    """
    return math.log(of) - (of - 1) / of
