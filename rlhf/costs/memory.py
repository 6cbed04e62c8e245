"""Bytes that a rank needs, by purpose, each with its arithmetic.

Weights, gradients and optimizer: Rajbhandari et al. 2020 (arXiv:1910.02054), section 3. Activations: counted
from what autograd keeps of transformers' decoder layers, as Korthikanti et al. 2022 (arXiv:2205.05198),
section 4, do. Attention weights are computed anew: nothing grows with a length's square but the masks of rows
behind virtual tokens.
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
"""The first phase of a stage that trains."""
SAMPLING = "sampling"
"""The phase in which answers are sampled: the one in which vLLM is awake on a GPU."""
VLLM_SAMPLES = 6
"""fp32 numbers a token of the vocabulary that vLLM needs to sample: logits, log-probabilities, and for a
nucleus their sorted copy, its places (of 8 bytes) and its sums."""
VLLM_GRAPHS = 1.0 * GIB
"""Bytes of vLLM's CUDA graphs, which stay while it sleeps: assumed."""


class Allocation(NamedTuple):
    """Memory for one purpose."""

    kind: Kind
    size: float
    """Bytes."""
    how: str
    """The arithmetic, in words and numbers."""
    on_host: bool = False
    """In the host's memory, where the rank has a device of its own."""


@dataclass(frozen=True)
class MemoryPhase:
    """A phase of a stage, and what is in memory then."""

    name: str
    parts: list[Allocation] = field(default_factory=list)

    def size(self, *, on_host: bool | None = None) -> float:
        """Bytes; of the host or of the device alone, where it is asked."""
        return sum(part.size for part in self.parts if on_host is None or part.on_host == on_host)


@dataclass(frozen=True)
class Trained:
    """What one engine trains, with one method."""

    on: CostContext
    peft: PeftConfig
    models: int = 1
    weight_sets: int = 1
    """Sets of weights under the models."""
    scalars: int = 0
    """Of the models, those that have a scalar head instead of the output layer."""
    scalar: ModelShape | None = None
    """Of those, where it is another one."""

    @property
    def of_one(self) -> int:
        """Parameters that train, of a model with an output layer."""
        return COSTS[self.peft.method].trained(self.on.shape, self.peft)

    @property
    def parameters(self) -> int:
        """That train, of all models."""
        shape = self.scalar or self.on.shape
        of_scalar = COSTS[self.peft.method].trained(shape, self.peft)
        of_scalar -= shape.own_head if self.peft.method == "none" else 0
        return (self.models - self.scalars) * self.of_one + self.scalars * of_scalar

    @property
    def _trains_all(self) -> bool:
        return COSTS[self.peft.method].keeps == "all"

    @property
    def sets(self) -> list[tuple[CostContext, bool]]:
        """Each set of weights, in the order of loading, and whether it is a scalar model's own."""
        own = min(self.scalars, self.weight_sets - self.models + self.scalars)
        scalar = replace(self.on, shape=self.scalar or self.on.shape)
        return [(self.on, False)] * (self.weight_sets - own) + [(scalar, True)] * own

    def weights(self, name: str) -> Iterator[Allocation]:
        """Of the models, frozen or not; where they are sharded, this rank's share, and what stays whole."""
        on = self.on
        total = sum(weight_bytes(each, self.peft.method, is_scalar=scalar) for each, scalar in self.sets)
        count = sum(each.shape.parameters for each, _ in self.sets)
        adapters = self.parameters if COSTS[self.peft.method].is_adapter else 0
        total += on.dtype_bytes * adapters
        how, on_host = f"{name}: {billions(count)} x {on.dtype_bytes} B", on.zero == "zero3_offload"
        if not on.shards_weights:
            yield Allocation("weights", total, how)
            return
        yield Allocation("weights", total / on.shard_ranks, f"{how}{over(on.shard_ranks)}", on_host)
        if is_deepspeeds(on):
            small = sum(each.shape.small for each, _ in self.sets) + adapters
            how = f"whole on every rank, because they are small: {billions(small)} x {on.dtype_bytes} B"
            yield Allocation("weights", on.dtype_bytes * small, how)

    def gathered(self) -> Iterator[Allocation]:
        """Of sharded weights, what is gathered while the models run. One runs after the other; FSDP2 keeps
        what belongs to no layer of all of them until the optimizer steps."""
        if not self.on.shards_weights:
            return
        shapes = [each.shape for each, _ in self.sets]
        outside = [each.shape.outside - (each.shape.own_head if scalar else 0) for each, scalar in self.sets]
        yield gathered_layers(self.on, max(shapes, key=lambda shape: shape.layer), sum(outside))

    def optimizer(self) -> Allocation:
        """fp32 masters and Adam's two moments."""
        on, share = self.on, self.on.shard_ranks
        how = f"{billions(self.parameters)} trained x (4 master + 4 + 4 moments) B{over(share)}"
        return Allocation("optimizer", 3 * FP32 * self.parameters / share, how, on.zero == "zero3_offload")

    def buffers(self) -> Iterator[Allocation]:
        """What DeepSpeed's stage 3 holds for gradients from its beginning to its end, whether it learns or
        not: this rank's share of them, with offloading once more beside the masters, and the bucket."""
        on, count = self.on, self.parameters
        if on.zero not in ("zero3", "zero3_offload"):
            return
        offloads = on.zero == "zero3_offload"
        times = 2 if offloads else 1
        how = f"ZeRO-3's: {billions(count)} trained x {times * FP32} B{over(on.ranks)}"
        yield Allocation("gradients", times * FP32 * count / on.ranks, how, offloads)
        yield self._bucket("DeepSpeed's bucket")

    def _bucket(self, name: str) -> Allocation:
        from rlhf.training.deepspeed import bucket_elements

        count = bucket_elements(self.parameters)
        return Allocation("gradients", FP32 * count, f"{name}: {billions(count)} x {FP32} B")

    def _bucket_sent(self) -> Iterator[Allocation]:
        """A copy of the bucket, and of stage 3 this rank's part of what comes back. Stage 3 sends a weight
        that does not fit into the bucket by itself: its gradient, and that in fp32."""
        from rlhf.training.deepspeed import bucket_elements

        on, largest = self.on, max(each.shape.largest for each, _ in self.sets)
        is_alone = is_deepspeeds(on) and self._trains_all
        if is_alone and largest > bucket_elements(self.parameters):
            each = on.dtype_bytes + FP32
            how = f"the largest weight, sent by itself: {billions(largest)} x {each} B"
            yield Allocation("gradients", each * largest, how)
            return
        yield self._bucket("the bucket as it is sent")
        if is_deepspeeds(on):
            count = bucket_elements(self.parameters)
            how = f"this rank's part of it: {billions(count)} x {FP32} B{over(on.ranks)}"
            yield Allocation("gradients", FP32 * count / on.ranks, how)

    def _stepping(self) -> Iterator[Allocation]:
        """DeepSpeed takes the norm of one weight's gradient after the other in double precision. Then it
        updates all weights of a model as if they were one: their gradients are laid end to end, unless they
        are so on the host."""
        on, count = self.on, self.parameters / self.models
        if on.zero == "zero3_offload":
            return
        joined = FP32 * count / on.ranks
        largest = max(each.shape.largest for each, _ in self.sets) if self._trains_all else 0
        share = on.ranks if is_deepspeeds(on) else 1
        norm = 2 * FP32 * largest / share
        how = f"one model's, laid end to end: {billions(count)} x {FP32} B{over(on.ranks)}"
        if norm > joined:
            how = f"the largest weight's norm: {billions(largest)} x {2 * FP32} B{over(share)}"
        yield Allocation("gradients", max(norm, joined), how)

    def gradients(
        self, *, passes: int, at_step: bool = False, together: bool = False
    ) -> Iterator[Allocation]:
        """Beside `buffers`: fp32; of a single pass in the model's precision, until the optimizer steps.

        Args:
            together: one backward pass goes through all models.
        """
        on, count = self.on, self.parameters
        if on.zero in ("zero3", "zero3_offload"):
            if not at_step:
                yield from self._bucket_sent()
            else:
                yield from self._stepping()
            return
        if on.zero in ("zero1", "zero2"):
            if at_step:
                yield from self._stepping()
            else:
                yield self._bucket("DeepSpeed's bucket")
                yield from self._bucket_sent()
        if on.shards_weights:
            yield self._sent(at_step=at_step, together=together)
        share = on.shard_ranks if on.zero != "zero1" else 1
        if passes == 1 and not at_step and on.zero == "none":
            # they come while activations go; when all of these are there, the output layer's
            count = on.shape.head if self._trains_all else count
            how = f"{billions(count)} x {on.dtype_bytes} B, while all activations are there"
            yield Allocation("gradients", on.dtype_bytes * count, how)
            return
        yield Allocation(
            "gradients", FP32 * count / share, f"{billions(count)} trained x {FP32} B{over(share)}"
        )

    def _sent(self, *, at_step: bool, together: bool) -> Allocation:
        """Of FSDP2: a layer's whole gradients, and again in fp32 as they are sent; those outside the layers
        grow until the pass ends, and are sent then, when no activations are left."""
        on, b = self.on, self.on.dtype_bytes
        if not self._trains_all:
            count = self.parameters / self.models / on.shape.layers
            return Allocation("gradients", (b + FP32) * count, f"sent: {billions(count)} x {b + FP32} B")
        every = [each.shape.outside - (each.shape.own_head if scalar else 0) for each, scalar in self.sets]
        outside = sum(every) if together else max(every)
        if at_step:
            how = f"sent as the pass ends: {billions(outside)} outside the layers x ({b} + {FP32}) B"
            gathered = f"{billions(sum(every))} x {b} B are still gathered"
            return Allocation("gradients", (b + FP32) * outside + b * sum(every), f"{how}, {gathered}")
        layer = max(each.shape.layer for each, _ in self.sets)
        how = f"sent: a layer's {billions(layer)} x ({b} + {FP32}) B, {billions(outside)} outside x {b} B"
        return Allocation("gradients", (b + FP32) * layer + b * outside, how)


def weight_bytes(on: CostContext, method: MethodName = "none", *, is_scalar: bool = False) -> float:
    """Of one model, without adapters; a scalar head instead of the output layer is nothing beside it."""
    quantized, shape = COSTS[method].weight_bytes, on.shape
    count = shape.parameters - (shape.own_head if is_scalar else 0)
    if quantized is None:
        return on.dtype_bytes * count
    return on.dtype_bytes * (count - shape.linear) + quantized * shape.linear


def is_deepspeeds(on: CostContext) -> bool:
    """DeepSpeed's stage 3 shards the weights, not FSDP2."""
    return on.zero in ("zero3", "zero3_offload")


def gathered_layers(on: CostContext, shape: ModelShape, outside: float) -> Allocation:
    """What a pass through a sharded model gathers on each rank, layer by layer.

    FSDP2 holds the layer that runs and the next one, and all that is outside the layers. DeepSpeed keeps
    gathered weights up to a number.

    Args:
        outside: parameters outside the layers, which FSDP2 gathers once for the whole pass.
    """
    if is_deepspeeds(on):
        from rlhf.training.deepspeed import live_elements

        count: float = max(live_elements(shape.parameters), shape.layer)
        what = ""
    else:
        count = 2 * shape.layer + outside
        what = f" (2 layers of {billions(shape.layer)}, {billions(outside)} outside them)"
    how = f"gathered while they run{what}: {billions(count)} x {on.dtype_bytes} B"
    return Allocation("weights", on.dtype_bytes * count, how)


def gathered_whole(on: CostContext) -> Allocation:
    """A sharded policy that is gathered whole on every rank, so that the local engine samples from it without
    the other ranks (`local_sampling` whole)."""
    how = f"gathered whole for sampling: {billions(on.shape.parameters)} x {on.dtype_bytes} B"
    return Allocation("weights", weight_bytes(on), how)


def gathered_by_layers(on: CostContext) -> Allocation:
    """A sharded policy that the local engine samples from layer by layer, all ranks in step
    (`local_sampling` layers)."""
    return gathered_layers(on, on.shape, on.shape.outside)


def frozen_placed(on: CostContext, placed: str) -> str:
    """Where a frozen model is. `auto`: as the weights that train."""
    if placed != "auto":
        return placed
    return "sharded" if on.shards_weights else "replicated"


def frozen_weights(
    on: CostContext, name: str, placed: str = "replicated", *, is_scalar: bool = False
) -> Allocation:
    """The weights of a model that does not train.

    Args:
        placed: as ppo.frozen_placement.
        is_scalar: it has a scalar head instead of the output layer.
    """
    head, b = on.shape.own_head if is_scalar else 0, on.dtype_bytes
    count = on.shape.parameters - head
    if placed != "sharded":
        how = f"{name}: {billions(count)} x {b} B"
        return Allocation("weights", b * count, how, placed == "offloaded")
    whole = on.shape.small if is_deepspeeds(on) else 0
    share = on.shard_ranks if on.shards_weights else on.ranks
    how = f"{name}: {billions(count - whole)} x {b} B{over(share)}, and {billions(whole)} x {b} B whole"
    return Allocation("weights", b * ((count - whole) / share + whole), how, on.zero == "zero3_offload")


def frozen_runs(
    on: CostContext, name: str, placed: str = "auto", *, is_scalar: bool = False
) -> list[Allocation]:
    """A frozen model that runs: its weights, and the layers that are gathered meanwhile if it is sharded."""
    placed = frozen_placed(on, placed)
    parts = [frozen_weights(on, name, placed, is_scalar=is_scalar)]
    if placed == "offloaded":
        size = weight_bytes(on, is_scalar=is_scalar)
        parts.append(Allocation("weights", size, f"{name}, on the GPU while it runs"))
    return [*parts, gathered_layers(on, on.shape, on.shape.head)] if placed == "sharded" else parts


def loading(on: CostContext, trained: Trained, *others: Allocation) -> MemoryPhase:
    """Every rank reads its slices of sharded models, or whole models: in the precision of the run, or in 4
    bits. Files in another form than the model's are converted into others before, which is not counted.

    Args:
        others: models beside those of the engine that are there by then.
    """
    size = sum(weight_bytes(each, trained.peft.method, is_scalar=scalar) for each, scalar in trained.sets)
    how = f"{trained.weight_sets} {'sharded' if on.shards_weights else 'whole'} models"
    size /= on.shard_ranks if on.shards_weights else 1
    return MemoryPhase(LOADING, [Allocation("weights", size, how, on.zero == "zero3_offload"), *others])


def activations(
    on: CostContext,
    tokens: float,
    longest: float,
    peft: PeftConfig,
    *,
    checkpointing: bool,
    beside: ModelShape | None = None,
) -> Allocation:
    """What a pass over so many tokens keeps for its gradients, and what the layer at work needs beside.

    Args:
        longest: tokens of a row.
        beside: another model's, whose pass is kept at the same time.
    """
    graphs = [on, *([] if beside is None else [replace(on, shape=beside)])]
    kept, hows, b = 0.0, [], on.dtype_bytes
    for each in graphs:
        layers, hidden = each.shape.layers, each.shape.hidden
        kept += layers * b * hidden if checkpointing else kept_per_token(each, longest, peft)
        layer = kept_per_layer(each, longest, peft)
        hows.append(
            f"{layers} layers' inputs x {b * hidden} B, and {layer:.0f} B of one layer computed anew"
            if checkpointing
            else f"{kept_layers(each, peft)} layers x {layer:.0f} B"
        )
    if checkpointing:
        kept += max(kept_per_layer(each, longest, peft) for each in graphs)
    working = 2 * max(working_per_token(each.shape, b) for each in graphs)
    how = f"{tokens:.0f} tokens x ({' + '.join(hows)}; {working} B at work)"
    return Allocation("activations", tokens * (kept + working), how)


def kept_layers(on: CostContext, peft: PeftConfig) -> int:
    """Layers that keep anything."""
    return min(peft.layers, on.shape.layers) if peft.method == "freeze" else on.shape.layers


def kept_per_token(on: CostContext, longest: float, peft: PeftConfig) -> float:
    """Bytes a token that all layers keep."""
    kept = kept_layers(on, peft) * kept_per_layer(on, longest, peft)
    if peft.method != "adapter":
        return kept
    # of the first layer nothing is kept that stands before its first bottleneck
    norm = on.shape.hidden * (on.dtype_bytes if on.shape.has_fused_norm else FP32)
    attention = norm + kept_by_attention(on, longest, peft)
    mlp = norm + kept_by_mlp(on)
    return kept - attention - (mlp if peft.placement == "pfeiffer" else 0)


def kept_per_layer(on: CostContext, longest: float, peft: PeftConfig) -> float:
    """Bytes a token that one decoder layer keeps: norms, attention, MLP, inputs of linear layers."""
    shape, b, method = on.shape, on.dtype_bytes, COSTS[peft.method]
    norms = shape.normalized * (b if shape.has_fused_norm else FP32)
    kept = norms + kept_by_attention(on, longest, peft) + kept_by_mlp(on) + method.keeps_too(shape, b, peft)
    if method.keeps == "values":
        return kept
    query = shape.heads * shape.head_size
    inputs = b * (2 * shape.hidden + query + (shape.intermediate if shape.is_gated else 0))
    if method.keeps == "inputs":
        return kept + inputs
    return kept + inputs + (0 if shape.has_fused_norm else b * shape.normalized)


def kept_by_mlp(on: CostContext) -> float:
    """Bytes a token of one layer."""
    return on.dtype_bytes * on.shape.intermediate * (3 if on.shape.is_gated else 2)


def kept_by_attention(on: CostContext, longest: float, peft: PeftConfig) -> float:
    """Bytes a token of one layer: queries, keys and values, and the kernel's result, unless that is kept as
    the next linear layer's input; packed rows on CPUs are computed anew without it.

    Behind virtual tokens, under a mask, each head has keys and values of its own, and the mask is kept too.
    """
    shape, b, method = on.shape, on.dtype_bytes, COSTS[peft.method]
    query, keys = shape.heads * shape.head_size, 2 * shape.kv_heads * shape.head_size
    if added := method.added_tokens(shape, peft):
        seen = longest + added
        return b * (2 * query + 2 * query * seen / longest + seen) + FP32 * shape.heads
    has_result = method.keeps == "values" and (on.pads or not on.on_cpu)
    return b * (query + keys + (query if has_result else 0))


def working_per_token(shape: ModelShape, b: int, parts: int = 1) -> int:
    """Bytes a token of the layer at work that no graph keeps; of one of so many ranks that share its MLP."""
    mlp = b * shape.intermediate * (3 if shape.is_gated else 2) // parts
    return 2 * b * shape.hidden + max(mlp, 2 * FP32 * shape.hidden)


def reading(on: CostContext, tokens: float) -> Allocation:
    """A pass without gradients: the layer at work alone."""
    each = working_per_token(on.shape, on.dtype_bytes)
    return Allocation("activations", tokens * each, f"{tokens:.0f} tokens x {each} B (the layer at work)")


def logits(on: CostContext, *, learns: bool) -> Allocation:
    """Of a chunk of tokens: never of a whole pass. On CPUs a few rows at a time in fp32."""
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
    """What decoding needs beside the model: the cache, the newest tokens' logits, copies of weights.

    Args:
        rows: decoded together, on each rank.
        folds: an adapter is folded into copies of the weights meanwhile.
        gathers: the weights are sharded otherwise.
    """
    shape, b = on.shape, on.dtype_bytes
    if on.vllm is not None:  # see beside_vllm
        if gathers:
            how = f"the largest weight, gathered to hand it over: {billions(shape.largest)} x {b} B"
            yield Allocation("weights", b * shape.largest, how)
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
    how = f"{rows:.0f} rows x ({prompt:.0f} + {new_tokens} + {room}) tokens x {per_token} B"
    yield Allocation("KV cache", rows * tokens * per_token, how)
    each = b + 4 * FP32
    yield Allocation(
        "logits", rows * shape.vocabulary * each, f"{rows:.0f} rows x {shape.vocabulary} x {each} B"
    )
    yield reading(on, min(rows * prompt, max(PREFILL_TOKENS, prompt)))


def beside_vllm(on: CostContext, phases: Sequence[MemoryPhase]) -> list[MemoryPhase]:
    """The phases of a stage that samples, each with what vLLM holds from its first use to the end of the run:
    a part of the weights and its cache. On a GPU it sleeps outside of sampling, and holds its graphs alone.
    While models are loaded it is there if an earlier stage has sampled.
    """
    if on.vllm is None:
        return list(phases)
    share = on.vllm.tensor_parallel
    how = f"vLLM's own: {billions(on.shape.parameters)} x {on.dtype_bytes} B{over(share)}"
    awake = [
        Allocation("weights", weight_bytes(on) / share, how),
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
    """What vLLM's largest pass needs beside its weights and its cache. It tries one when it is built."""
    from rlhf.generation.vllm import batched_tokens

    shape, b, tokens = on.shape, on.dtype_bytes, batched_tokens(vllm)
    each = working_per_token(shape, b, parts=vllm.tensor_parallel)
    yield Allocation("activations", tokens * each, f"vLLM reads {tokens} tokens together x {each} B")
    rows, each = vllm.max_num_seqs, b + VLLM_SAMPLES * FP32
    how = f"vllm.max_num_seqs: {rows} rows x {shape.vocabulary} x {each} B"
    yield Allocation("logits", rows * shape.vocabulary * each, how)


def vllm_row(on: CostContext, vllm: VllmConfig, tokens: int) -> float:
    """Bytes of vLLM's cache, on each rank, for one row of so many tokens. A rank has at least one head."""
    from rlhf.generation.vllm import BLOCK_TOKENS

    shape, block = on.shape, BLOCK_TOKENS[on.machine.kind]
    heads = max(1, shape.kv_heads // vllm.tensor_parallel)
    each = on.dtype_bytes * 2 * shape.full_layers * heads * shape.head_size
    return math.ceil(tokens / block) * block * each


def folded(on: CostContext) -> Allocation:
    """Copies of the linear layers' weights, with the adapter merged."""
    how = f"adapter folded into copies: {billions(on.shape.linear)} x {on.dtype_bytes} B"
    return Allocation("weights", on.dtype_bytes * on.shape.linear, how)


def amount(size: float) -> str:
    """Bytes for reading."""
    for unit, factor in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} B"


def billions(count: float) -> str:
    """A count for reading."""
    return f"{count / 1e9:.2f}e9" if count >= 1e8 else f"{count / 1e6:.2f}e6"


def over(share: int) -> str:
    """` / 8 ranks`, or nothing."""
    return f" / {share} ranks" if share > 1 else ""
