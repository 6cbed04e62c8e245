"""Bytes that a rank needs, by purpose, each with its arithmetic.

Weights, gradients and optimizer: Rajbhandari et al. 2020 (arXiv:1910.02054), section 3. Activations: the
tensors that autograd keeps of transformers' decoder layers, counted as in Korthikanti et al. 2022
(arXiv:2205.05198), section 4. The backward pass recomputes attention weights, so only the masks of rows with
virtual tokens grow with the square of a length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from rlhf.costs.hardware import GIB
from rlhf.costs.model_shape import ModelShape
from rlhf.costs.peft_costs import COSTS
from rlhf.costs.setup import CostContext
from rlhf.models.peft.config import PeftConfig
from rlhf.models.peft.methods import MethodName

if TYPE_CHECKING:
    from rlhf.generation.vllm import VllmConfig

Kind = Literal["weights", "gradients", "optimizer", "activations", "logits", "KV cache"]
FP32 = 4
LOADING = "loading"
"""Name of the first phase of a stage that trains."""
SAMPLING = "sampling"
"""Name of the phase in which answers are sampled. On a GPU, vLLM is awake only then."""
VLLM_SAMPLING_NUMBERS = 6
"""fp32 numbers per token of the vocabulary that vLLM needs to sample: logits, log-probabilities, and for
top-p their sorted copy, its indices (8 bytes each) and its cumulative sums."""
VLLM_GRAPHS = 1.0 * GIB
"""Bytes of vLLM's CUDA graphs, which stay in memory while it sleeps: assumed."""


class Allocation(NamedTuple):
    """Memory for one purpose."""

    kind: Kind
    size: float
    """Bytes."""
    formula: str
    """The calculation of `size`, as text with numbers."""
    on_host: bool = False
    """Whether it is in the host's memory, for a rank with a GPU."""


@dataclass(frozen=True)
class MemoryPhase:
    """A phase of a stage, and the allocations that are in memory then."""

    name: str
    parts: list[Allocation] = field(default_factory=list)

    def size(self, *, on_host: bool | None = None) -> float:
        """Total bytes; with `on_host`, only those on the host (True) or on the device (False)."""
        return sum(part.size for part in self.parts if on_host is None or part.on_host == on_host)


@dataclass(frozen=True)
class Trained:
    """The models that one engine trains with one tuning method."""

    on: CostContext
    peft: PeftConfig
    models: int = 1
    weight_sets: int = 1
    """Sets of base weights; fewer than models if they share one."""
    scalars: int = 0
    """Number of models that have a scalar head instead of the output layer."""
    scalar: ModelShape | None = None
    """Shape of the scalar models, if it is not the policy's."""

    @property
    def parameters_per_model(self) -> int:
        """Trained parameters of one model with an output layer."""
        return COSTS[self.peft.method].trained(self.on.shape, self.peft)

    @property
    def parameters(self) -> int:
        """Trained parameters of all models."""
        shape = self.scalar or self.on.shape
        of_scalar = COSTS[self.peft.method].trained(shape, self.peft)
        of_scalar -= shape.own_head if self.peft.method == "none" else 0
        return (self.models - self.scalars) * self.parameters_per_model + self.scalars * of_scalar

    @property
    def _trains_all(self) -> bool:
        return COSTS[self.peft.method].keeps == "all"

    @property
    def sets(self) -> list[tuple[CostContext, bool]]:
        """(context, is a scalar model's) of each set of base weights, in loading order."""
        own = min(self.scalars, self.weight_sets - self.models + self.scalars)
        scalar = replace(self.on, shape=self.scalar or self.on.shape)
        return [(self.on, False)] * (self.weight_sets - own) + [(scalar, True)] * own

    def weights(self, name: str) -> Iterator[Allocation]:
        """Weights of the models, frozen or not. If sharded: this rank's share and the unsharded tensors."""
        on = self.on
        total = sum(weight_bytes(each, self.peft.method, is_scalar=scalar) for each, scalar in self.sets)
        count = sum(each.shape.parameters for each, _ in self.sets)
        adapters = self.parameters if COSTS[self.peft.method].is_adapter else 0
        total += on.dtype_bytes * adapters
        formula, on_host = f"{name}: {billions(count)} x {on.dtype_bytes} B", on.sharding.offloads
        if not on.shards_weights:
            yield Allocation("weights", total, formula)
            return
        yield Allocation("weights", total / on.shard_ranks, f"{formula}{over(on.shard_ranks)}", on_host)
        if on.sharding.is_zero3:
            small = sum(each.shape.small for each, _ in self.sets) + adapters
            formula = f"whole on every rank, because they are small: {billions(small)} x {on.dtype_bytes} B"
            yield Allocation("weights", on.dtype_bytes * small, formula)

    def gathered(self) -> Iterator[Allocation]:
        """Sharded weights that are gathered while the models run, one model at a time. FSDP2 keeps weights
        outside the layers, of all models, until the optimizer steps."""
        if not self.on.shards_weights:
            return
        shapes = [each.shape for each, _ in self.sets]
        outside = [each.shape.outside - (each.shape.own_head if scalar else 0) for each, scalar in self.sets]
        yield gathered_layers(self.on, max(shapes, key=lambda shape: shape.layer), sum(outside))

    def optimizer(self) -> Allocation:
        """fp32 master weights and Adam's two moments."""
        on, share = self.on, self.on.shard_ranks
        formula = f"{billions(self.parameters)} trained x (4 master + 4 + 4 moments) B{over(share)}"
        return Allocation("optimizer", 3 * FP32 * self.parameters / share, formula, on.sharding.offloads)

    def buffers(self) -> Iterator[Allocation]:
        """Gradient memory that DeepSpeed's stage 3 holds for the whole stage, whether it trains or not.

        This rank's share of the gradients, a second copy on the host with offloading, and the bucket.
        """
        on, count = self.on, self.parameters
        if not on.sharding.is_zero3:
            return
        offloads = on.sharding.offloads
        times = 2 if offloads else 1
        formula = f"ZeRO-3's: {billions(count)} trained x {times * FP32} B{over(on.ranks)}"
        yield Allocation("gradients", times * FP32 * count / on.ranks, formula, offloads)
        yield self._bucket("DeepSpeed's bucket")

    def _bucket(self, name: str) -> Allocation:
        from rlhf.training.deepspeed import bucket_elements

        count = bucket_elements(self.parameters)
        return Allocation("gradients", FP32 * count, f"{name}: {billions(count)} x {FP32} B")

    def _sent_bucket(self) -> Iterator[Allocation]:
        """A copy of the bucket while it is sent, and in stage 3 this rank's part of the result.

        Stage 3 sends the gradient of a weight that exceeds the bucket by itself, with a copy in fp32.
        """
        from rlhf.training.deepspeed import bucket_elements

        on, largest = self.on, max(each.shape.largest for each, _ in self.sets)
        is_alone = on.sharding.is_zero3 and self._trains_all
        if is_alone and largest > bucket_elements(self.parameters):
            each = on.dtype_bytes + FP32
            formula = f"the largest weight, sent by itself: {billions(largest)} x {each} B"
            yield Allocation("gradients", each * largest, formula)
            return
        yield self._bucket("the bucket as it is sent")
        if on.sharding.is_zero3:
            count = bucket_elements(self.parameters)
            formula = f"this rank's part of it: {billions(count)} x {FP32} B{over(on.ranks)}"
            yield Allocation("gradients", FP32 * count / on.ranks, formula)

    def _step_buffers(self) -> Iterator[Allocation]:
        """Buffers of DeepSpeed's optimizer step: the larger of its two parts.

        It first computes the norm of each weight's gradient in double precision, one weight at a time. Then
        it updates all weights of a model as one tensor, so it concatenates their gradients. On the host
        they are contiguous already.
        """
        on, count = self.on, self.parameters / self.models
        if on.sharding.offloads:
            return
        concatenated = FP32 * count / on.ranks
        largest = max(each.shape.largest for each, _ in self.sets) if self._trains_all else 0
        share = on.ranks if on.sharding.is_zero3 else 1
        norm = 2 * FP32 * largest / share
        formula = f"one model's, laid end to end: {billions(count)} x {FP32} B{over(on.ranks)}"
        if norm > concatenated:
            formula = f"the largest weight's norm: {billions(largest)} x {2 * FP32} B{over(share)}"
        yield Allocation("gradients", max(norm, concatenated), formula)

    def gradients(
        self, *, passes: int, at_step: bool = False, together: bool = False
    ) -> Iterator[Allocation]:
        """Gradients without `buffers`, in fp32. Under `none`, those of a single pass are in the model's
        precision until the optimizer step.

        Args:
            passes: micro-batches per optimizer step.
            at_step: during the optimizer step, not during forward and backward.
            together: one backward pass goes through all models.
        """
        on, count = self.on, self.parameters
        if on.sharding.is_zero3:
            if not at_step:
                yield from self._sent_bucket()
            else:
                yield from self._step_buffers()
            return
        if on.sharding.library == "deepspeed":
            if at_step:
                yield from self._step_buffers()
            else:
                yield self._bucket("DeepSpeed's bucket")
                yield from self._sent_bucket()
        if on.shards_weights:
            yield self._fsdp2_gradients(at_step=at_step, together=together)
        share = on.shard_ranks if on.sharding.gradients else 1
        if passes == 1 and not at_step and on.zero == "none":
            # gradients grow while activations are freed; at the peak only the output layer's exist
            count = on.shape.head if self._trains_all else count
            formula = f"{billions(count)} x {on.dtype_bytes} B, while all activations are there"
            yield Allocation("gradients", on.dtype_bytes * count, formula)
            return
        yield Allocation(
            "gradients", FP32 * count / share, f"{billions(count)} trained x {FP32} B{over(share)}"
        )

    def _fsdp2_gradients(self, *, at_step: bool, together: bool) -> Allocation:
        """FSDP2's unsharded gradients: one layer's, with a copy in fp32 while they are sent.

        Gradients outside the layers accumulate and are sent at the end of the pass, when no activations are
        left.
        """
        on, b = self.on, self.on.dtype_bytes
        if not self._trains_all:
            count = self.parameters / self.models / on.shape.layers
            return Allocation("gradients", (b + FP32) * count, f"sent: {billions(count)} x {b + FP32} B")
        every = [each.shape.outside - (each.shape.own_head if scalar else 0) for each, scalar in self.sets]
        outside = sum(every) if together else max(every)
        if at_step:
            formula = f"sent as the pass ends: {billions(outside)} outside the layers x ({b} + {FP32}) B"
            gathered = f"{billions(sum(every))} x {b} B are still gathered"
            return Allocation("gradients", (b + FP32) * outside + b * sum(every), f"{formula}, {gathered}")
        layer = max(each.shape.layer for each, _ in self.sets)
        formula = f"sent: a layer's {billions(layer)} x ({b} + {FP32}) B, {billions(outside)} outside x {b} B"
        return Allocation("gradients", (b + FP32) * layer + b * outside, formula)


def weight_bytes(on: CostContext, method: MethodName = "none", *, is_scalar: bool = False) -> float:
    """Bytes of one model's weights, without adapters. A scalar head is too small to count."""
    quantized, shape = COSTS[method].weight_bytes, on.shape
    count = shape.parameters - (shape.own_head if is_scalar else 0)
    if quantized is None:
        return on.dtype_bytes * count
    return on.dtype_bytes * (count - shape.linear) + quantized * shape.linear


def gathered_layers(on: CostContext, shape: ModelShape, outside: float) -> Allocation:
    """Weights that each rank gathers, layer by layer, in a pass through a sharded model.

    FSDP2 holds the running layer, the next one, and all weights outside the layers. DeepSpeed keeps gathered
    weights up to a maximum number (`live_elements`).

    Args:
        outside: parameters outside the layers, which FSDP2 gathers once for the whole pass.
    """
    if on.sharding.is_zero3:
        from rlhf.training.deepspeed import live_elements

        count: float = max(live_elements(shape.parameters), shape.layer)
        what = ""
    else:
        count = 2 * shape.layer + outside
        what = f" (2 layers of {billions(shape.layer)}, {billions(outside)} outside them)"
    formula = f"gathered while they run{what}: {billions(count)} x {on.dtype_bytes} B"
    return Allocation("weights", on.dtype_bytes * count, formula)


def gathered_whole(on: CostContext) -> Allocation:
    """A sharded policy's full weights on every rank, so that the local engine samples without the other ranks
    (`local_sampling` whole)."""
    formula = f"gathered whole for sampling: {billions(on.shape.parameters)} x {on.dtype_bytes} B"
    return Allocation("weights", weight_bytes(on), formula)


def gathered_by_layers(on: CostContext) -> Allocation:
    """A sharded policy's gathered layers, where the local engine samples layer by layer, all ranks in step
    (`local_sampling` layers)."""
    return gathered_layers(on, on.shape, on.shape.outside)


def resolve_placement(on: CostContext, placement: str) -> str:
    """Placement of a frozen model. `auto`: the same as the trained weights."""
    if placement != "auto":
        return placement
    return "sharded" if on.shards_weights else "replicated"


def frozen_weights(
    on: CostContext, name: str, placement: str = "replicated", *, is_scalar: bool = False
) -> Allocation:
    """The weights of a model that does not train.

    Args:
        placement: a value of ppo.frozen_placement.
        is_scalar: it has a scalar head instead of the output layer.
    """
    head, b = on.shape.own_head if is_scalar else 0, on.dtype_bytes
    count = on.shape.parameters - head
    if placement != "sharded":
        formula = f"{name}: {billions(count)} x {b} B"
        return Allocation("weights", b * count, formula, placement == "offloaded")
    whole = on.shape.small if on.sharding.is_zero3 else 0
    share = on.shard_ranks if on.shards_weights else on.ranks
    formula = f"{name}: {billions(count - whole)} x {b} B{over(share)}, and {billions(whole)} x {b} B whole"
    return Allocation("weights", b * ((count - whole) / share + whole), formula, on.sharding.offloads)


def frozen_runs(
    on: CostContext, name: str, placement: str = "auto", *, is_scalar: bool = False
) -> list[Allocation]:
    """Memory of a frozen model while it runs: its weights, and the gathered layers if it is sharded."""
    placement = resolve_placement(on, placement)
    parts = [frozen_weights(on, name, placement, is_scalar=is_scalar)]
    if placement == "offloaded":
        size = weight_bytes(on, is_scalar=is_scalar)
        parts.append(Allocation("weights", size, f"{name}, on the GPU while it runs"))
    return [*parts, gathered_layers(on, on.shape, on.shape.head)] if placement == "sharded" else parts


def loading(on: CostContext, trained: Trained, *others: Allocation) -> MemoryPhase:
    """The phase in which every rank reads its shards, or full models, in the run's precision or in 4 bits.

    Converting files whose layout is not the model's is not counted.

    Args:
        others: further models that are in memory by then.
    """
    size = sum(weight_bytes(each, trained.peft.method, is_scalar=scalar) for each, scalar in trained.sets)
    formula = f"{trained.weight_sets} {'sharded' if on.shards_weights else 'whole'} models"
    size /= on.shard_ranks if on.shards_weights else 1
    return MemoryPhase(LOADING, [Allocation("weights", size, formula, on.sharding.offloads), *others])


def activations(
    on: CostContext,
    tokens: float,
    longest: float,
    peft: PeftConfig,
    *,
    checkpointing: bool,
    second_shape: ModelShape | None = None,
) -> Allocation:
    """Activations that autograd keeps of a pass with gradients, and the running layer's temporary tensors.

    Args:
        tokens: tokens of the pass.
        longest: tokens of the longest row.
        second_shape: shape of a second model whose activations are kept at the same time.
    """
    graphs = [on, *([] if second_shape is None else [replace(on, shape=second_shape)])]
    kept, formulas, b = 0.0, [], on.dtype_bytes
    for each in graphs:
        layers, hidden = each.shape.layers, each.shape.hidden
        kept += layers * b * hidden if checkpointing else kept_per_token(each, longest, peft)
        layer = kept_per_layer(each, longest, peft)
        formulas.append(
            f"{layers} layers' inputs x {b * hidden} B, and {layer:.0f} B of one layer computed anew"
            if checkpointing
            else f"{kept_layers(each, peft)} layers x {layer:.0f} B"
        )
    if checkpointing:
        kept += max(kept_per_layer(each, longest, peft) for each in graphs)
    working = 2 * max(working_per_token(each.shape, b) for each in graphs)
    formula = f"{tokens:.0f} tokens x ({' + '.join(formulas)}; {working} B at work)"
    return Allocation("activations", tokens * (kept + working), formula)


def kept_layers(on: CostContext, peft: PeftConfig) -> int:
    """Number of layers of which autograd keeps activations."""
    return min(peft.layers, on.shape.layers) if peft.method == "freeze" else on.shape.layers


def kept_per_token(on: CostContext, longest: float, peft: PeftConfig) -> float:
    """Bytes per token that autograd keeps of all layers."""
    kept = kept_layers(on, peft) * kept_per_layer(on, longest, peft)
    if peft.method != "adapter":
        return kept
    # autograd keeps nothing of what precedes the first bottleneck
    norm = on.shape.hidden * (on.dtype_bytes if on.shape.has_fused_norm else FP32)
    attention = norm + kept_by_attention(on, longest, peft)
    mlp = norm + kept_by_mlp(on)
    return kept - attention - (mlp if peft.placement == "pfeiffer" else 0)


def kept_per_layer(on: CostContext, longest: float, peft: PeftConfig) -> float:
    """Bytes per token that autograd keeps of one layer: norms, attention, MLP, inputs of linear layers."""
    shape, b, method = on.shape, on.dtype_bytes, COSTS[peft.method]
    norms = shape.norm_elements * (b if shape.has_fused_norm else FP32)
    kept = norms + kept_by_attention(on, longest, peft) + kept_by_mlp(on) + method.extra_kept(shape, b, peft)
    if method.keeps == "values":
        return kept
    query = shape.heads * shape.head_size
    inputs = b * (2 * shape.hidden + query + (shape.intermediate if shape.is_gated else 0))
    if method.keeps == "inputs":
        return kept + inputs
    return kept + inputs + (0 if shape.has_fused_norm else b * shape.norm_elements)


def kept_by_mlp(on: CostContext) -> float:
    """Bytes per token that autograd keeps of one layer's MLP."""
    return on.dtype_bytes * on.shape.intermediate * (3 if on.shape.is_gated else 2)


def kept_by_attention(on: CostContext, longest: float, peft: PeftConfig) -> float:
    """Bytes per token that autograd keeps of one layer's attention.

    Queries, keys and values; also the kernel's result, unless it counts as the next linear layer's input. The
    backward pass of packed rows on CPUs recomputes the result. With virtual tokens attention takes a mask:
    then each head has its own keys and values, and the mask is kept too.
    """
    shape, b, method = on.shape, on.dtype_bytes, COSTS[peft.method]
    query, keys = shape.heads * shape.head_size, 2 * shape.kv_heads * shape.head_size
    if added := method.added_tokens(shape, peft):
        num_keys = longest + added
        return b * (2 * query + 2 * query * num_keys / longest + num_keys) + FP32 * shape.heads
    has_result = method.keeps == "values" and (on.pads or not on.on_cpu)
    return b * (query + keys + (query if has_result else 0))


def working_per_token(shape: ModelShape, b: int, mlp_ranks: int = 1) -> int:
    """Bytes per token of the running layer's temporary tensors.

    Args:
        mlp_ranks: ranks that share the MLP (tensor parallel).
    """
    mlp = b * shape.intermediate * (3 if shape.is_gated else 2) // mlp_ranks
    return 2 * b * shape.hidden + max(mlp, 2 * FP32 * shape.hidden)


def reading(on: CostContext, tokens: float) -> Allocation:
    """Activations of a pass without gradients: the running layer's temporary tensors."""
    each = working_per_token(on.shape, on.dtype_bytes)
    return Allocation("activations", tokens * each, f"{tokens:.0f} tokens x {each} B (the layer at work)")


def logits(on: CostContext, *, learns: bool) -> Allocation:
    """Logits of one chunk of tokens, not of a full pass. On CPUs the fp32 copy has few rows: not counted."""
    from rlhf.models.logprobs import HEAD_CHUNK

    copies = 2 if learns else 1
    each = on.dtype_bytes + (0 if on.on_cpu else FP32)
    size = HEAD_CHUNK * on.shape.vocabulary * each * copies
    return Allocation("logits", size, f"{HEAD_CHUNK} tokens x {on.shape.vocabulary} x {each} B x {copies}")


def sampling(
    on: CostContext,
    rows: float,
    prompt: float,
    new_tokens: int,
    *,
    folds: bool = False,
    gathers: bool = False,
) -> Iterator[Allocation]:
    """Memory of decoding, without the model: KV cache, the newest tokens' logits, copies of weights.

    Args:
        rows: rows that each rank decodes together.
        prompt: tokens of a prompt.
        new_tokens: largest number of new tokens.
        folds: an adapter is merged into copies of the weights while sampling.
        gathers: the weights are sharded, and gathered to sample.
    """
    shape, b = on.shape, on.dtype_bytes
    if on.vllm is not None:  # see with_vllm
        if gathers:
            formula = f"the largest weight, gathered to hand it over: {billions(shape.largest)} x {b} B"
            yield Allocation("weights", b * shape.largest, formula)
        return
    if gathers:
        yield gathered_whole(on) if on.local_sampling == "whole" else gathered_by_layers(on)
    from rlhf.generation.cpu_decoder import multiplies_bf16
    from rlhf.generation.sampler import PREFILL_TOKENS, GrowingLayer

    if folds:
        yield folded(on)
    by_layers = gathers and on.local_sampling == "layers"
    if on.on_cpu and b == 2 and rows > 1 and shape.is_lean and not by_layers and multiplies_bf16():
        copied = shape.linear + shape.head
        yield Allocation("weights", b * copied, f"laid out for decoding: {billions(copied)} x {b} B")
    room, per_token = GrowingLayer.GROWTH_TOKENS, b * shape.kv_elements
    tokens = prompt + new_tokens + room
    formula = f"{rows:.0f} rows x ({prompt:.0f} + {new_tokens} + {room}) tokens x {per_token} B"
    yield Allocation("KV cache", rows * tokens * per_token, formula)
    each = b + 4 * FP32
    yield Allocation(
        "logits", rows * shape.vocabulary * each, f"{rows:.0f} rows x {shape.vocabulary} x {each} B"
    )
    yield reading(on, min(rows * prompt, max(PREFILL_TOKENS, prompt)))


def with_vllm(on: CostContext, phases: Sequence[MemoryPhase]) -> list[MemoryPhase]:
    """The phases of a stage that samples, with vLLM's memory added.

    vLLM holds its part of the weights and its cache from its first use to the end of the run. On a GPU it
    sleeps when it does not sample, and then holds only its CUDA graphs. The loading phase includes it only if
    an earlier stage has sampled.
    """
    if on.vllm is None:
        return list(phases)
    share = on.vllm.tensor_parallel
    formula = f"vLLM's own: {billions(on.shape.parameters)} x {on.dtype_bytes} B{over(share)}"
    awake = [
        Allocation("weights", weight_bytes(on) / share, formula),
        Allocation("KV cache", on.vllm.kv_cache_gib * GIB, "vllm.kv_cache_gib"),
        *([] if on.on_cpu else vllm_pass(on, on.vllm)),
    ]
    graphs = Allocation("activations", VLLM_GRAPHS, "vLLM's CUDA graphs")
    always = [] if on.on_cpu or on.vllm.enforce_eager else [graphs]
    return [
        phase
        if phase.name == LOADING and not on.has_sampled
        else MemoryPhase(
            phase.name, [*phase.parts, *always, *(awake if on.on_cpu or phase.name == SAMPLING else [])]
        )
        for phase in phases
    ]


def vllm_pass(on: CostContext, vllm: VllmConfig) -> Iterator[Allocation]:
    """Memory of vLLM's largest pass, without weights and cache. vLLM runs such a pass when it starts."""
    from rlhf.generation.vllm import batched_tokens

    shape, b, tokens = on.shape, on.dtype_bytes, batched_tokens(vllm)
    each = working_per_token(shape, b, mlp_ranks=vllm.tensor_parallel)
    yield Allocation("activations", tokens * each, f"vLLM reads {tokens} tokens together x {each} B")
    rows, each = vllm.max_num_seqs, b + VLLM_SAMPLING_NUMBERS * FP32
    formula = f"vllm.max_num_seqs: {rows} rows x {shape.vocabulary} x {each} B"
    yield Allocation("logits", rows * shape.vocabulary * each, formula)


def vllm_row(on: CostContext, vllm: VllmConfig, tokens: int) -> float:
    """Bytes of vLLM's cache per rank for one row of `tokens` tokens. A rank has at least one head."""
    from rlhf.generation.vllm import BLOCK_TOKENS

    shape, block = on.shape, BLOCK_TOKENS[on.machine.kind]
    heads = max(1, shape.kv_heads // vllm.tensor_parallel)
    each = on.dtype_bytes * 2 * shape.full_layers * heads * shape.head_size
    return math.ceil(tokens / block) * block * each


def folded(on: CostContext) -> Allocation:
    """Copies of the linear layers' weights, with the adapter merged."""
    formula = f"adapter folded into copies: {billions(on.shape.linear)} x {on.dtype_bytes} B"
    return Allocation("weights", on.dtype_bytes * on.shape.linear, formula)


def amount(size: float) -> str:
    """A size in bytes as text, such as `1.5 GiB`."""
    for unit, factor in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} B"


def billions(count: float) -> str:
    """A count as text, such as `7.00e9` or `1.20e6`."""
    return f"{count / 1e9:.2f}e9" if count >= 1e8 else f"{count / 1e6:.2f}e6"


def over(share: int) -> str:
    """The text ` / 8 ranks`; empty for one rank."""
    return f" / {share} ranks" if share > 1 else ""
