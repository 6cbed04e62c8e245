"""Log-probabilities of responses under a policy.

Dimensions: B sequences, T tokens of a micro-batch laid end to end, N those of its responses, H hidden size,
R response tokens (padded). No [tokens, vocabulary] tensor is held for more than HEAD_CHUNK tokens at once;
what a micro-batch's chunks give to the head's weights autograd adds up in their own dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.config import ConfigError
from rlhf.distributed import Compute
from rlhf.models.checkpointing import recomputed
from rlhf.models.packed import hidden_states
from rlhf.models.rows import Packed
from rlhf.models.targets import backbone_of
from rlhf.rl.padding import length_mask
from rlhf.rl.rollout import Rollout

HEAD_CHUNK = 256


@dataclass(frozen=True)
class Sequences:
    """A micro-batch of prompt + response rows."""

    packed: Packed
    predicts_N: Tensor
    """Where in T the logits stand that predict each response token: one place before it. Nothing is read at a
    row's last token, so that is not among the T."""
    targets_N: Tensor
    """The response tokens, row by row."""
    mask_BR: Tensor
    """bool: true on response tokens, false on padding."""

    def to_rows(self, values_N: Tensor) -> Tensor:
        """Lay per-token values out as [B, R], zero on padding; differentiable."""
        rows = values_N.new_zeros(self.mask_BR.shape)
        return rows.masked_scatter(self.mask_BR, values_N)


def pack_sequences(prompts: Sequence[Tensor], responses: Sequence[Tensor], device: torch.device) -> Sequences:
    """Lay prompts and their responses (1-D, any length from 1) end to end."""
    assert all(len(row) > 0 for row in prompts), "a response needs at least one token before it"
    pairs = list(zip(prompts, responses, strict=True))
    packed = Packed([torch.cat([prompt, response[:-1]]) for prompt, response in pairs], device)
    response_B = torch.tensor([len(row) for row in responses])
    predicts_T = torch.cat([
        torch.arange(length) >= len(prompt) - 1
        for length, prompt in zip(packed.lengths, prompts, strict=True)
    ])  # fmt: skip
    return Sequences(
        packed,
        predicts_T.nonzero().squeeze(-1).to(device),
        torch.cat(list(responses)).to(device),
        length_mask(response_B).to(device),
    )


class TokenStatistics(NamedTuple):
    """Per response token, fp32."""

    logp_N: Tensor
    """Nats; carries the gradient."""
    entropy_N: Tensor
    """Nats; detached."""


def response_statistics(model: PreTrainedModel, batch: Sequences, temperature: float) -> TokenStatistics:
    """Log-probability and entropy of every response token, in fp32."""
    hidden_NH = hidden_states(model, batch.packed, batch.predicts_N)
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
        pieces.append(recomputed(_chunk, hidden, head, targets, temperature))
    return TokenStatistics(
        torch.cat([piece[0] for piece in pieces]), torch.cat([piece[1] for piece in pieces])
    )


def _chunk(
    hidden_CH: Tensor, head: nn.Module, targets_C: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    logits_CV = head(hidden_CH)
    logp_C, entropy_C = _Categorical.apply(logits_CV, targets_C, temperature)  # type: ignore[no-untyped-call]
    return logp_C, entropy_C


class _Categorical(torch.autograd.Function):
    """Log-probabilities of targets and entropies of softmax(logits / temperature), in fp32.

    On CPUs a few rows at a time, so that what is computed on the way stays in the cache.
    """

    ROWS = 16

    @staticmethod
    def _parts(logits_CV: Tensor) -> list[slice]:
        rows = _Categorical.ROWS if logits_CV.device.type == "cpu" else len(logits_CV)
        return [slice(start, start + rows) for start in range(0, len(logits_CV), rows)]

    @staticmethod
    def forward(ctx: Any, logits_CV: Tensor, targets_C: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logp_C, entropy_C, total_C = (
            logits_CV.new_empty(len(logits_CV), dtype=torch.float32) for _ in range(3)
        )
        for part in _Categorical._parts(logits_CV):
            x = logits_CV[part].to(torch.float32, copy=True)
            if temperature != 1.0:
                x.div_(temperature)
            highest = x.amax(-1, keepdim=True)
            x -= highest
            target = x.gather(-1, targets_C[part, None]).squeeze(-1)
            weight = x.exp()
            total = weight.sum(-1)
            log_total = total.log()
            logp_C[part] = target - log_total
            entropy_C[part] = log_total - weight.mul_(x).sum(-1) / total
            total_C[part] = log_total + highest.squeeze(-1)
        ctx.save_for_backward(logits_CV, targets_C, total_C)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy_C)
        return logp_C, entropy_C

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        logits_CV, targets_C, total_C = ctx.saved_tensors
        gradient_C = gradients[0] / ctx.temperature
        gradient_CV = torch.empty_like(logits_CV)
        for part in _Categorical._parts(logits_CV):
            x = logits_CV[part].to(torch.float32, copy=True)
            if ctx.temperature != 1.0:
                x.div_(ctx.temperature)
            x.sub_(total_C[part, None]).exp_().mul_(-gradient_C[part, None])
            x.scatter_add_(-1, targets_C[part, None], gradient_C[part, None])
            gradient_CV[part] = x
        return gradient_CV, None, None


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Refuse models whose logits are more than head(hidden): soft-capped, scaled or biased ones.

    Raises:
        ConfigError: the chunked head would train something else than the model.
    """
    ids_T = torch.arange(min(model.config.get_text_config().vocab_size, 16), device=model.device)
    attention = model.config._attn_implementation
    if model.device.type == "cpu" and attention.startswith(
        "flash"
    ):  # for a GPU, onto which it is yet to move
        model.set_attn_implementation("sdpa")
    logits = model(input_ids=ids_T[None], use_cache=False).logits[0].float()
    if not bool(logits.isfinite().all()):
        raise ConfigError(
            f"{type(model).__name__}: its logits are not finite. Its weights are damaged, or too large for "
            "this precision: try precision=fp32."
        )
    backbone = backbone_of(model)
    ours = model.get_output_embeddings()(backbone(input_ids=ids_T[None], use_cache=False)[0][0]).float()
    if model.config._attn_implementation != attention:
        model.set_attn_implementation(attention)
    if not torch.allclose(logits, ours, rtol=0.02, atol=0.02 * float(logits.abs().max())):
        raise ConfigError(
            f"model: {type(model).__name__} transforms its logits after the output layer (soft-capping or "
            "scaling), which the chunked log-probabilities here do not do. Choose another model."
        )


@torch.no_grad()
def rollout_rows(
    rollout: Rollout,
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
        batch = pack_sequences(part.prompt_ids, part.response_ids, compute.device)
        measured = [batch.to_rows(values_N.float()).cpu() for values_N in measure(batch)]
        results = results or [torch.zeros(shape) for _ in measured]
        for result, rows in zip(results, measured, strict=True):
            if weight:
                result[group, : rows.shape[1]] = rows
    return [compute.global_sum(result) for result in results]
