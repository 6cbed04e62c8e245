"""The local engine: sampling with a KV cache that grows in steps and drops finished rows.

Dimensions: B unfinished rows, V vocabulary, K tokens in the cache (prompts padded on the left), D size of a
head, T tokens of packed prompts, U different tokens among them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rlhf.config import ConfigError
from rlhf.distributed.batching import token_budget_batches
from rlhf.distributed.compute import Compute
from rlhf.generation.cpu_decoder import LeanDecoder, is_lean
from rlhf.generation.lockstep import in_step
from rlhf.models.base import ATTENTION, check_rows
from rlhf.models.packed_batch import Packed
from rlhf.rl.rollout import Rollout

PREFILL_TOKENS = 4096
"""Most prompt tokens in one pass of the model; a single prompt may be longer."""


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int,
    temperature: float,
    stop_ids: Sequence[int],
    pad_id: int,
    uniform_BR: Tensor,
    batch_rows: int,
    top_p: float = 1.0,
    copies: bool = True,
    together: Compute | None = None,
    on_rows: Callable[[int], None] = lambda rows: None,
    on_token: Callable[[Tensor], None] = lambda ids: None,
) -> Rollout:
    """Sample one response per prompt.

    Prompts of similar length decode together. A row that has sampled a stop token leaves the cache, so only
    sampled tokens cost time. Temperature 0 is greedy. The result is in the order of the prompts, with the
    engine's log-probabilities (at this temperature, before top_p).

    Args:
        prompts: 1-D long, at least one token each.
        uniform_BR: [prompts, max_new_tokens] in [0, 1): random numbers for each row, so that a response
            depends neither on the batch nor on the ranks.
        batch_rows: rows decoded together.
        copies: whether weights may be copied during the call, so that CPUs multiply them faster.
        together: the ranks that share the model's weights and gather them layer by layer. All of them must
            call this, each with its own prompts, or none.
        on_rows: called with the number of newly finished rows.
        on_token: called after each decoding step, with the new tokens [B] of the unfinished rows.
    """
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    check_rows(model.config, max(map(len, prompts), default=0) + max_new_tokens)
    responses: list[Tensor] = [torch.empty(0, dtype=torch.long)] * len(prompts)
    logps: list[Tensor] = [torch.empty(0)] * len(prompts)
    stopped = torch.zeros(len(prompts), dtype=torch.bool)
    stops = torch.tensor(sorted(stop_ids), device=model.device)
    lean = None
    # the copies take as long as several tokens: a single answer may end before they pay off
    if copies and together is None and len(prompts) > 1 and is_lean(model, growing_cache(model)):
        lean = LeanDecoder(model, batch_rows)
    # weights that are gathered in inference mode could not be trained later
    no_graph = torch.inference_mode() if together is None else torch.no_grad()
    with no_graph, nullcontext() if together is None else in_step(model, together):
        for start in range(0, len(order), batch_rows):
            rows = order[start : start + batch_rows]
            decoded = _decode(
                model,
                lean,
                [prompts[row] for row in rows],
                max_new_tokens,
                temperature,
                top_p,
                stops,
                pad_id,
                uniform_BR[rows],
                on_token,
            )
            for row, (ids, logp, ended) in zip(rows, decoded, strict=True):
                responses[row], logps[row], stopped[row] = ids, logp, ended
            on_rows(len(rows))
    responses, logps = (
        [ids.clone() for ids in responses],
        [logp.clone() for logp in logps],
    )  # clones are not inference tensors, so autograd can save them
    return Rollout(list(prompts), responses, stopped, logps)


def _decode(
    model: PreTrainedModel,
    lean: LeanDecoder | None,
    prompts: list[Tensor],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    stops: Tensor,
    pad_id: int,
    uniform_BR: Tensor,
    on_token: Callable[[Tensor], None],
) -> list[tuple[Tensor, Tensor, bool]]:
    device = model.device
    tokens = torch.full((len(prompts), max_new_tokens), pad_id, device=device)
    logps = torch.zeros(len(prompts), max_new_tokens, device=device)
    lengths = torch.full((len(prompts),), max_new_tokens, device=device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    uniform_BR = uniform_BR.to(device)
    active_B = torch.arange(len(prompts), device=device)  # index of the prompt of each row in the cache
    cache, logits_BV, mask_BK = _prefill(model, prompts, pad_id)
    position_B = mask_BK.sum(-1)

    for step in range(max_new_tokens):
        token_B, logp_B = _sample(logits_BV.float(), temperature, top_p, uniform_BR[active_B, step])
        tokens[active_B, step], logps[active_B, step] = token_B, logp_B
        on_token(token_B)
        stop_B = torch.isin(token_B, stops)
        if bool(stop_B.any()):
            finished = active_B[stop_B]
            lengths[finished], ended[finished] = step + 1, True
            unfinished = (~stop_B).nonzero().squeeze(-1)
            if len(unfinished) == 0:
                break
            # batch_select_indices does not support state-space layers
            cache.reorder_cache(unfinished)  # type: ignore[arg-type]  # typed as LongTensor
            active_B, token_B, mask_BK, position_B = (
                active_B[unfinished], token_B[unfinished], mask_BK[unfinished], position_B[unfinished]
            )  # fmt: skip
            mask_BK = without_padding(cache, mask_BK)
        if step + 1 == max_new_tokens:
            break
        mask_BK = torch.cat([mask_BK, mask_BK.new_ones(len(mask_BK), 1)], dim=1)
        if lean:
            logits_BV = lean(token_B, mask_BK, position_B, cache)
        else:
            logits_BV = model(
                input_ids=token_B[:, None],
                attention_mask=mask_BK,
                position_ids=position_B[:, None],
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
        position_B = position_B + 1

    tokens, logps = tokens.cpu(), logps.cpu()
    return [
        (tokens[row, :length], logps[row, :length], bool(ended[row]))
        for row, length in enumerate(lengths.tolist())
    ]


def _prefill(
    model: PreTrainedModel, prompts: list[Tensor], pad_id: int
) -> tuple[DynamicCache, Tensor, Tensor]:
    """Read the prompts into a cache, the longest first. Equal prompts are read once. Groups of prompts go
    through the model one after the other, so that activations do not grow with the number of prompts. Models
    with other states than keys and values read all prompts at once.

    Returns:
        The cache, the logits [B, V] after the prompts, and a mask [B, K], 1 where the cache holds a token.
        Prompts are padded on the left.
    """
    keys = [tuple(prompt.tolist()) for prompt in prompts]
    unique = dict(zip(keys, prompts, strict=True))
    places = {ids: place for place, ids in enumerate(unique)}
    prompts = [*unique.values()]
    layers, width = growing_cache(model).layers, len(prompts[0])
    is_packed = model.config._attn_implementation == ATTENTION
    is_packed = is_packed and all(isinstance(layer, GrowingLayer) for layer in layers)
    tokens = [len(row) if is_packed else width for row in prompts]
    can_join = all(type(layer) in JOINABLE_LAYERS for layer in layers)
    groups = token_budget_batches(tokens, PREFILL_TOKENS if can_join else sum(tokens))
    parts = [
        _prefill_group(model, [prompts[row] for row in group], width, pad_id, is_packed) for group in groups
    ]
    caches, logits, masks = zip(*parts, strict=True)
    cache, logits_BV, mask_BK = joined(caches), torch.cat(logits), torch.cat(masks)
    if len(places) < len(keys):
        place_B = torch.tensor([places[ids] for ids in keys], device=model.device)
        cache.reorder_cache(place_B)  # type: ignore[arg-type]  # typed as LongTensor
        logits_BV, mask_BK = logits_BV[place_B], mask_BK[place_B]
    return cache, logits_BV, mask_BK


def _prefill_group(
    model: PreTrainedModel, prompts: list[Tensor], width: int, pad_id: int, is_packed: bool
) -> tuple[DynamicCache, Tensor, Tensor]:
    packed, cache = Packed(prompts, model.device), growing_cache(model)
    mask_BK = torch.arange(width) >= width - torch.tensor(packed.lengths)[:, None]
    mask_BK = mask_BK.long().to(model.device)
    if is_packed:
        for layer in cache.layers:
            assert isinstance(layer, GrowingLayer)
            layer.prompts = (packed.token_T, mask_BK.flatten().nonzero().squeeze(-1), *mask_BK.shape)
        last = packed.token_T[packed.last_B]
        output = model(**packed.call(), past_key_values=cache, use_cache=True, logits_to_keep=last)
        return cache, output.logits[0], mask_BK
    ids_BK = torch.full_like(mask_BK, pad_id)
    ids_BK[mask_BK.bool()] = packed.ids_T
    # an index: for the number 1 transformers makes a view, and torch copies the output layer for each row
    last = torch.tensor([-1], device=model.device)
    output = model(
        input_ids=ids_BK,
        attention_mask=mask_BK,
        position_ids=(mask_BK.cumsum(-1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=last,
    )
    return cache, output.logits[:, -1], mask_BK


def _sample(logits_BV: Tensor, temperature: float, top_p: float, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    scaled_BV = logits_BV / temperature if temperature not in (0.0, 1.0) else logits_BV
    highest_B1 = scaled_BV.amax(-1, keepdim=True)  # max(), with its index, is slower on CPUs
    weight_BV = (scaled_BV - highest_B1).exp_()
    total_B = weight_BV.sum(-1)
    check_finite(total_B)
    if temperature == 0.0:
        token_B = scaled_BV.argmax(-1)
    else:
        token_B = _draw(_nucleus(weight_BV, total_B, top_p), uniform_B)
    logp_B = (scaled_BV.gather(-1, token_B[:, None]) - highest_B1).squeeze(-1) - total_B.log()
    return token_B, logp_B


def _draw(weight_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """One index per row, with probability proportional to its weight, by the inverse distribution function.

    torch.multinomial is much slower on CPUs. An index of weight 0 is never drawn: the first cumulative weight
    that exceeds a number below the total belongs to an index with a positive weight.
    """
    cumulative_BV = weight_BV.cumsum(-1)
    total_B1 = cumulative_BV[:, -1:]
    threshold_B1 = torch.minimum(
        uniform_B[:, None] * total_B1, total_B1.nextafter(torch.zeros_like(total_B1))
    )
    return torch.searchsorted(cumulative_BV, threshold_B1, right=True).squeeze(-1)


def check_finite(values: Tensor) -> None:
    """Check that values are finite. They must depend on all logits of a row, so that a NaN in one shows.

    Raises:
        ConfigError: a value is not finite, so no token can be chosen.
    """
    if not bool(values.isfinite().all()):
        raise ConfigError(
            "A policy's logits are not finite: training has broken its weights. "
            "Lower the learning rate of the stage that trains it (ppo.optim.lr or sft.optim.lr)."
        )


def _nucleus(weight_BV: Tensor, total_B: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of tokens whose probabilities reach top_p (Holtzman et al. 2020)."""
    if top_p >= 1.0:
        return weight_BV
    ordered_BV, index_BV = weight_BV.sort(-1, descending=True)
    ordered_BV[ordered_BV.cumsum(-1) - ordered_BV >= top_p * total_B[:, None]] = 0.0
    return torch.zeros_like(weight_BV).scatter(-1, index_BV, ordered_BV)


def growing_cache(model: PreTrainedModel) -> DynamicCache:
    """transformers' cache, but its plain layers grow in steps instead of being copied for every token.

    Each call of the model then needs an attention_mask, which hides the unused places. Models that compute
    values from the mask's length (Bloom's ALiBi) get the plain cache.
    """
    cache = DynamicCache(config=model.config)
    if model._supports_attention_backend:
        cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class GrowingLayer(DynamicLayer):
    """A cache layer with buffers `keys` and `values` [B, heads, capacity, D]. Unused places are zeros, which
    the mask hides. The model gets the full buffers, because matrix products would copy parts of them."""

    GROWTH_TOKENS = 64
    """Tokens by which the buffers grow."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped
        self._length = 0
        self.prompts: tuple[Tensor, Tensor, int, int] | None = None
        """Set before a first call with packed prompts: index of each of the T tokens among the U, index of
        each of the T in the flattened [B, K], B, and K."""

    def get_seq_length(self) -> int:
        """Number of tokens so far, padding included."""
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that `update` will return."""
        return self._capacity_for(self._length + query_length), 0

    def _capacity_for(self, length: int) -> int:
        if self.keys is None:
            return length
        capacity = self.keys.shape[-2]
        return capacity if length <= capacity else length + self.GROWTH_TOKENS

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the new tokens' keys and values, and return all of them."""
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = self._padded(key_states), self._padded(value_states)
            self._length = self.keys.shape[-2]
            return key_states, value_states
        start, self._length = self._length, self._length + key_states.shape[-2]
        capacity = self._capacity_for(self._length)
        if capacity > self.keys.shape[-2]:
            self.keys, self.values = _widened(self.keys, capacity), _widened(self.values, capacity)
        self.keys[:, :, start : self._length] = key_states
        self.values[:, :, start : self._length] = value_states
        return self.keys, self.values

    def _padded(self, x: Tensor) -> Tensor:
        """[1, heads, U, D] of packed prompts -> [B, heads, K, D]."""
        if self.prompts is None:
            return x
        token_T, places_T, rows, width = self.prompts
        _, heads, _, size = x.shape
        padded = x.new_zeros(rows * width, heads, size).index_copy_(
            0, places_T, x[0].transpose(0, 1)[token_T]
        )
        return padded.view(rows, width, heads, size).transpose(1, 2).contiguous()

    def cut(self, start: int, stop: int) -> None:
        """Drop the columns from `start` to before `stop`."""
        assert self.keys is not None and self.values is not None
        self.keys = torch.cat([self.keys[:, :, :start], self.keys[:, :, stop:]], dim=2)
        self.values = torch.cat([self.values[:, :, :start], self.values[:, :, stop:]], dim=2)
        self._length -= stop - start


def _widened(x: Tensor, capacity: int) -> Tensor:
    """[B, heads, K, D] -> [B, heads, capacity, D], with zeros at the end."""
    wider = x.new_zeros(*x.shape[:2], capacity, x.shape[-1])
    wider[:, :, : x.shape[-2]] = x
    return wider


JOINABLE_LAYERS = (GrowingLayer, DynamicLayer, DynamicSlidingWindowLayer)
"""Cache layers that hold keys and values [B, heads, K, D] and nothing else."""


def joined(caches: Sequence[DynamicCache]) -> DynamicCache:
    """Move the rows of all caches into the first one, layer by layer. All caches have the same width K."""
    if len(caches) > 1:
        for layers in zip(*(cache.layers for cache in caches), strict=True):
            layers[0].keys = torch.cat([layer.keys for layer in layers])
            layers[0].values = torch.cat([layer.values for layer in layers])
            for layer in layers[1:]:
                layer.keys = layer.values = None
    return caches[0]


def without_padding(cache: DynamicCache, mask_BK: Tensor) -> Tensor:
    """Drop leading columns that are padding in every row, if every layer can do so. Virtual tokens stay.

    Returns:
        The mask of the remaining columns.
    """
    layers = [layer for layer in cache.layers if isinstance(layer, GrowingLayer)]
    unused = int(mask_BK.any(0).int().argmax())
    if unused == 0 or len(layers) < len(cache.layers):
        return mask_BK
    virtual = cache.get_seq_length() - mask_BK.shape[1]
    for layer in layers:
        layer.cut(virtual, virtual + unused)
    return mask_BK[:, unused:]
