"""Masked metrics. Dimensions: B sequences, R response tokens (prompt excluded)."""

from collections.abc import Sequence

from torch import Tensor

from rlhf.rl.advantage import masked_moments, mean_and_variance


def explained_variance(value_BR: Tensor, return_BR: Tensor, mask_BR: Tensor) -> float:
    """How much of the returns' variance the critic foresees: 1 is all, 0 a constant's share, below 0 harm.

    1 - Var(R - V) / Var(R) over the mask; 0.0 when all returns are equal, since there is nothing to foresee.

    Args:
        value_BR: units of the normalised reward, from the critic at the rollout.
        return_BR: same units.
        mask_BR: bool, true on sampled tokens.
    """
    return explained_variance_from_moments(
        masked_moments(return_BR.double() - value_BR.double(), mask_BR), masked_moments(return_BR, mask_BR)
    )


def explained_variance_from_moments(error_moments: Tensor, return_moments: Tensor) -> float:
    """`explained_variance` over all ranks, from globally added `masked_moments` of R - V and of R."""
    _, error_variance = mean_and_variance(error_moments)
    _, return_variance = mean_and_variance(return_moments)
    return 1.0 - error_variance / return_variance if return_variance > 0.0 else 0.0


def distinct_n(token_lists: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams over all n-grams of all sequences, 0 to 1; 0.0 when no sequence holds n tokens.

    Low values show a policy that repeats itself. N-grams never reach across sequences.
    Source: Li et al. 2016, arXiv:1510.03055 (distinct-1 and distinct-2).
    """
    assert n > 0
    n_grams = [tuple(tokens[i : i + n]) for tokens in token_lists for i in range(len(tokens) - n + 1)]
    return len(set(n_grams)) / len(n_grams) if n_grams else 0.0
