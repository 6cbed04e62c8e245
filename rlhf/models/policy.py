"""Log-probabilities of responses under a policy.

Dimensions: B sequences, T tokens, N response tokens of a micro-batch laid end to end, H hidden size,
R response tokens (padded). No [tokens, vocabulary] tensor is held for more than HEAD_CHUNK tokens at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from rlhf.config import ConfigError
from rlhf.data.batching import pad_right
from rlhf.distributed import Compute
from rlhf.rl.rollout import Rollout

HEAD_CHUNK = 256


@dataclass(frozen=True)
class Sequences:
    """A micro-batch of prompt + response rows, padded on the right, with explicit positions.

    Padding stands behind every real token, so causal attention never sees it and no attention mask is
    needed; position ids are then simply 0, 1, 2, ... on real tokens.
    """

    ids_BT: Tensor
    predicts_BT: Tensor
    """bool: true where the *next* token is a response token, so logits there predict it (t - 1)."""
    targets_N: Tensor
    """The response tokens, row by row."""
    mask_BR: Tensor
    """bool: true on response tokens, false on padding."""

    def to_rows(self, values_N: Tensor) -> Tensor:
        """Lay per-token values out as [B, R], zero on padding; differentiable."""
        rows = values_N.new_zeros(self.mask_BR.shape)
        return rows.masked_scatter(self.mask_BR, values_N)


def pad_sequences(
    prompts: Sequence[Tensor], responses: Sequence[Tensor], pad_id: int, device: torch.device
) -> Sequences:
    """Lay prompts and their responses (1-D, any length from 1) out as one padded batch."""
    ids_BT = pad_right([torch.cat(pair) for pair in zip(prompts, responses, strict=True)], pad_id)
    prompt_B = torch.tensor([len(row) for row in prompts])
    response_B = torch.tensor([len(row) for row in responses])
    assert bool((prompt_B > 0).all()), "a response needs at least one token before it"
    position_T = torch.arange(ids_BT.shape[1])
    first_B = prompt_B - 1
    predicts_BT = (position_T >= first_B[:, None]) & (position_T < (first_B + response_B)[:, None])
    mask_BR = torch.arange(int(response_B.max())) < response_B[:, None]
    return Sequences(
        ids_BT.to(device), predicts_BT.to(device), torch.cat(list(responses)).to(device), mask_BR.to(device)
    )


class TokenStatistics(NamedTuple):
    """Per response token, fp32."""

    logp_N: Tensor
    """Nats; carries the gradient."""
    entropy_N: Tensor
    """Nats; detached."""


def hidden_states(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """Final hidden states [B, T, H] of right-padded ids, before any head."""
    backbone = getattr(model, model.base_model_prefix)
    positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
    hidden: Tensor = backbone(input_ids=ids_BT, position_ids=positions_BT, use_cache=False).last_hidden_state
    return hidden


def response_statistics(model: PreTrainedModel, batch: Sequences, temperature: float) -> TokenStatistics:
    """Log-probability and entropy of every response token, in fp32."""
    hidden_NH = hidden_states(model, batch.ids_BT)[batch.predicts_BT]
    return head_statistics(hidden_NH, model.get_output_embeddings(), batch.targets_N, temperature)


class ResponseModel(nn.Module):
    """A policy whose forward pass is `response_statistics`, for the engine that trains it."""

    def __init__(self, policy: PreTrainedModel) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, batch: Sequences, temperature: float) -> TokenStatistics:
        """Log-probability and entropy of every response token."""
        return response_statistics(self.policy, batch, temperature)


def head_statistics(
    hidden_NH: Tensor, head: nn.Module, targets_N: Tensor, temperature: float
) -> TokenStatistics:
    """The head applied to HEAD_CHUNK tokens at a time; logits are recomputed in the backward pass."""
    pieces = []
    for hidden, targets in zip(hidden_NH.split(HEAD_CHUNK), targets_N.split(HEAD_CHUNK), strict=True):
        if torch.is_grad_enabled():
            pieces.append(checkpoint(_chunk, hidden, head, targets, temperature, use_reentrant=False))
        else:
            pieces.append(_chunk(hidden, head, targets, temperature))
    return TokenStatistics(
        torch.cat([piece[0] for piece in pieces]), torch.cat([piece[1] for piece in pieces])
    )


def _chunk(
    hidden_CH: Tensor, head: nn.Module, targets_C: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    logits_CV = head(hidden_CH).float() / temperature
    logp_C = -functional.cross_entropy(logits_CV, targets_C, reduction="none")
    with torch.no_grad():
        logp_CV = logits_CV.log_softmax(-1)
        entropy_C = -(logp_CV.exp() * logp_CV).sum(-1)
    return logp_C, entropy_C


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Refuse models whose logits are more than head(hidden): soft-capped, scaled or biased ones.

    Raises:
        ConfigError: the chunked head would train something else than the model.
    """
    ids_BT = torch.arange(min(model.config.get_text_config().vocab_size, 64), device=model.device)[None]
    logits = model(input_ids=ids_BT, use_cache=False).logits[0].float()
    if not bool(logits.isfinite().all()):
        raise ConfigError(
            f"{type(model).__name__}: its logits are not finite. Its weights are damaged, or too large for "
            "this precision: try precision=fp32."
        )
    ours = model.get_output_embeddings()(hidden_states(model, ids_BT)[0]).float()
    if not torch.allclose(logits, ours, rtol=0.02, atol=0.02 * float(logits.abs().max())):
        raise ConfigError(
            f"model: {type(model).__name__} transforms its logits after the output layer (soft-capping or "
            "scaling), which the chunked log-probabilities here do not do. Choose another model."
        )


@torch.no_grad()
def rollout_rows(
    rollout: Rollout,
    pad_id: int,
    micro_batch_tokens: int,
    compute: Compute,
    measure: Callable[[Sequences], tuple[Tensor, ...]],
) -> list[Tensor]:
    """Apply measure (a micro-batch -> [N] tensors) to a whole rollout, in token-budget micro-batches.

    Ranks share the work, and each gets the whole result.

    Returns:
        One fp32 [B, R] tensor on the CPU for each of measure's results, 0 on padding.
    """
    shape = rollout.mask_BR.shape
    results: list[Tensor] = []
    lengths = [len(p) + len(r) for p, r in zip(rollout.prompt_ids, rollout.response_ids, strict=True)]
    for group, weight, _ in compute.micro_batches(lengths, micro_batch_tokens):
        part = rollout.select(torch.tensor(group))
        batch = pad_sequences(part.prompt_ids, part.response_ids, pad_id, compute.device)
        measured = [batch.to_rows(values_N.float()).cpu() for values_N in measure(batch)]
        results = results or [torch.zeros(shape) for _ in measured]
        for result, rows in zip(results, measured, strict=True):
            if weight:
                result[group, : rows.shape[1]] = rows
    return [compute.global_sum(result) for result in results]
