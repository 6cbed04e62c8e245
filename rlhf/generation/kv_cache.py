"""The KV cache of the local engine: it grows with room to spare, and loses rows and columns.

Dimensions: B rows, K tokens in the cache, D size of a head, T tokens of packed prompts,
U different ones of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


def growing_cache(model: PreTrainedModel) -> DynamicCache:
    """transformers' cache, whose plain layers have room to spare instead of being copied for every token.

    Models need an attention_mask with it: the room is masked. Those that make something of their own as long
    as that mask (Bloom's ALiBi) get the plain cache.
    """
    cache = DynamicCache(config=model.config)
    if model._supports_attention_backend:
        cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class GrowingLayer(DynamicLayer):
    """`keys` and `values` [B, heads, room, D] are filled up to a length, the rest is zeros: what the model's
    mask hides. Whole buffers, because products of matrices would copy parts of them."""

    ROOM = 64
    """Tokens that fit before the buffers are copied again."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._length = 0
        self.prompts: tuple[Tensor, Tensor, int, int] | None = None
        """Before the first call, if it is going to bring packed prompts: which of the U tokens each of the T
        is, the places [T] that these get in [B, K], flattened, and B and K."""

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """What `update` is going to return: its length, and where it begins."""
        return self._room_for(self._length + query_length), 0

    def _room_for(self, length: int) -> int:
        if self.keys is None:
            return length
        room = self.keys.shape[-2]
        return room if length <= room else length + self.ROOM

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new tokens behind those that are there."""
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = self._padded(key_states), self._padded(value_states)
            self._length = self.keys.shape[-2]
            return key_states, value_states
        start, self._length = self._length, self._length + key_states.shape[-2]
        room = self._room_for(self._length)
        if room > self.keys.shape[-2]:
            self.keys, self.values = _widened(self.keys, room), _widened(self.values, room)
        self.keys[:, :, start : self._length] = key_states
        self.values[:, :, start : self._length] = value_states
        return self.keys, self.values

    def _padded(self, x: Tensor) -> Tensor:
        """Packed prompts' [1, heads, U, D] -> [B, heads, K, D]."""
        if self.prompts is None:
            return x
        token_T, places_T, rows, width = self.prompts
        _, heads, _, size = x.shape
        padded = x.new_zeros(rows * width, heads, size).index_copy_(
            0, places_T, x[0].transpose(0, 1)[token_T]
        )
        return padded.view(rows, width, heads, size).transpose(1, 2).contiguous()

    def cut(self, start: int, stop: int) -> None:
        """Drop these columns."""
        assert self.keys is not None and self.values is not None
        self.keys = torch.cat([self.keys[:, :, :start], self.keys[:, :, stop:]], dim=2)
        self.values = torch.cat([self.values[:, :, :start], self.values[:, :, stop:]], dim=2)
        self._length -= stop - start


def _widened(x: Tensor, room: int) -> Tensor:
    """[B, heads, K, D] -> [B, heads, room, D], zeros behind."""
    wider = x.new_zeros(*x.shape[:2], room, x.shape[-1])
    wider[:, :, : x.shape[-2]] = x
    return wider


JOINABLE = (GrowingLayer, DynamicLayer, DynamicSlidingWindowLayer)
"""Layers of a cache that hold keys and values [B, heads, K, D] and nothing else."""


def joined(caches: Sequence[DynamicCache]) -> DynamicCache:
    """The rows of all, equally wide ones, in the first: layer by layer, and the others are emptied."""
    if len(caches) > 1:
        for layers in zip(*(cache.layers for cache in caches), strict=True):
            layers[0].keys = torch.cat([layer.keys for layer in layers])
            layers[0].values = torch.cat([layer.values for layer in layers])
            for layer in layers[1:]:
                layer.keys = layer.values = None
    return caches[0]


def without_padding(cache: DynamicCache, mask_BK: Tensor) -> Tensor:
    """Drop the columns in front that hold no token of any row, where every layer can; virtual tokens stay.

    Returns:
        The mask of what is left.
    """
    layers = [layer for layer in cache.layers if isinstance(layer, GrowingLayer)]
    unused = int(mask_BK.any(0).int().argmax())
    if unused == 0 or len(layers) < len(cache.layers):
        return mask_BK
    virtual = cache.get_seq_length() - mask_BK.shape[1]
    for layer in layers:
        layer.cut(virtual, virtual + unused)
    return mask_BK[:, unused:]
