"""Several answers per question, where a verifier says which are right.

Dimensions: B questions, N answers to each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlhf.evaluation.intervals import share


def repeated_metrics(
    right_BN: Tensor, texts: Sequence[Sequence[str]], agree: Callable[[str, str], bool] | None
) -> dict[str, float]:
    """`pass_at_K` for K = 1, 2, 4, ... and N; `avg_at_N`; and `maj_at_N` where answers can be compared.

    Args:
        right_BN: 1 for a right answer, else 0; NaN for no score. Questions with such an answer are left out.
        texts: the answers.
        agree: whether two responses give the same answer; None if the verifier cannot tell.
    """
    known_B = ~right_BN.isnan().any(-1)
    right_BN, count = right_BN[known_B].double(), right_BN.shape[-1]
    metrics: dict[str, float] = {}
    for k in sorted({*(2**power for power in range(count.bit_length())), count}):
        metrics |= share(pass_at_k(right_BN, k)).metrics(f"pass_at_{k}")
    metrics |= share(right_BN.mean(-1)).metrics(f"avg_at_{count}")
    if agree is not None:
        kept = [each for each, is_known in zip(texts, known_B.tolist(), strict=True) if is_known]
        chosen = [majority(each, agree) for each in kept]
        voted_B = right_BN[torch.arange(len(chosen)), torch.tensor(chosen, dtype=torch.long)]
        metrics |= share(voted_B).metrics(f"maj_at_{count}")
    return metrics


def pass_at_k(right_BN: Tensor, k: int) -> Tensor:
    """Probability that at least one of k answers is right, fp64 [B], without bias.

    Source: Chen et al. 2021, arXiv:2107.03374, eq. 1.

    Args:
        k: at most N.
    """
    count = right_BN.shape[-1]
    assert 1 <= k <= count
    wrong = [count - round(float(right)) for right in right_BN.sum(-1)]
    return torch.tensor(
        [1.0 - math.comb(each, k) / math.comb(count, k) for each in wrong], dtype=torch.float64
    )


def majority(texts: Sequence[str], agree: Callable[[str, str], bool]) -> int:
    """Index of the first response of the largest group with the same answer. Of equally large groups the
    first is taken.

    Source: Wang et al. 2022, "Self-Consistency Improves Chain of Thought Reasoning", arXiv:2203.11171.
    """
    firsts: list[int] = []
    sizes: list[int] = []
    for index, text in enumerate(texts):
        for group, first in enumerate(firsts):
            if agree(text, texts[first]):
                sizes[group] += 1
                break
        else:
            firsts.append(index)
            sizes.append(1)
    return firsts[max(range(len(sizes)), key=sizes.__getitem__)]
