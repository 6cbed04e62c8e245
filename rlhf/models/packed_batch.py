"""Rows laid end to end. On CPUs a prefix that several rows share is computed once.

The states of a token depend only on the tokens before it. So rows with the same first tokens (a system
prompt, or the prompt of a preference pair) can share the states of these tokens: the rows form a tree
(Juravsky et al. 2024, arXiv:2402.05099, decode in this way). The variable-length kernels of GPUs do not
support trees, so on GPUs every row computes all of its tokens. Dimensions: B rows, T tokens of all rows, U
different tokens among them (T if nothing is shared), L tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from rlhf.distributed.batching import equal_tokens

ALIGNMENT = 32
"""Lengths are rounded up to a multiple of this many tokens: torch's softmax on CPUs is slow for others."""


def aligned(length: int) -> int:
    """The length, rounded up to a multiple of ALIGNMENT."""
    return -(-length // ALIGNMENT) * ALIGNMENT


class Group(NamedTuple):
    """Rows that attend in the same matrix products."""

    tokens: Tensor
    """[rows, L], L a multiple of ALIGNMENT: index of each token among the U. Padding repeats the row's last
    token."""
    is_own: Tensor
    """[rows, L]: true on the row's own tokens, false on padding and on tokens shared with an earlier row."""
    first: int
    """Smallest position of an own token in any row. The tokens before it need no query."""
    longest: int
    """Tokens of the longest row."""


class Packed:
    """Token ids of B rows, laid end to end."""

    def __init__(self, rows: Sequence[Tensor], device: torch.device | str) -> None:
        self.lengths = [len(row) for row in rows]
        self.layer_cache: dict[tuple[int, int], Any] = {}
        """Slots of `packed_attention`, which are the same in every layer, by numbers of heads."""
        self._mask_biases: dict[tuple[Any, ...], Tensor] = {}
        self.ids_T = torch.cat(list(rows)).to(device)
        self.shared_prefix = [0] * len(rows)
        """For each row: how many of its first tokens it shares with the row before it in sorted order."""
        self.token_T = torch.arange(len(self.ids_T), device=self.ids_T.device)
        """[T]: index of each token among the U different tokens."""
        if self.ids_T.device.type == "cpu":
            self._share([row.tolist() for row in rows])

    def _share(self, rows: list[list[int]]) -> None:
        """Find the shared prefixes. In sorted order, a row shares most tokens with the row before it."""
        order = sorted(range(len(rows)), key=rows.__getitem__)
        for before, row in pairwise(order):
            self.shared_prefix[row] = equal_tokens(rows[before], rows[row])
        if not any(self.shared_prefix):
            return
        of_rows = list(self.token_T.split(self.lengths))
        own = [len(row) - count for row, count in zip(rows, self.shared_prefix, strict=True)]
        firsts = [0, *accumulate(own)]
        for place, row in enumerate(order):
            count = self.shared_prefix[row]
            own_tokens = torch.arange(firsts[row], firsts[row + 1])
            before_it = of_rows[order[place - 1]][:count]
            of_rows[row] = torch.cat([before_it, own_tokens])
        self.token_T = torch.cat(of_rows)

    def own(self, x_T: Tensor) -> Tensor:
        """[T, ...] -> [U, ...]: the values of each row's own tokens, in order."""
        if not self.has_shared:
            return x_T
        num_shared_T = torch.tensor(self.shared_prefix).repeat_interleave(torch.tensor(self.lengths))
        return x_T[self.positions_T >= num_shared_T]

    @property
    def size(self) -> int:
        """U, the number of different tokens."""
        return len(self.ids_T) - sum(self.shared_prefix)

    @cached_property
    def has_shared(self) -> bool:
        """Whether rows share tokens, so that U < T."""
        return any(self.shared_prefix)

    @property
    def longest(self) -> int:
        """L, the number of tokens of the longest row."""
        return max(self.lengths)

    @cached_property
    def positions_T(self) -> Tensor:
        """[T]: position of each token in its row, from 0."""
        return torch.cat([torch.arange(length) for length in self.lengths]).to(self.ids_T.device)

    @cached_property
    def starts(self) -> Tensor:
        """Int [B + 1]: index of each row's first token among the T, and then T."""
        return functional.pad(torch.tensor(self.lengths).cumsum(0), (1, 0)).to(self.ids_T.device)

    @cached_property
    def places_T(self) -> Tensor:
        """[T]: index of each token in the flattened [B, L] of padded rows."""
        row_T = torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths))
        return row_T.to(self.ids_T.device) * self.longest + self.positions_T

    def groups(self, max_weights: int, queries: int) -> list[Group]:
        """Groups of neighbouring rows. If rows share tokens, they are first sorted by shared prefix and
        length. With `queries` queries per row, a group of several rows has at most `max_weights` attention
        weights per head."""
        groups: list[Group] = []
        order = [row for row, length in enumerate(self.lengths) if self.shared_prefix[row] < length]
        if self.has_shared:
            order.sort(key=lambda row: (self.shared_prefix[row], self.lengths[row]))
        while order:
            longest, end = self.lengths[order[0]], 1
            while end < len(order):
                longer = max(longest, self.lengths[order[end]])
                if (end + 1) * longer * min(longer, queries) > max_weights:
                    break
                longest, end = longer, end + 1
            groups.append(self._group(order[:end], longest))
            order = order[end:]
        return groups

    def _group(self, rows: list[int], longest: int) -> Group:
        lengths = torch.tensor([self.lengths[row] for row in rows])[:, None]
        shared_prefix = torch.tensor([self.shared_prefix[row] for row in rows])[:, None]
        positions = torch.arange(aligned(longest))
        is_own = (positions >= shared_prefix) & (positions < lengths)
        tokens = self.token_T[self.starts[rows, None] + torch.minimum(positions, lengths - 1)]
        return Group(tokens, is_own, int(shared_prefix.min()), longest)

    def mask_bias(self, length: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """[length, length], to be added to attention scores: -inf for keys that a query must not see."""
        key = (length, window, dtype)
        if key not in self._mask_biases:
            bias = torch.zeros(length, length, dtype=dtype, device=self.ids_T.device)
            self._mask_biases[key] = bias.masked_fill_(
                ~visible_keys(length, window, bias.device), float("-inf")
            )
        return self._mask_biases[key]

    def call(self) -> dict[str, Any]:
        """Arguments for a call of a model that takes packed rows, with or without a head."""
        return {
            "input_ids": self.own(self.ids_T)[None],
            "position_ids": self.own(self.positions_T)[None],
            "attention_mask": self.ids_T.new_zeros(1, 1, 1, 1),  # so transformers makes no mask itself
            "packed": self,
        }

    @property
    def last_B(self) -> Tensor:
        """[B]: index of each row's last token among the T."""
        return self.starts[1:] - 1


def visible_keys(length: int, window: int | None, device: torch.device) -> Tensor:
    """Bool [length, length]: which keys (second axis) a query (first axis) may see."""
    positions = torch.arange(length, device=device)
    distance = positions[:, None] - positions
    return (distance >= 0) & (distance < (window or length))
