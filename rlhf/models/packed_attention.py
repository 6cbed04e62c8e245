"""What a model makes of rows laid end to end, so that no padding goes through it.

Linear layers and norms see one long row of U tokens. Only attention looks at each row by itself: through a
variable-length kernel on GPUs, by products of matrices on CPUs (`ShortAttention`), and elsewhere padded for
the moment of the attention alone. Dimensions: B rows, T tokens of all rows, U different ones of them, L
tokens of the longest, Q that ask of L, H hidden size, A heads, S of them to each key, D size of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf.config import ConfigError
from rlhf.distributed.compute import Compute
from rlhf.models.base import ATTENTION, check_rows
from rlhf.models.packed_batch import Group, Packed, aligned, seen
from rlhf.models.peft.target_modules import backbone_of

SHORT = 1024
"""On CPUs, attention uses matrix products if the longest row has at most this many tokens."""
LAYER_TYPES = {"full_attention", "sliding_attention"}


def hidden_states(model: PreTrainedModel, packed: Packed, at_N: Tensor | None = None) -> Tensor:
    """Final hidden states [N, H], before any head, at some of the T tokens (each named once), or at all of
    them."""
    check_rows(model.config, packed.longest)
    backbone = backbone_of(model)
    if model.config._attn_implementation != ATTENTION:
        ids_BL = packed.ids_T.new_zeros(len(packed.lengths) * packed.longest)
        ids_BL[packed.places_T] = packed.ids_T
        ids_BL = ids_BL.view(-1, packed.longest)
        positions_BL = torch.arange(packed.longest, device=ids_BL.device).expand_as(ids_BL)
        # padding stands behind every real token, so causal attention needs no mask
        hidden_BLH = backbone(input_ids=ids_BL, position_ids=positions_BL, use_cache=False).last_hidden_state
        places = packed.places_T if at_N is None else packed.places_T[at_N]
        return _take(hidden_BLH.flatten(0, 1), places)
    hidden_1UH: Tensor = backbone(**packed.call(), use_cache=False).last_hidden_state
    tokens = packed.token_T if at_N is None else packed.token_T[at_N]
    return _take(hidden_1UH[0], tokens, may_repeat=packed.has_common)


def _take(x: Tensor, places: Tensor, *, may_repeat: bool = False) -> Tensor:
    """x[places]."""
    taken: Tensor = _Gather.apply(x, places, may_repeat)  # type: ignore[no-untyped-call]  # torch's
    return taken


def pack_where_possible(model: PreTrainedModel, compute: Compute | None = None) -> None:
    """Let a model take packed rows if only its attention mixes tokens. Other models get padded rows.

    Args:
        compute: of ranks that all have this model.
    """
    if not may_pack(model):
        return
    model.set_attn_implementation(ATTENTION)
    leaks = _leaks(model) if compute is None else compute.ask_once(lambda: _leaks(model))
    if leaks:  # state-space layers, say, beside attention
        model.set_attn_implementation("sdpa")


def may_pack(model: PreTrainedModel) -> bool:
    """Whether a model of this kind may take packed rows. It needs no weights, so it may be wrong."""
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or LAYER_TYPES)
    is_capped = getattr(config, "attn_logit_softcapping", None) is not None
    is_latent = getattr(config, "v_head_dim", None) is not None  # values are narrower than keys
    return (
        model._supports_attention_backend
        and model._supports_sdpa
        and not is_capped
        and not is_latent
        and layers <= LAYER_TYPES
    )


class _UnpackableError(ConfigError):
    """The model does not pass the rows on to its attention, or passes on more than the rows."""


@torch.no_grad()
def _leaks(model: PreTrainedModel) -> bool:
    """Whether the states of a row depend on the row before it, in even a single bit.

    In a mixture of experts this can happen by rounding alone. Its rows are then padded without need.
    """
    row = torch.arange(3, 7)
    try:
        first, second = (
            hidden_states(model, Packed([before, row], model.device))[len(row) :]
            for before in (row + 1, row + 4)
        )
    except _UnpackableError:
        return True
    return not torch.equal(first, second)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: Packed | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in each layer.

    Args:
        query: [1, A, U, D]; key and value may have fewer heads.
        packed: the rows; None for calls without packed rows, such as decoding.

    Returns:
        [1, U, A, D].
    """
    if packed is None:
        if attention_mask is not None and attention_mask.dtype == torch.long:  # that of `Packed.call`
            raise _UnpackableError(
                f"{type(module).__name__} is not told of rows laid end to end: model.attention=sdpa pads them"
            )
        if query.device.type == "cpu" and query.shape[2] == 1:
            return _of_one_token(query, key, value, attention_mask, scaling or query.shape[-1] ** -0.5), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            sliding_window=sliding_window, **options,
        )  # fmt: skip
    if attention_mask is not None and attention_mask.numel() > 1:  # not that of `Packed.call`
        raise _UnpackableError(
            f"{type(module).__name__} has a mask of its own: model.attention=sdpa pads its rows"
        )
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]
    assert not unknown, f"attention with {unknown} cannot be packed"
    assert dropout == 0.0
    attend = _by_kernel if _has_kernel(query) else _by_row
    return attend(query[0], key[0], value[0], packed, scaling, sliding_window)[None], None


def _of_one_token(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of each row's newest token to its cache, by matrix products. On CPUs torch's kernel takes
    several times as long. q [B, A, 1, D] and k, v [B, heads, K, D] give [B, 1, A, D]; mask [B, 1, 1, K]."""
    rows, heads, length, size = k.shape
    q, k, v = q.reshape(rows * heads, -1, size), k.flatten(0, 1), v.flatten(0, 1)
    scores = torch.bmm(q, k.mT).mul_(scale).view(rows, -1, 1, length)
    if mask is not None:
        scores.masked_fill_(~mask, float("-inf"))
    out = torch.bmm(scores.softmax(-1).view(rows * heads, -1, length), v)
    return out.view(rows, 1, -1, size)


def _wants_own_heads(q: Tensor, k: Tensor) -> bool:
    """Whether grouped queries, [A, ...] of fewer key heads, get a copy of keys and values for each head. On
    GPUs only FlashAttention knows groups, and it has no fp32. Without the copies torch would take its math
    path, which holds all attention weights of a pass."""
    return q.device.type != "cpu" and q.dtype == torch.float32 and len(k) != len(q)


def _has_kernel(query: Tensor) -> bool:
    """Whether FlashAttention 2 can run: it needs an Ampere GPU or newer, 16 bits, and heads of at most
    256."""
    if query.device.type != "cuda" or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    size = query.shape[-1]
    return size <= 256 and size % 8 == 0 and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _by_kernel(
    q: Tensor, k: Tensor, v: Tensor, packed: Packed, scale: float | None, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    starts, longest = packed.starts.int(), packed.longest
    out: Tensor = varlen_attn(
        q, k, v, starts, starts, longest, longest, scale=scale,
        window_size=(-1 if window is None else window - 1, 0), enable_gqa=k.shape[1] != q.shape[1],
    )  # type: ignore[assignment]  # a tuple only when asked  # fmt: skip
    return out


def _by_row(
    q: Tensor, k: Tensor, v: Tensor, packed: Packed, scale: float | None, window: int | None
) -> Tensor:
    scale = scale or q.shape[-1] ** -0.5
    if q.device.type == "cpu" and packed.longest <= SHORT:
        out: Tensor = ShortAttention.apply(q, k, v, packed, scale, window)  # type: ignore[no-untyped-call]  # torch's
        return out
    rows, longest = len(packed.lengths), packed.longest

    def padded(x: Tensor) -> Tensor:  # [heads, U, D] -> [B, heads, L, D]
        x = x.transpose(0, 1)
        x = _take(x, packed.token_T, may_repeat=True) if packed.has_common else x
        places: Tensor = _Spread.apply(x, packed.places_T, rows * longest)  # type: ignore[no-untyped-call]  # torch's
        return places.view(rows, longest, *x.shape[1:]).transpose(1, 2)

    if _wants_own_heads(q, k):
        k, v = (x.repeat_interleave(len(q) // len(x), dim=0) for x in (k, v))
    is_windowed = window is not None and window < longest
    out_BALD = functional.scaled_dot_product_attention(
        padded(q), padded(k), padded(v), attn_mask=seen(longest, window, q.device) if is_windowed else None,
        is_causal=not is_windowed, scale=scale, enable_gqa=len(k) != len(q),
    )  # fmt: skip
    own_U = packed.own(packed.places_T)
    return _take(out_BALD.transpose(1, 2).flatten(0, 1), own_U)


class _Spread(torch.autograd.Function):
    """Put rows of [T, ...] at their places of [places, ...], with zeros elsewhere. autograd's own backward
    pass would add up where there is nothing to add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places_T: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(places_T)
        return x.new_zeros(size, *x.shape[1:]).index_copy_(0, places_T, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (places_T,) = ctx.saved_tensors
        return gradients[0].index_select(0, places_T), None, None


class _Gather(torch.autograd.Function):
    """Take rows of [places, ...]. If a row is taken more than once, its gradients are added up in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, may_repeat: bool) -> Tensor:
        ctx.save_for_backward(places)
        ctx.size, ctx.may_repeat = len(x), may_repeat
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        gradient = gradients[0]
        shape = ctx.size, *gradient.shape[1:]
        if not ctx.may_repeat:
            return gradient.new_zeros(shape).index_copy_(0, places, gradient), None, None
        total = gradient.new_zeros(shape, dtype=torch.float32).index_add_(0, places, gradient.float())
        return total.to(gradient.dtype), None, None


CACHED = 1 << 20
"""Largest number of attention weights in memory at once."""
QUERIES = 128
"""Number of tokens of a row that attend in one product, to the tokens before them and to themselves."""


class ShortAttention(torch.autograd.Function):
    """Attention by matrix products, a few rows at a time, so that the attention weights stay in the cache.
    The backward pass computes them again. On CPUs and for short rows it takes half the time of torch's tiled
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


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
