"""Attention of short packed rows on a CPU, by products of matrices.

Dimensions: B rows, U tokens of all rows, L those of the longest of some, Q that ask of L, A heads, S of them
to each key, D size of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from rlhf.models.packed_batch import Group, Packed, aligned

CACHED = 1 << 20
"""Attention weights that are held at once."""
QUERIES = 128
"""Tokens of a row that attend together, to what stands before them and to themselves."""


class ShortAttention(torch.autograd.Function):
    """Attention by matrix products, a few rows at a time, so that their weights stay in the cache; on the
    way back they are computed anew. On CPUs and for short rows it takes half the time of torch's tiled
    kernel, and as little memory. q [A, U, D] and k, v [A / S, U, D] give [U, A, D]."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, packed: Packed, scale: float, window: int | None
    ) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        places = _places(packed, len(q), len(k))
        outs = q.new_empty(places.asked, q.shape[-1])
        for group in places.groups:
            rows_q, rows_k, rows_v = group.queries(q), group.keys(k), group.keys(v)
            out = outs[group.slots].view_as(rows_q)
            for part, unseen in group.parts(packed, window, q.dtype):
                keys = slice(unseen.shape[1])
                weights = _weights(rows_q[:, :, part], rows_k[:, keys], unseen, scale)
                out[:, :, part] = torch.bmm(weights, rows_v[:, keys]).view_as(out[:, :, part])
        ctx.save_for_backward(q, k, v)
        ctx.arguments = packed, scale, window
        return outs.index_select(0, places.slot_UA.flatten()).view(-1, *q.shape[::2])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q, k, v = ctx.saved_tensors
        packed, scale, window = ctx.arguments
        places, size = _places(packed, len(q), len(k)), q.shape[-1]
        of_outs = torch.cat([gradients[0].reshape(-1, size), q.new_zeros(1, size)])
        of_queries = q.new_empty(places.asked, size)
        of_keys, of_values = (q.new_zeros(len(places.order), size) for _ in range(2))
        for group in places.groups:
            rows_q, rows_k, rows_v = group.queries(q), group.keys(k), group.keys(v)
            of_out = of_outs.index_select(0, group.of_out).view_as(rows_q)
            of_q = of_queries[group.slots].view_as(rows_q)
            of_k, of_v = (each[group.key_slots].view_as(rows_k) for each in (of_keys, of_values))
            for part, unseen in group.parts(packed, window, q.dtype):
                keys = slice(unseen.shape[1])
                part_q, part_of_out = rows_q[:, :, part].flatten(1, 2), of_out[:, :, part].flatten(1, 2)
                part_k, part_v = rows_k[:, keys], rows_v[:, keys]
                weights = _weights(rows_q[:, :, part], part_k, unseen, scale)
                of_weights = torch.bmm(part_of_out, part_v.mT)
                of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
                of_q[:, :, part] = torch.bmm(of_scores, part_k).mul_(scale).view_as(of_q[:, :, part])
                of_k[:, keys].baddbmm_(of_scores.mT, part_q, alpha=scale)
                of_v[:, keys].baddbmm_(weights.mT, part_of_out)
        whole_q = of_queries.index_select(0, places.slot_UA.T.flatten()).view_as(q)
        # tokens that rows have in common get something back from each; padding brings zeros
        whole_k, whole_v = (
            functional.embedding_bag(places.order, each, places.firsts, mode="sum").view_as(k)
            for each in (of_keys, of_values)
        )
        return whole_q, whole_k, whole_v, None, None, None


class _Places(NamedTuple):
    """Where the tokens of packed rows stand when these attend; one token of one head is one place."""

    groups: list[_Group]
    asked: int
    """Places of queries, of all groups."""
    slot_UA: Tensor
    """Of each token and head, which place of a query is its own."""
    order: Tensor
    """Places of keys, of all groups, sorted by head and token."""
    firsts: Tensor
    """[A / S * U]: where in `order` those of each head and token begin."""


class _Group(NamedTuple):
    """Rows that attend together."""

    rows: Group
    asks: Tensor
    """Of each place [A / S, rows, S, Q], which of [A, U] is the query."""
    of_out: Tensor
    """And which of [U, A] its result is; one behind the last where that is another row's, or nobody's."""
    reads: Tensor
    """Of each place [A / S, rows, L], which of [A / S, U] is the key."""
    slots: slice
    key_slots: slice
    """Its places among those of all groups."""

    def queries(self, q: Tensor) -> Tensor:
        """[A, U, D] -> [rows * A / S, S, Q, D]."""
        heads, rows, sharing, asked = self.asks.shape
        return q.flatten(0, 1).index_select(0, self.asks.flatten()).view(heads * rows, sharing, asked, -1)

    def keys(self, k: Tensor) -> Tensor:
        """[A / S, U, D] -> [rows * A / S, L, D]."""
        heads, rows, length = self.reads.shape
        return k.flatten(0, 1).index_select(0, self.reads.flatten()).view(heads * rows, length, -1)

    def parts(self, packed: Packed, window: int | None, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Some of Q, and what of the keys before them they do not see."""
        unseen, first = packed.unseen(self.rows.tokens.shape[1], window, dtype), self.rows.first
        for start in range(first, self.rows.longest, QUERIES):
            stop = min(start + QUERIES, self.rows.longest)
            yield slice(start - first, stop - first), unseen[start:stop, : aligned(stop)]


def _places(packed: Packed, num_heads: int, num_keys: int) -> _Places:
    """For so many heads, of queries and of keys."""
    key = num_heads, num_keys
    if key not in packed.kept:
        packed.kept[key] = _find_places(packed, num_heads, num_keys)
    found: _Places = packed.kept[key]
    return found


def _find_places(packed: Packed, num_heads: int, num_keys: int) -> _Places:
    size, sharing = packed.size, num_heads // num_keys
    key_heads, head = torch.arange(num_keys), torch.arange(num_heads).view(num_keys, 1, sharing, 1)
    slot_UA = torch.empty(size, num_heads, dtype=torch.long)
    groups: list[_Group] = []
    asked = read = 0
    for rows in packed.groups(CACHED // num_heads, QUERIES):
        asking = slice(rows.first, rows.longest)
        tokens, is_own = rows.tokens[:, None, asking], rows.is_own[:, None, asking]
        asks = head * size + tokens
        of_out = torch.where(is_own, tokens * num_heads + head, size * num_heads)
        reads = key_heads[:, None, None] * size + rows.tokens
        is_asked = of_out < size * num_heads
        slots = torch.arange(asked, asked + asks.numel()).view_as(asks)
        slot_UA.view(-1)[of_out[is_asked]] = slots[is_asked]
        key_slots = slice(read, read + reads.numel())
        groups.append(
            _Group(rows, asks, of_out.flatten(), reads, slice(asked, asked + asks.numel()), key_slots)
        )
        asked, read = asked + asks.numel(), read + reads.numel()
    all_reads = torch.cat([group.reads.flatten() for group in groups])
    order = all_reads.argsort(stable=True)
    firsts = torch.searchsorted(all_reads[order], torch.arange(num_keys * size))
    return _Places(groups, asked, slot_UA, order, firsts)


def _weights(q: Tensor, k: Tensor, unseen: Tensor, scale: float) -> Tensor:
    """q [N, S, Q, D], whose S heads share the key, and k [N, K, D] give [N, S * Q, K]."""
    bias = unseen.repeat(q.shape[1], 1).expand(len(q), -1, -1)
    return torch.baddbmm(bias, q.flatten(1, 2), k.mT, alpha=scale).softmax(-1)
