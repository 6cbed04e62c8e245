"""Log-probabilities of responses under a policy.

Dimensions: B sequences, T tokens of a micro-batch laid end to end, N response tokens among them, H hidden
size, R response tokens of a row (padded). At most HEAD_CHUNK tokens' logits [tokens, vocabulary] are in
memory at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel

from rlhf.config import Complaint, ConfigError
from rlhf.distributed.compute import Compute, MicroBatch
from rlhf.models.packed_attention import hidden_states
from rlhf.models.packed_batch import Packed
from rlhf.models.peft.target_modules import backbone_of
from rlhf.rl.rollout import Responses, length_mask

HEAD_CHUNK = 256


@dataclass(frozen=True)
class Sequences:
    """A micro-batch of prompt + response rows."""

    packed: Packed
    predicts_N: Tensor
    """Index among the T of the token whose logits predict each response token: the token before it. A row's
    last token predicts nothing, so it is not among the T."""
    targets_N: Tensor
    """Ids of the response tokens, row by row."""
    mask_BR: Tensor
    """bool: true on response tokens, false on padding."""

    def to_rows(self, values_N: Tensor) -> Tensor:
        """Arrange per-token values as [B, R], with zeros on padding. Differentiable."""
        rows = values_N.new_zeros(self.mask_BR.shape)
        return rows.masked_scatter(self.mask_BR, values_N)


def pack_sequences(prompts: Sequence[Tensor], responses: Sequence[Tensor], device: torch.device) -> Sequences:
    """Lay prompts and their responses (1-D, at least one token each) end to end."""
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
    """Values of each response token, fp32."""

    logp_N: Tensor
    """Nats; carries the gradient."""
    entropy_N: Tensor
    """Nats; detached."""


def response_statistics(model: PreTrainedModel, batch: Sequences, temperature: float) -> TokenStatistics:
    """Log-probability and entropy of every response token, in fp32."""
    hidden_NH = hidden_states(model, batch.packed, batch.predicts_N)
    head, scale = model.get_output_embeddings(), logit_scale(model.config)
    return head_statistics(hidden_NH, head, batch.targets_N, temperature / scale, logit_cap(model.config))


def logit_cap(config: PreTrainedConfig) -> float | None:
    """The soft cap of a model's logits, applied before they are scaled: x becomes cap tanh(x / cap). None if
    the model has no cap.

    Source: Gemma Team 2024, arXiv:2408.00118, section 2.
    """
    text: Any = config.get_text_config()
    # Gemma 2, 3n and 4, NanoChat, VaultGemma; RecurrentGemma
    caps = [getattr(text, name, None) for name in ("final_logit_softcapping", "logits_soft_cap")]
    return next((float(cap) for cap in caps if cap is not None), None)


def logit_scale(config: PreTrainedConfig) -> float:
    """The factor by which a model multiplies the result of its output layer."""
    text: Any = config.get_text_config()
    if text.model_type.startswith("granite"):
        return 1 / float(text.logits_scaling)
    if text.model_type.startswith("cohere"):
        return float(text.logit_scale)
    if text.model_type == "falcon_h1":
        return float(text.lm_head_multiplier)
    if text.model_type == "minicpm3":
        return float(text.dim_model_base / text.hidden_size)
    return 1.0


class ResponseModel(nn.Module):
    """A policy whose forward pass is `response_statistics`, for the engine that trains it."""

    def __init__(self, policy: PreTrainedModel) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, batch: Sequences, temperature: float) -> TokenStatistics:
        """Log-probability and entropy of every response token."""
        return response_statistics(self.policy, batch, temperature)


def head_statistics(
    hidden_NH: Tensor, head: nn.Module, targets_N: Tensor, temperature: float, cap: float | None = None
) -> TokenStatistics:
    """Log-probabilities and entropies from the output layer, for any number of tokens (also 0). `cap` is
    the value of `logit_cap`.

    The layer is called only once. Around each call, and again for its gradients, a sharding engine gathers
    the layer's weights, which needs all ranks. With one call per chunk, ranks with different numbers of
    tokens would deadlock.
    """
    assert isinstance(head, nn.Linear), f"an output layer of {type(head)}"
    layer = head

    # read the weights inside the call: ZeRO-3 would gather a weight that is read outside, and hold it for a
    # whole pass
    def all_chunks(hidden_NH: Tensor) -> tuple[Tensor, Tensor]:
        statistics: tuple[Tensor, Tensor] = _HeadStatistics.apply(  # type: ignore[no-untyped-call]  # torch's
            hidden_NH.to(layer.weight.dtype), layer.weight, layer.bias, targets_N, temperature, cap
        )
        return statistics

    with _computing(head, all_chunks):
        return TokenStatistics(*head(hidden_NH))


@contextmanager
def _computing(module: nn.Module, function: Callable[[Tensor], Any]) -> Iterator[None]:
    """While open, a call of the module runs `function` instead of its own `forward`. The module's hooks still
    run."""
    assert "forward" not in vars(module)
    vars(module)["forward"] = function
    try:
        yield
    finally:
        del vars(module)["forward"]


class _HeadStatistics(torch.autograd.Function):
    """log softmax((W hidden + b) / temperature) at the targets, and its entropy, in fp32. If there is a cap,
    the logits are `_capped` before the division.

    Logits are computed in parts, in the forward pass and again in the backward pass. In the forward pass a
    part is HEAD_CHUNK tokens. In the backward pass, if the weights train, a part is a slice of the vocabulary
    for all tokens. So each weight's gradient is one product, rounded once, without a second copy. The
    gradient of the hidden states is summed in fp32. Dimensions: V vocabulary, C tokens of a part, P
    vocabulary entries of a part.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_N: Tensor,
        temperature: float, cap: float | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        logp_N, entropy_N, total_N = (
            hidden_NH.new_empty(len(hidden_NH), dtype=torch.float32) for _ in range(3)
        )
        for chunk in _slices(len(hidden_NH), HEAD_CHUNK):
            logits_CV = functional.linear(hidden_NH[chunk], weight_VH, bias_V)
            results = (logp_N[chunk], entropy_N[chunk], total_N[chunk])
            _categorical(logits_CV, targets_N[chunk], temperature, cap, *results)
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, targets_N, total_N)
        ctx.temperature, ctx.cap = temperature, cap
        ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    def backward(
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        hidden_NH, weight_VH, bias_V, targets_N, total_N = ctx.saved_tensors
        gradient_N = gradients[0] / ctx.temperature
        learns_hidden, learns_weight, learns_bias, *_ = ctx.needs_input_grad
        num_tokens, vocabulary = len(hidden_NH), len(weight_VH)
        if learns_weight or learns_bias:
            chunks = [slice(0, num_tokens)]
            parts = _slices(vocabulary, max(1, HEAD_CHUNK * vocabulary // max(num_tokens, HEAD_CHUNK)))
        else:
            chunks, parts = _slices(num_tokens, HEAD_CHUNK), [slice(0, vocabulary)]
        to_hidden_NH = to_weight_VH = to_bias_V = None
        if learns_hidden:
            to_hidden_NH = torch.zeros_like(hidden_NH, dtype=torch.float32 if len(parts) > 1 else None)
        if learns_weight:
            to_weight_VH = torch.empty_like(weight_VH)
        if learns_bias:
            to_bias_V = torch.empty_like(bias_V)
        for chunk in chunks:
            for part in parts:
                weight_PH, bias_P = weight_VH[part], None if bias_V is None else bias_V[part]
                logits_CP = functional.linear(hidden_NH[chunk], weight_PH, bias_P)
                targets_C = targets_N[chunk] - part.start
                _into_gradient(
                    logits_CP, targets_C, total_N[chunk], gradient_N[chunk], ctx.temperature, ctx.cap
                )
                if to_hidden_NH is not None:
                    to_hidden_NH[chunk] += logits_CP @ weight_PH
                if to_weight_VH is not None:
                    torch.mm(logits_CP.mT, hidden_NH[chunk], out=to_weight_VH[part])
                if to_bias_V is not None:
                    torch.sum(logits_CP, 0, out=to_bias_V[part])
        if to_hidden_NH is not None:
            to_hidden_NH = to_hidden_NH.to(hidden_NH.dtype)
        return to_hidden_NH, to_weight_VH, to_bias_V, None, None, None


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


CACHED_LOGITS = 16 * 49152
"""Number of logits that a CPU processes at a time, so that intermediate results stay in its cache."""


def _pieces(x: Tensor) -> list[slice]:
    rows = max(1, CACHED_LOGITS // x.shape[1]) if x.device.type == "cpu" else max(1, len(x))
    return _slices(len(x), rows)


def _capped(x: Tensor, cap: float | None) -> Tensor:
    """Soft-cap x in place to cap tanh(x / cap), whose slope is 1 - (result / cap)^2."""
    return x if cap is None else x.div_(cap).tanh_().mul_(cap)


def _categorical(
    logits_CV: Tensor, targets_C: Tensor, temperature: float, cap: float | None, logp_C: Tensor,
    entropy_C: Tensor, total_C: Tensor,
) -> None:  # fmt: skip
    """Write a chunk's log-probabilities, entropies and log-normalizers into the last three arguments."""
    for rows in _pieces(logits_CV):
        x = _capped(logits_CV[rows].to(torch.float32, copy=True), cap)
        if temperature != 1.0:
            x.div_(temperature)
        highest = x.amax(-1, keepdim=True)
        x -= highest
        target = x.gather(-1, targets_C[rows, None]).squeeze(-1)
        weight = x.exp()
        total = weight.sum(-1)
        log_total = total.log()
        logp_C[rows] = target - log_total
        entropy_C[rows] = log_total - weight.mul_(x).sum(-1) / total
        total_C[rows] = log_total + highest.squeeze(-1)


def _into_gradient(
    logits_CP: Tensor, targets_C: Tensor, total_C: Tensor, gradient_C: Tensor, temperature: float,
    cap: float | None,
) -> None:  # fmt: skip
    """Replace logits by their gradients, in place.

    Args:
        targets_C: indices from the part's first vocabulary entry. Targets outside belong to another part.
        total_C: log-normalizers from the forward pass.
        gradient_C: gradient of each log-probability, divided by the temperature.
    """
    size = logits_CP.shape[1]
    place_C1 = targets_C.clamp(0, size - 1)[:, None]
    of_target_C1 = torch.where((targets_C >= 0) & (targets_C < size), gradient_C, 0.0)[:, None]
    for rows in _pieces(logits_CP):
        x = _capped(logits_CP[rows].to(torch.float32, copy=True), cap)
        slope = None if cap is None else 1 - (x / cap).square_()
        if temperature != 1.0:
            x.div_(temperature)
        x.sub_(total_C[rows, None]).exp_().mul_(-gradient_C[rows, None])
        x.scatter_add_(-1, place_C1[rows], of_target_C1[rows])
        logits_CP[rows] = x if slope is None else x.mul_(slope)


@torch.no_grad()
def check_policy(model: PreTrainedModel) -> None:
    """Refuse a model whose tokens see later tokens, or that changes its logits by anything but `logit_cap`
    and `logit_scale`.

    The comparison is repeated with enlarged results of the output layer, because small logits do not show a
    cap.

    Raises:
        ConfigError: our log-probabilities would not be the model's own.
    """
    head = model.get_output_embeddings()
    if getattr(type(head), "forward", None) is not nn.Linear.forward:  # some models have no output layer
        raise ConfigError(
            f"model: the output layer of {type(model).__name__} is a {type(head).__name__}, which computes "
            "something of its own; this project needs a plain linear one. Choose another model."
        )
    ids_1T = torch.arange(min(model.config.get_text_config().vocab_size, 16), device=model.device)[None]
    with _cpu_attention(model):
        logits_TV = _logits(model, ids_1T, 1.0)
        if not bool(logits_TV.isfinite().all()):
            why = (
                f"the logits of this {type(model).__name__} are not finite. Its weights are damaged, or too "
                "large for this precision."
            )
            raise ConfigError(Complaint(str(model.config.name_or_path), why, "Try precision=fp32."))
        changed_TV = _logits(model, torch.cat([ids_1T[:, :-1], ids_1T[:, :1]], dim=1), 1.0)
        own_TV = head(backbone_of(model)(input_ids=ids_1T, use_cache=False)[0][0].to(head.weight.dtype))
        enlarged = PROBE_LOGIT / max(float(own_TV.abs().max()), PROBE_LOGIT / 1e4)
        theirs = [(1.0, logits_TV), (enlarged, _logits(model, ids_1T, enlarged))]
    cap, scale = logit_cap(model.config), logit_scale(model.config)
    # in 16 bits each operation rounds by half an eps: at most three operations for a cap, one for a scale
    tolerance = 1e-4 if logits_TV.dtype == torch.float32 else 2 * torch.finfo(logits_TV.dtype).eps
    if not torch.allclose(
        changed_TV[:-1], logits_TV[:-1], rtol=tolerance, atol=tolerance * float(logits_TV.abs().max())
    ):
        raise ConfigError(
            f"model: the tokens of {type(model).__name__} see those behind them: it is no causal language "
            "model, or its config says so (is_decoder, use_bidirectional_attention). Choose another model."
        )
    for factor, their_TV in theirs:
        ours_TV = _capped((own_TV * factor).float(), cap) * scale
        if not torch.allclose(
            their_TV.float(), ours_TV, rtol=tolerance, atol=tolerance * float(ours_TV.abs().max())
        ):
            raise ConfigError(
                f"model: {type(model).__name__} transforms its logits behind the output layer in a way that "
                "this project does not support. Choose another model."
            )


PROBE_LOGIT = 64.0
"""Largest absolute value of the enlarged logits. It exceeds the known caps, which are between 15 and 50."""


def _logits(model: PreTrainedModel, ids_1T: Tensor, factor: float) -> Tensor:
    """Logits [T, V] of a full forward pass, with the output layer's result multiplied by `factor`."""
    handle = model.get_output_embeddings().register_forward_hook(lambda head, inputs, output: output * factor)
    try:
        logits_TV: Tensor = model(input_ids=ids_1T, use_cache=False).logits[0]
    finally:
        handle.remove()
    return logits_TV


@contextmanager
def _cpu_attention(model: PreTrainedModel) -> Iterator[None]:
    """While open, a model on the CPU can run, even if its attention (FlashAttention) needs a GPU."""
    attention = model.config._attn_implementation
    is_elsewhere = model.device.type == "cpu" and attention.startswith("flash")
    try:
        if is_elsewhere:
            model.set_attn_implementation("sdpa")
        yield
    finally:
        if is_elsewhere:
            model.set_attn_implementation(attention)


def answer_logprobs(
    model: nn.Module, responses: Responses, temperature: float, micro_batch_tokens: int, compute: Compute
) -> Tensor:
    """Log-probability of every response token, without gradient. The ranks share the work, and each gets the
    full result.

    Args:
        model: a `ResponseModel`, or an engine's wrapper around one.

    Returns:
        Nats, fp32 [B, R] on the CPU, 0 on padding.
    """
    (logp_BR,) = measure_responses(
        responses, micro_batch_tokens, compute, lambda batch: (model(batch, temperature).logp_N,)
    )
    return logp_BR


def response_batches(responses: Responses, micro_batch_tokens: int, compute: Compute) -> Iterator[MicroBatch]:
    """This rank's micro-batches. On CPUs packed rows compute a shared prefix once. So there the responses to
    one prompt stay together, if the prompts divide equally among the ranks."""
    units: dict[tuple[int, ...], list[int]] = {}
    if compute.device.type == "cpu":
        for index, ids in enumerate(responses.prompt_ids):
            units.setdefault(tuple(ids.tolist()), []).append(index)
    together = 0 < len(units) < len(responses) and len(units) % compute.world_size == 0
    return compute.micro_batches(
        responses.lengths, micro_batch_tokens, list(units.values()) if together else None
    )


@torch.no_grad()
def measure_responses(
    responses: Responses,
    micro_batch_tokens: int,
    compute: Compute,
    measure: Callable[[Sequences], tuple[Tensor, ...]],
) -> list[Tensor]:
    """Apply `measure` (a micro-batch -> [N] tensors) to all responses, in micro-batches with a token budget.

    The ranks share the work, and each gets the full result.

    Returns:
        One fp32 [B, R] tensor on the CPU for each result of `measure`, 0 on padding.
    """
    shape = responses.mask_BR.shape
    results: list[Tensor] = []
    for group, weight, _ in response_batches(responses, micro_batch_tokens, compute):
        prompts, answers = (
            [ids[index] for index in group] for ids in (responses.prompt_ids, responses.response_ids)
        )
        batch = pack_sequences(prompts, answers, compute.device)
        measured = [batch.to_rows(values_N.float()).cpu() for values_N in measure(batch)]
        results = results or [torch.zeros(shape) for _ in measured]
        for result, rows in zip(results, measured, strict=True):
            if weight:
                result[group, : rows.shape[1]] = rows
    return [compute.global_sum(result) for result in results]
