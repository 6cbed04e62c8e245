"""Attention of short packed rows on a CPU, by products of matrices.

Dimensions: U tokens of all rows, L those of the longest of some, A heads, D size of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rlhf.models.rows import Group, Packed, aligned

CACHED = 1 << 20
"""Attention weights that are held at once."""
QUERIES = 128
"""Tokens of a row that attend together, to what stands before them and to themselves."""


class ShortAttention(torch.autograd.Function):
    """Attention by matrix products, a few rows at a time, so that their weights stay in the cache; on the
    way back they are computed anew. On CPUs and for short rows it takes half the time of torch's tiled
    kernel, and as little memory. q, k, v and the result are [U, heads, D]."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, packed: Packed, scale: float, window: int | None
    ) -> Tensor:
        out = torch.empty_like(q)
        for group in packed.groups(CACHED // q.shape[1], QUERIES):
            length = group.tokens.shape[1]
            rows_q, rows_k, rows_v = (_heads_first(x[group.tokens], k.shape[1]) for x in (q, k, v))
            rows_out = torch.empty_like(rows_q)
            for part, keys in _parts(group):
                unseen = packed.unseen(length, window, q.dtype)[part, keys]
                weights = _weights(rows_q[:, :, part], rows_k[:, 0, keys], unseen, scale)
                part_out = torch.bmm(weights, rows_v[:, 0, keys])
                rows_out[:, :, part] = part_out.view_as(rows_out[:, :, part])
            _put(out, _tokens_first(rows_out, group), group)
        ctx.save_for_backward(q, k, v)
        ctx.arguments = packed, scale, window
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q, k, v = ctx.saved_tensors
        packed, scale, window = ctx.arguments
        whole_q, whole_k, whole_v = (torch.empty_like(x) for x in (q, k, v))
        groups = packed.groups(CACHED // q.shape[1], QUERIES)
        seen: list[tuple[Tensor, Tensor]] = []
        for group in groups:
            length = group.tokens.shape[1]
            rows_q, rows_k, rows_v = (_heads_first(x[group.tokens], k.shape[1]) for x in (q, k, v))
            of_out = gradients[0][group.tokens]
            if group.is_own is not None:
                of_out.mul_(group.is_own[:, :, None, None])
            of_out = _heads_first(of_out, k.shape[1])
            of_q, of_k, of_v = torch.empty_like(rows_q), torch.zeros_like(rows_k), torch.zeros_like(rows_v)
            for part, keys in _parts(group):
                part_q, part_of_out = rows_q[:, :, part].flatten(1, 2), of_out[:, :, part].flatten(1, 2)
                part_k, part_v = rows_k[:, 0, keys], rows_v[:, 0, keys]
                unseen = packed.unseen(length, window, q.dtype)[part, keys]
                weights = _weights(rows_q[:, :, part], part_k, unseen, scale)
                of_weights = torch.bmm(part_of_out, part_v.mT)
                of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
                of_q[:, :, part] = torch.bmm(of_scores, part_k).mul_(scale).view_as(of_q[:, :, part])
                of_k[:, 0, keys].baddbmm_(of_scores.mT, part_q, alpha=scale)
                of_v[:, 0, keys].baddbmm_(weights.mT, part_of_out)
            _put(whole_q, _tokens_first(of_q, group), group)
            of_k, of_v = _tokens_first(of_k, group), _tokens_first(of_v, group)
            if packed.has_common:
                seen.append((of_k, of_v))
            else:
                _put(whole_k, of_k, group)
                _put(whole_v, of_v, group)
        if packed.has_common:
            of_keys, of_values = zip(*seen, strict=True)
            whole_k, whole_v = (_summed(each, groups, k) for each in (of_keys, of_values))
        return whole_q, whole_k, whole_v, None, None, None


def _parts(group: Group) -> list[tuple[slice, slice]]:
    """Queries, and the keys before them."""
    starts = range(group.first, group.longest, QUERIES)
    parts = [slice(start, min(start + QUERIES, group.longest)) for start in starts]
    return [(part, slice(aligned(part.stop))) for part in parts]


def _weights(q: Tensor, k: Tensor, unseen: Tensor, scale: float) -> Tensor:
    """q [N, S, L, D], whose S heads share the key, and k [N, K, D] give [N, S * L, K]."""
    bias = unseen.repeat(q.shape[1], 1).expand(len(q), -1, -1)
    return torch.baddbmm(bias, q.flatten(1, 2), k.mT, alpha=scale).softmax(-1)


def _heads_first(x: Tensor, heads: int) -> Tensor:
    """[rows, L, A, D] -> [rows * heads, A / heads, L, D]: the queries that share a key stand together."""
    rows, length, _, size = x.shape
    return x.transpose(1, 2).reshape(rows * heads, -1, length, size)


def _tokens_first(x: Tensor, group: Group) -> Tensor:
    """The inverse of `_heads_first`."""
    rows, length = group.tokens.shape
    return x.view(rows, -1, length, x.shape[-1]).transpose(1, 2)


def _put(whole: Tensor, part: Tensor, group: Group) -> None:
    """The inverse of `whole[group.tokens]`, without what is not the rows' own."""
    if group.is_own is None:
        whole[group.tokens.flatten()] = part.flatten(0, 1)
    else:
        whole[group.tokens[group.is_own]] = part[group.is_own]


def _summed(parts: Sequence[Tensor], groups: Sequence[Group], like: Tensor) -> Tensor:
    """Where rows have tokens in common, what comes back to these from all of them: [rows, L, heads, D] of
    each group to [U, heads, D], added up in fp32. Padding brings zeros."""
    tokens = torch.cat([group.tokens.flatten() for group in groups])
    values = torch.cat([part.flatten(2).flatten(0, 1) for part in parts])
    order = tokens.argsort(stable=True)
    firsts = torch.searchsorted(tokens[order], torch.arange(len(like)))
    return functional.embedding_bag(order, values, firsts, mode="sum").view_as(like)
