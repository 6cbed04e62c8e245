"""Hidden states of rows that are laid end to end, so that the model computes no padding.

Linear layers and norms see one long row of U tokens. Only attention separates the rows: by a variable-length
kernel on GPUs, by matrix products on CPUs (`ShortAttention`), and otherwise by padding inside the attention
alone. Dimensions: B rows, T tokens of all rows, U different tokens among them, L tokens of the longest row, Q
query tokens among the L, H hidden size, A heads, S heads that share a key head, D size of a head.
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
from rlhf.models.packed_batch import Group, Packed, aligned, visible_keys
from rlhf.models.peft.target_modules import backbone_of

MAX_SHORT_TOKENS = 1024
"""Longest row, in tokens, for which attention on a CPU uses matrix products."""
LAYER_TYPES = {"full_attention", "sliding_attention"}


def hidden_states(model: PreTrainedModel, packed: Packed, at_N: Tensor | None = None) -> Tensor:
    """Final hidden states [N, H], before any head, at the tokens `at_N` of the T (each at most once); None
    for all T tokens."""
    check_rows(model.config, packed.longest)
    backbone = backbone_of(model)
    if model.config._attn_implementation != ATTENTION:
        ids_BL = packed.ids_T.new_zeros(len(packed.lengths) * packed.longest)
        ids_BL[packed.places_T] = packed.ids_T
        ids_BL = ids_BL.view(-1, packed.longest)
        positions_BL = torch.arange(packed.longest, device=ids_BL.device).expand_as(ids_BL)
        # padding comes after every real token, so causal attention needs no mask
        hidden_BLH = backbone(input_ids=ids_BL, position_ids=positions_BL, use_cache=False).last_hidden_state
        places = packed.places_T if at_N is None else packed.places_T[at_N]
        return _take(hidden_BLH.flatten(0, 1), places)
    hidden_1UH: Tensor = backbone(**packed.call(), use_cache=False).last_hidden_state
    tokens = packed.token_T if at_N is None else packed.token_T[at_N]
    return _take(hidden_1UH[0], tokens, may_repeat=packed.has_shared)


def _take(x: Tensor, places: Tensor, *, may_repeat: bool = False) -> Tensor:
    """x[places]."""
    taken: Tensor = _Gather.apply(x, places, may_repeat)  # type: ignore[no-untyped-call]  # torch's
    return taken


def pack_where_possible(model: PreTrainedModel, compute: Compute | None = None) -> None:
    """Let a model take packed rows if only its attention mixes tokens. Other models get padded rows.

    Args:
        compute: the ranks, if all of them have this model.
    """
    if not may_pack(model):
        return
    model.set_attn_implementation(ATTENTION)
    leaks = _leaks(model) if compute is None else compute.ask_once(lambda: _leaks(model))
    if leaks:  # for example by state-space layers next to attention
        model.set_attn_implementation("sdpa")


def may_pack(model: PreTrainedModel) -> bool:
    """Whether this kind of model can probably take packed rows. The check reads no weights, so True is not
    certain."""
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
    """The model does not pass the packed rows on to its attention, or adds a mask of its own."""


@torch.no_grad()
def _leaks(model: PreTrainedModel) -> bool:
    """Whether the states of a row depend on the row before it, by even one bit.

    In a mixture of experts, rounding alone can cause this. Its rows are then padded without need.
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
        packed: the packed rows; None for calls without them, such as decoding.

    Returns:
        [1, U, A, D].
    """
    if packed is None:
        if attention_mask is not None and attention_mask.dtype == torch.long:  # the mask of `Packed.call`
            raise _UnpackableError(
                f"{type(module).__name__} is not told of rows laid end to end: model.attention=sdpa pads them"
            )
        if query.device.type == "cpu" and query.shape[2] == 1:
            return _of_one_token(query, key, value, attention_mask, scaling or query.shape[-1] ** -0.5), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            sliding_window=sliding_window, **options,
        )  # fmt: skip
    if attention_mask is not None and attention_mask.numel() > 1:  # not the mask of `Packed.call`
        raise _UnpackableError(
            f"{type(module).__name__} has a mask of its own: model.attention=sdpa pads its rows"
        )
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]
    assert not unknown, f"attention with {unknown} cannot be packed"
    assert dropout == 0.0
    attend = _by_kernel if _has_kernel(query) else _by_row
    return attend(query[0], key[0], value[0], packed, scaling, sliding_window)[None], None


def _of_one_token(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of each row's newest token to its cache, by matrix products, which are faster than torch's
    kernel on CPUs. q [B, A, 1, D] and k, v [B, heads, K, D] give [B, 1, A, D]; mask [B, 1, 1, K]."""
    rows, heads, length, size = k.shape
    q, k, v = q.reshape(rows * heads, -1, size), k.flatten(0, 1), v.flatten(0, 1)
    scores = torch.bmm(q, k.mT).mul_(scale).view(rows, -1, 1, length)
    if mask is not None:
        scores.masked_fill_(~mask, float("-inf"))
    out = torch.bmm(scores.softmax(-1).view(rows * heads, -1, length), v)
    return out.view(rows, 1, -1, size)


def _needs_key_copies(q: Tensor, k: Tensor) -> bool:
    """Whether each query head needs its own copy of keys and values, because there are fewer key heads. On
    GPUs only FlashAttention supports such groups, and it has no fp32. Without the copies torch would take its
    math path, which holds all attention weights of a pass."""
    return q.device.type != "cpu" and q.dtype == torch.float32 and len(k) != len(q)


def _has_kernel(query: Tensor) -> bool:
    """Whether FlashAttention 2 can run: it needs an Ampere GPU or newer, a 16-bit dtype, and a head size that
    is a multiple of 8 and at most 256."""
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
    )  # type: ignore[assignment]  # a tuple only on request  # fmt: skip
    return out


def _by_row(
    q: Tensor, k: Tensor, v: Tensor, packed: Packed, scale: float | None, window: int | None
) -> Tensor:
    scale = scale or q.shape[-1] ** -0.5
    if q.device.type == "cpu" and packed.longest <= MAX_SHORT_TOKENS:
        out: Tensor = ShortAttention.apply(q, k, v, packed, scale, window)  # type: ignore[no-untyped-call]  # torch's
        return out
    rows, longest = len(packed.lengths), packed.longest

    def padded(x: Tensor) -> Tensor:  # [heads, U, D] -> [B, heads, L, D]
        x = x.transpose(0, 1)
        x = _take(x, packed.token_T, may_repeat=True) if packed.has_shared else x
        places: Tensor = _Spread.apply(x, packed.places_T, rows * longest)  # type: ignore[no-untyped-call]  # torch's
        return places.view(rows, longest, *x.shape[1:]).transpose(1, 2)

    if _needs_key_copies(q, k):
        k, v = (x.repeat_interleave(len(q) // len(x), dim=0) for x in (k, v))
    is_windowed = window is not None and window < longest
    out_BALD = functional.scaled_dot_product_attention(
        padded(q), padded(k), padded(v),
        attn_mask=visible_keys(longest, window, q.device) if is_windowed else None,
        is_causal=not is_windowed, scale=scale, enable_gqa=len(k) != len(q),
    )  # fmt: skip
    own_U = packed.own(packed.places_T)
    return _take(out_BALD.transpose(1, 2).flatten(0, 1), own_U)


class _Spread(torch.autograd.Function):
    """Copy rows of [T, ...] to their places in [places, ...], with zeros elsewhere. autograd's own backward
    pass would add gradients up, although each place gets one row at most."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places_T: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(places_T)
        return x.new_zeros(size, *x.shape[1:]).index_copy_(0, places_T, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (places_T,) = ctx.saved_tensors
        return gradients[0].index_select(0, places_T), None, None


class _Gather(torch.autograd.Function):
    """x[places]. If a row is taken more than once, its gradients are added up in fp32."""

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


CACHED_WEIGHTS = 1 << 20
"""Most attention weights of a group of rows, so that they fit into the CPU's cache. One row alone may
have more."""
QUERY_CHUNK = 128
"""Number of query tokens per row in one matrix product."""


class ShortAttention(torch.autograd.Function):
    """Attention by matrix products, a few rows at a time, so that the attention weights stay in the CPU's
    cache. The backward pass computes them again. For short rows on CPUs this is faster than torch's tiled
    kernel and needs as little memory. q [A, U, D] and k, v [A / S, U, D] give [U, A, D]."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, packed: Packed, scale: float, window: int | None
    ) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        places = _places(packed, len(q), len(k))
        outs = q.new_empty(places.num_queries, q.shape[-1])
        for group in places.groups:
            rows_q, rows_k, rows_v = group.queries(q), group.keys(k), group.keys(v)
            out = outs[group.slots].view_as(rows_q)
            for part, mask_bias in group.parts(packed, window, q.dtype):
                keys = slice(mask_bias.shape[1])
                weights = _weights(rows_q[:, :, part], rows_k[:, keys], mask_bias, scale)
                out[:, :, part] = torch.bmm(weights, rows_v[:, keys]).view_as(out[:, :, part])
        ctx.save_for_backward(q, k, v)
        ctx.arguments = packed, scale, window
        return outs.index_select(0, places.slot_UA.flatten()).view(-1, *q.shape[::2])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q, k, v = ctx.saved_tensors
        packed, scale, window = ctx.arguments
        places, size = _places(packed, len(q), len(k)), q.shape[-1]
        grad_outs = torch.cat([gradients[0].reshape(-1, size), q.new_zeros(1, size)])
        grad_queries = q.new_empty(places.num_queries, size)
        grad_keys, grad_values = (q.new_zeros(len(places.order), size) for _ in range(2))
        for group in places.groups:
            rows_q, rows_k, rows_v = group.queries(q), group.keys(k), group.keys(v)
            group_grad_out = grad_outs.index_select(0, group.result_index).view_as(rows_q)
            group_grad_q = grad_queries[group.slots].view_as(rows_q)
            group_grad_k, group_grad_v = (
                each[group.key_slots].view_as(rows_k) for each in (grad_keys, grad_values)
            )
            for part, mask_bias in group.parts(packed, window, q.dtype):
                keys = slice(mask_bias.shape[1])
                part_q, part_grad_out = (
                    rows_q[:, :, part].flatten(1, 2),
                    group_grad_out[:, :, part].flatten(1, 2),
                )
                part_k, part_v = rows_k[:, keys], rows_v[:, keys]
                weights = _weights(rows_q[:, :, part], part_k, mask_bias, scale)
                grad_weights = torch.bmm(part_grad_out, part_v.mT)
                grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
                group_grad_q[:, :, part] = (
                    torch.bmm(grad_scores, part_k).mul_(scale).view_as(group_grad_q[:, :, part])
                )
                group_grad_k[:, keys].baddbmm_(grad_scores.mT, part_q, alpha=scale)
                group_grad_v[:, keys].baddbmm_(weights.mT, part_grad_out)
        grad_q = grad_queries.index_select(0, places.slot_UA.T.flatten()).view_as(q)
        # a shared token sums the gradients of all its rows; padding adds zeros
        grad_k, grad_v = (
            functional.embedding_bag(places.order, each, places.firsts, mode="sum").view_as(k)
            for each in (grad_keys, grad_values)
        )
        return grad_q, grad_k, grad_v, None, None, None


class _Places(NamedTuple):
    """Slots of the queries and keys of all groups. One slot is one token of one head in one row."""

    groups: list[_Group]
    num_queries: int
    """Number of query slots."""
    slot_UA: Tensor
    """The query slot that computes the result of each token and head."""
    order: Tensor
    """Key slots, sorted by head and token."""
    firsts: Tensor
    """[A / S * U]: index in `order` of the first key slot of each head and token."""


class _Group(NamedTuple):
    """Rows that attend in the same matrix products, with the slots of their tokens."""

    rows: Group
    query_index: Tensor
    """For each query slot [A / S, rows, S, Q]: index of its query in the flattened [A, U]."""
    result_index: Tensor
    """For each query slot, flattened: index of its result in the flattened [U, A]. It is U * A (one past the
    end) for padding, and for tokens whose result another row computes."""
    key_index: Tensor
    """For each key slot [A / S, rows, L]: index of its key in the flattened [A / S, U]."""
    slots: slice
    """The group's query slots among those of all groups."""
    key_slots: slice
    """The group's key slots among those of all groups."""

    def queries(self, q: Tensor) -> Tensor:
        """[A, U, D] -> [rows * A / S, S, Q, D]."""
        heads, rows, sharing, num_queries = self.query_index.shape
        return (
            q.flatten(0, 1)
            .index_select(0, self.query_index.flatten())
            .view(heads * rows, sharing, num_queries, -1)
        )

    def keys(self, k: Tensor) -> Tensor:
        """[A / S, U, D] -> [rows * A / S, L, D]."""
        heads, rows, length = self.key_index.shape
        return k.flatten(0, 1).index_select(0, self.key_index.flatten()).view(heads * rows, length, -1)

    def parts(self, packed: Packed, window: int | None, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Parts of the Q queries, each with the mask [part, keys] that is added to its scores."""
        mask_bias, first = packed.mask_bias(self.rows.tokens.shape[1], window, dtype), self.rows.first
        for start in range(first, self.rows.longest, QUERY_CHUNK):
            stop = min(start + QUERY_CHUNK, self.rows.longest)
            yield slice(start - first, stop - first), mask_bias[start:stop, : aligned(stop)]


def _places(packed: Packed, num_heads: int, num_key_heads: int) -> _Places:
    """The slots for these numbers of query heads and key heads, cached between layers."""
    key = num_heads, num_key_heads
    if key not in packed.layer_cache:
        packed.layer_cache[key] = _find_places(packed, num_heads, num_key_heads)
    places: _Places = packed.layer_cache[key]
    return places


def _find_places(packed: Packed, num_heads: int, num_key_heads: int) -> _Places:
    size, sharing = packed.size, num_heads // num_key_heads
    key_heads, head = torch.arange(num_key_heads), torch.arange(num_heads).view(num_key_heads, 1, sharing, 1)
    slot_UA = torch.empty(size, num_heads, dtype=torch.long)
    groups: list[_Group] = []
    num_queries = num_key_slots = 0
    for rows in packed.groups(CACHED_WEIGHTS // num_heads, QUERY_CHUNK):
        query_part = slice(rows.first, rows.longest)
        tokens, is_own = rows.tokens[:, None, query_part], rows.is_own[:, None, query_part]
        query_index = head * size + tokens
        result_index = torch.where(is_own, tokens * num_heads + head, size * num_heads)
        key_index = key_heads[:, None, None] * size + rows.tokens
        has_result = result_index < size * num_heads
        slots = torch.arange(num_queries, num_queries + query_index.numel()).view_as(query_index)
        slot_UA.view(-1)[result_index[has_result]] = slots[has_result]
        key_slots = slice(num_key_slots, num_key_slots + key_index.numel())
        groups.append(
            _Group(
                rows,
                query_index,
                result_index.flatten(),
                key_index,
                slice(num_queries, num_queries + query_index.numel()),
                key_slots,
            )
        )
        num_queries, num_key_slots = num_queries + query_index.numel(), num_key_slots + key_index.numel()
    all_key_index = torch.cat([group.key_index.flatten() for group in groups])
    order = all_key_index.argsort(stable=True)
    firsts = torch.searchsorted(all_key_index[order], torch.arange(num_key_heads * size))
    return _Places(groups, num_queries, slot_UA, order, firsts)


def _weights(q: Tensor, k: Tensor, mask_bias: Tensor, scale: float) -> Tensor:
    """Attention weights [N, S * Q, K] of q [N, S, Q, D], whose S heads share a key head, and k [N, K, D]."""
    bias = mask_bias.repeat(q.shape[1], 1).expand(len(q), -1, -1)
    return torch.baddbmm(bias, q.flatten(1, 2), k.mT, alpha=scale).softmax(-1)


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
