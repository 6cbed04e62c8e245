"""Rows laid end to end, so that no padding goes through a model.

Linear layers and norms see one long row of T tokens; only attention looks at each row by itself: through a
variable-length kernel on GPUs, and elsewhere padded for the moment of the attention alone. Dimensions:
B rows, T tokens of all rows, L tokens of the longest, H hidden size, A heads, D size of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "packed"
"""The name under which transformers' models find `attention`; `model.attention=packed`."""
SHORT = 256
"""Tokens of the longest row up to which attention on CPUs goes by matrix products."""
LAYER_TYPES = {"full_attention", "sliding_attention"}


class Packed:
    """Token ids of B rows, laid end to end."""

    def __init__(self, rows: Sequence[Tensor], device: torch.device | str) -> None:
        self.lengths = [len(row) for row in rows]
        self.ids_T = torch.cat(list(rows)).to(device)

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.ids_T)

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
        """Where each token stands in [B, L], flattened."""
        row_T = torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths))
        return row_T.to(self.ids_T.device) * self.longest + self.positions_T

    @property
    def last_B(self) -> Tensor:
        """Each row's last token."""
        return self.starts[1:] - 1


def hidden_states(model: PreTrainedModel, packed: Packed) -> Tensor:
    """Final hidden states [T, H], before any head."""
    backbone = getattr(model, model.base_model_prefix)
    if model.config._attn_implementation != ATTENTION:
        ids_BL = packed.ids_T.new_zeros(len(packed.lengths) * packed.longest)
        ids_BL[packed.places_T] = packed.ids_T
        ids_BL = ids_BL.view(-1, packed.longest)
        positions_BL = torch.arange(packed.longest, device=ids_BL.device).expand_as(ids_BL)
        # padding stands behind every real token, so causal attention needs no mask
        hidden_BLH = backbone(input_ids=ids_BL, position_ids=positions_BL, use_cache=False).last_hidden_state
        return hidden_BLH.flatten(0, 1)[packed.places_T]  # type: ignore[no-any-return]
    hidden_1TH: Tensor = backbone(
        input_ids=packed.ids_T[None],
        position_ids=packed.positions_T[None],
        attention_mask=packed.ids_T.new_zeros(1, 1, 1, 1),  # so transformers makes none of its own
        use_cache=False,
        packed=packed,
    ).last_hidden_state
    return hidden_1TH[0]


def take(x_T: Tensor, places: Tensor) -> Tensor:
    """x_T[places], where no place comes twice."""
    taken: Tensor = _Gather.apply(x_T, places)  # type: ignore[no-untyped-call]
    return taken


def pack_where_possible(model: PreTrainedModel) -> None:
    """Let a model take packed rows if nothing but attention mixes its tokens; others get padded ones."""
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or LAYER_TYPES)
    if model._supports_attention_backend and layers <= LAYER_TYPES:
        model.set_attn_implementation(ATTENTION)


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
    """What transformers calls in each layer.

    Args:
        query: [1, A, T, D]; key and value may have fewer heads.
        packed: the rows; None is a call that has nothing to do with them, such as decoding.

    Returns:
        [1, T, A, D].
    """
    if packed is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            sliding_window=sliding_window, **options,
        )  # fmt: skip
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]
    assert not unknown, f"attention with {unknown} cannot be packed"
    assert dropout == 0.0
    has_kernel = query.device.type == "cuda" and query.dtype in (torch.bfloat16, torch.float16)
    attend = _by_kernel if has_kernel else _by_row
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, D]
    return attend(q, k, v, packed, scaling, sliding_window)[None], None


def _by_kernel(
    q: Tensor, k: Tensor, v: Tensor, packed: Packed, scale: float | None, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    starts, longest = packed.starts.int(), packed.longest
    out: Tensor = varlen_attn(
        q, k, v, starts, starts, longest, longest, scale=scale,
        window_size=(-1 if window is None else window - 1, 0), enable_gqa=k.shape[1] != q.shape[1],
    )  # type: ignore[assignment]  # fmt: skip
    return out


def _by_row(
    q: Tensor, k: Tensor, v: Tensor, packed: Packed, scale: float | None, window: int | None
) -> Tensor:
    rows, longest = len(packed.lengths), packed.longest

    def padded(x: Tensor) -> Tensor:  # [B, heads, L, D]
        places: Tensor = _Spread.apply(x, packed.places_T, rows * longest)  # type: ignore[no-untyped-call]
        return places.view(rows, longest, *x.shape[1:]).transpose(1, 2)

    q, k, v = padded(q), padded(k), padded(v)
    distance = torch.arange(longest, device=q.device)[:, None] - torch.arange(longest, device=q.device)
    seen = distance >= 0
    is_windowed = False
    if window is not None and window < longest:
        is_windowed = True
        seen &= distance < window
    if longest <= SHORT and q.device.type == "cpu":
        out: Tensor = _ShortAttention.apply(q, k, v, seen, scale or q.shape[-1] ** -0.5)  # type: ignore[no-untyped-call]
    else:
        out = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen if is_windowed else None, is_causal=not is_windowed, scale=scale,
            enable_gqa=k.shape[1] != q.shape[1],
        )  # fmt: skip
    return take(out.transpose(1, 2).flatten(0, 1), packed.places_T)


class _ShortAttention(torch.autograd.Function):
    """Attention by matrix products, the weights computed anew on the way back. On CPUs and for short rows it
    takes half the time of torch's tiled kernel, and as little memory."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
        q = _ShortAttention._grouped(q, k.shape[1])
        out = torch.matmul(_ShortAttention._weights(q, k, seen, scale), v)
        ctx.save_for_backward(q, k, v, seen, out)
        ctx.scale = scale
        return out.view(len(out), -1, *k.shape[2:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, seen, out = ctx.saved_tensors
        gradient = gradients[0].reshape(out.shape)
        weights = _ShortAttention._weights(q, k, seen, ctx.scale)
        of_v = torch.matmul(weights.transpose(-1, -2), gradient)
        of_weights = torch.matmul(gradient, v.transpose(-1, -2)).float()
        of_weights -= (gradient.float() * out).sum(-1, keepdim=True)
        of_scores = of_weights.mul_(weights).mul_(ctx.scale).to(q.dtype)
        of_q = torch.matmul(of_scores, k)
        of_k = torch.matmul(of_scores.transpose(-1, -2), q)
        return of_q.view(len(q), -1, *k.shape[2:]), of_k, of_v, None, None

    @staticmethod
    def _grouped(q: Tensor, heads: int) -> Tensor:
        """[B, A, L, D] -> [B, heads, A / heads * L, D]: the queries that share a key stand together."""
        return q.reshape(len(q), heads, -1, q.shape[-1])

    @staticmethod
    def _weights(q: Tensor, k: Tensor, seen: Tensor, scale: float) -> Tensor:
        scores = torch.matmul(q, k.transpose(-1, -2)).float().mul_(scale)
        scores.unflatten(-2, (-1, len(seen))).masked_fill_(~seen, float("-inf"))
        return scores.softmax(-1).to(q.dtype)


class _Spread(torch.autograd.Function):
    """Rows of [T, ...] put at their places of [places, ...], zeros elsewhere. autograd's own way back adds up
    where nothing is to be added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places_T: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(places_T)
        return x.new_zeros(size, *x.shape[1:]).index_copy_(0, places_T, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (places_T,) = ctx.saved_tensors
        return gradients[0].index_select(0, places_T), None, None


class _Gather(torch.autograd.Function):
    """The inverse of `_Spread`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places_T: Tensor) -> Tensor:
        ctx.save_for_backward(places_T)
        ctx.size = len(x)
        return x.index_select(0, places_T)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (places_T,) = ctx.saved_tensors
        gradient = gradients[0]
        return gradient.new_zeros(ctx.size, *gradient.shape[1:]).index_copy_(0, places_T, gradient), None


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
