"""Attention of short packed rows on a CPU, by products of matrices.

Dimensions: T tokens of all rows, L those of the longest of some, A heads, D size of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rlhf.models.packed import Packed

CACHED = 1 << 20
"""Attention weights that are held at once."""
QUERIES = 128
"""Tokens of a row that attend together, to what stands before them and to themselves."""


class ShortAttention(torch.autograd.Function):
    """Attention by matrix products, a few rows at a time, so that their weights stay in the cache; on the
    way back they are computed anew. On CPUs and for short rows it takes half the time of torch's tiled
    kernel, and as little memory. q, k, v and the result are [T, heads, D]."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, packed: Packed, scale: float, window: int | None
    ) -> Tensor:
        out = torch.empty_like(q)
        for tokens, is_real in packed.groups(CACHED // q.shape[1], QUERIES):
            rows_q, rows_k, rows_v = (_heads_first(x[tokens], k.shape[1]) for x in (q, k, v))
            rows_out = torch.empty_like(rows_q)
            for part in _parts(tokens.shape[1]):
                unseen = packed.unseen(tokens.shape[1], window, q.dtype)[part, : part.stop]
                weights = _weights(rows_q[:, :, part], rows_k[:, 0, : part.stop], unseen, scale)
                part_out = torch.bmm(weights, rows_v[:, 0, : part.stop])
                rows_out[:, :, part] = part_out.view_as(rows_out[:, :, part])
            _put(out, rows_out, tokens, is_real)
        ctx.save_for_backward(q, k, v)
        ctx.arguments = packed, scale, window
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q, k, v = ctx.saved_tensors
        packed, scale, window = ctx.arguments
        results = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
        for tokens, is_real in packed.groups(CACHED // q.shape[1], QUERIES):
            rows_q, rows_k, rows_v = (_heads_first(x[tokens], k.shape[1]) for x in (q, k, v))
            of_out = gradients[0][tokens]
            if is_real is not None:
                of_out.mul_(is_real[:, :, None, None])
            of_out = _heads_first(of_out, k.shape[1])
            of_q, of_k, of_v = torch.empty_like(rows_q), torch.zeros_like(rows_k), torch.zeros_like(rows_v)
            for part in _parts(tokens.shape[1]):
                part_q, part_of_out = rows_q[:, :, part].flatten(1, 2), of_out[:, :, part].flatten(1, 2)
                part_k, part_v = rows_k[:, 0, : part.stop], rows_v[:, 0, : part.stop]
                unseen = packed.unseen(tokens.shape[1], window, q.dtype)[part, : part.stop]
                weights = _weights(rows_q[:, :, part], part_k, unseen, scale)
                of_weights = torch.bmm(part_of_out, part_v.mT)
                of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
                of_q[:, :, part] = torch.bmm(of_scores, part_k).mul_(scale).view_as(of_q[:, :, part])
                of_k[:, 0, : part.stop].baddbmm_(of_scores.mT, part_q, alpha=scale)
                of_v[:, 0, : part.stop].baddbmm_(weights.mT, part_of_out)
            for whole, rows in zip(results, (of_q, of_k, of_v), strict=True):
                _put(whole, rows, tokens, is_real)
        return *results, None, None, None


def _parts(length: int) -> list[slice]:
    return [slice(start, min(start + QUERIES, length)) for start in range(0, length, QUERIES)]


def _weights(q: Tensor, k: Tensor, unseen: Tensor, scale: float) -> Tensor:
    """q [N, S, L, D], whose S heads share the key, and k [N, K, D] give [N, S * L, K]."""
    bias = unseen.repeat(q.shape[1], 1).expand(len(q), -1, -1)
    return torch.baddbmm(bias, q.flatten(1, 2), k.mT, alpha=scale).softmax(-1)


def _heads_first(x: Tensor, heads: int) -> Tensor:
    """[rows, L, A, D] -> [rows * heads, A / heads, L, D]: the queries that share a key stand together."""
    rows, length, _, size = x.shape
    return x.transpose(1, 2).reshape(rows * heads, -1, length, size)


def _put(whole: Tensor, part: Tensor, tokens: Tensor, is_real: Tensor | None) -> None:
    """The inverse of `_heads_first(whole[tokens], heads)`, without the padding."""
    rows, length = tokens.shape
    part = part.view(rows, -1, length, whole.shape[2]).transpose(1, 2)
    if is_real is None:
        whole[tokens.flatten()] = part.flatten(0, 1)
    else:
        whole[tokens[is_real]] = part[is_real]
