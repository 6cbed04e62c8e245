"""Rows laid end to end. On CPUs a prefix that rows share is computed once.

The states of a token depend only on the tokens before it. So rows with the same first tokens (a system
prompt, or the prompt of a preference pair) can share the states of these tokens: the rows form a tree
(Juravsky et al. 2024, arXiv:2402.05099, decode in this way). The variable-length kernels of GPUs do not
support trees, so on GPUs every row has all of its tokens. Dimensions: B rows, T tokens of all rows, U
different ones of them (T if nothing is shared), L tokens of the longest row.
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

ALIGNED = 32
"""torch's softmax on CPUs is slow for lengths that are not a multiple of this."""


def aligned(length: int) -> int:
    """The next multiple of ALIGNED."""
    return -(-length // ALIGNED) * ALIGNED


class Group(NamedTuple):
    """Rows that attend together."""

    tokens: Tensor
    """[rows, L], L a multiple of ALIGNED: index of each token among the U. Padding repeats the row's last
    token."""
    is_own: Tensor
    """[rows, L]: true on the row's own tokens, false on padding and on tokens shared with an earlier row."""
    first: int
    """Position of the first own token of any row. No query is needed for the tokens before it."""
    longest: int
    """Tokens of the longest row."""


class Packed:
    """Token ids of B rows, laid end to end."""

    def __init__(self, rows: Sequence[Tensor], device: torch.device | str) -> None:
        self.lengths = [len(row) for row in rows]
        self.kept: dict[tuple[int, int], Any] = {}
        """What the attention over these rows needs in every layer, kept between layers."""
        self._unseen: dict[tuple[Any, ...], Tensor] = {}
        self.ids_T = torch.cat(list(rows)).to(device)
        self.shared_prefix = [0] * len(rows)
        """By row: the number of its first tokens that it shares with an earlier row."""
        self.token_T = torch.arange(len(self.ids_T), device=self.ids_T.device)
        """Index among the U tokens of each of the T tokens."""
        if self.ids_T.device.type == "cpu":
            self._share([row.tolist() for row in rows])

    def _share(self, rows: list[list[int]]) -> None:
        """Find the shared prefixes: a sorted row shares most tokens with the row before it."""
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
        """From values for each of the T tokens, take those of the U tokens: the rows' own ones, in order."""
        if not self.has_common:
            return x_T
        in_common_T = torch.tensor(self.shared_prefix).repeat_interleave(torch.tensor(self.lengths))
        return x_T[self.positions_T >= in_common_T]

    @property
    def size(self) -> int:
        """U."""
        return len(self.ids_T) - sum(self.shared_prefix)

    @cached_property
    def has_common(self) -> bool:
        """U < T."""
        return any(self.shared_prefix)

    @property
    def longest(self) -> int:
        """L."""
        return max(self.lengths)

    @cached_property
    def positions_T(self) -> Tensor:
        """0, 1, 2, ... in each row."""
        return torch.cat([torch.arange(length) for length in self.lengths]).to(self.ids_T.device)

    @cached_property
    def starts(self) -> Tensor:
        """Int [B + 1]: where each row begins, and T."""
        return functional.pad(torch.tensor(self.lengths).cumsum(0), (1, 0)).to(self.ids_T.device)

    @cached_property
    def places_T(self) -> Tensor:
        """Position of each token in [B, L], flattened."""
        row_T = torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths))
        return row_T.to(self.ids_T.device) * self.longest + self.positions_T

    def groups(self, most: int, queries: int) -> list[Group]:
        """Groups of neighbouring rows. With `queries` queries a row, a group has at most `most` attention
        weights."""
        found: list[Group] = []
        order = [row for row, length in enumerate(self.lengths) if self.shared_prefix[row] < length]
        if self.has_common:
            order.sort(key=lambda row: (self.shared_prefix[row], self.lengths[row]))
        while order:
            longest, end = self.lengths[order[0]], 1
            while end < len(order):
                longer = max(longest, self.lengths[order[end]])
                if (end + 1) * longer * min(longer, queries) > most:
                    break
                longest, end = longer, end + 1
            found.append(self._group(order[:end], longest))
            order = order[end:]
        return found

    def _group(self, rows: list[int], longest: int) -> Group:
        lengths = torch.tensor([self.lengths[row] for row in rows])[:, None]
        shared_prefix = torch.tensor([self.shared_prefix[row] for row in rows])[:, None]
        positions = torch.arange(aligned(longest))
        is_own = (positions >= shared_prefix) & (positions < lengths)
        tokens = self.token_T[self.starts[rows, None] + torch.minimum(positions, lengths - 1)]
        return Group(tokens, is_own, int(shared_prefix.min()), longest)

    def unseen(self, length: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """[length, length], to be added to scores: -inf where a query must not look."""
        key = (length, window, dtype)
        if key not in self._unseen:
            bias = torch.zeros(length, length, dtype=dtype, device=self.ids_T.device)
            self._unseen[key] = bias.masked_fill_(~seen(length, window, bias.device), float("-inf"))
        return self._unseen[key]

    def call(self) -> dict[str, Any]:
        """Arguments of a model that takes packed rows, with or without a head."""
        return {
            "input_ids": self.own(self.ids_T)[None],
            "position_ids": self.own(self.positions_T)[None],
            "attention_mask": self.ids_T.new_zeros(1, 1, 1, 1),  # so transformers makes none of its own
            "packed": self,
        }

    @property
    def last_B(self) -> Tensor:
        """Each row's last token."""
        return self.starts[1:] - 1


def seen(length: int, window: int | None, device: torch.device) -> Tensor:
    """Bool [length, length]: which keys (second axis) a query looks at."""
    positions = torch.arange(length, device=device)
    distance = positions[:, None] - positions
    return (distance >= 0) & (distance < (window or length))
