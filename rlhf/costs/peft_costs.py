"""Parameters and memory of each tuning method, by formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rlhf.costs.model_shape import ModelShape
from rlhf.models.peft.config import PeftConfig
from rlhf.models.peft.methods import MethodName

KeptTensors = Literal["all", "inputs", "values", "last"]
"""Tensors that autograd keeps of a pass. all: those for gradients of weights and activations; inputs: also
the inputs of linear layers with an adapter; values: only those that gradients pass through on the way to
trained parameters; last: as all, but only of the trained layers."""
Count = Callable[[ModelShape, PeftConfig], int]
"""(shape, peft) -> number of parameters, or of tokens."""
ByteCount = Callable[[ModelShape, int, PeftConfig], float]
"""(shape, bytes of an element, peft) -> bytes."""


@dataclass(frozen=True)
class MethodCost:
    """Costs of one tuning method."""

    trained: Count
    """Trained parameters."""
    keeps: KeptTensors
    extra_kept: ByteCount = lambda shape, b, peft: 0.0
    """Bytes per token and layer that autograd keeps of the method's own layers."""
    is_adapter: bool = True
    """Whether several tuned versions can share one model in memory."""
    added: Count = lambda shape, peft: 0
    """Additional parameters that each token passes through when the method is served unmerged."""
    added_kernels: float = 0.0
    """Additional time per token and layer when served unmerged, in units of `LAYER_SECONDS`: `token_seconds`
    minus `token_seconds_base` in docs/methods.md. DoRA recomputes all weights' norms."""
    added_tokens: Count = lambda shape, peft: 0
    """Virtual tokens before every prompt."""
    weight_bytes: float | None = None
    """Bytes of a frozen weight in linear layers, if not those of the run's precision."""

    def published(self, shape: ModelShape, peft: PeftConfig) -> int:
        """Published parameters: for p-tuning the virtual tokens, not the network that produces them."""
        return (_prompt if peft.method == "p_tuning" else self.trained)(shape, peft)


def _all(shape: ModelShape, peft: PeftConfig) -> int:
    return shape.parameters


def _lora(shape: ModelShape, peft: PeftConfig) -> int:
    return peft.rank * sum(each.sides for each in shape.target_linears(peft.target_modules))


def _dora(shape: ModelShape, peft: PeftConfig) -> int:
    return _lora(shape, peft) + sum(each.outputs for each in shape.target_linears(peft.target_modules))


def _ia3(shape: ModelShape, peft: PeftConfig) -> int:
    return shape.kv_elements + shape.layers * shape.intermediate


def _num_placements(peft: PeftConfig) -> int:
    return 2 if peft.placement == "houlsby" else 1


def _bottlenecks(shape: ModelShape, peft: PeftConfig) -> int:
    return _num_placements(peft) * shape.layers * (2 * shape.hidden * peft.size + peft.size + shape.hidden)


def _kept_by_updates(shape: ModelShape, b: int, peft: PeftConfig) -> float:
    """The output of `lora_A` in seven linear layers."""
    return b * 7 * peft.rank


def _kept_by_dora(shape: ModelShape, b: int, peft: PeftConfig) -> float:
    """As `_kept_by_updates`, and the outputs of frozen weight and update: a trained factor scales both."""
    results = 2 * sum(each.outputs for each in shape.target_linears(peft.target_modules))
    return _kept_by_updates(shape, b, peft) + b * results / shape.layers


def _kept_by_factors(shape: ModelShape, b: int, peft: PeftConfig) -> float:
    """The tensors that the factors multiply: keys, values, and in fp32 the second linear layer's input."""
    return b * 2 * shape.kv_heads * shape.head_size + 4 * shape.intermediate


def _kept_by_bottlenecks(shape: ModelShape, b: int, peft: PeftConfig) -> float:
    """The inputs of `down` and of `up`."""
    return _num_placements(peft) * b * (shape.hidden + peft.size)


def _prefix(shape: ModelShape, peft: PeftConfig) -> int:
    return peft.tokens * shape.kv_elements


def _prompt(shape: ModelShape, peft: PeftConfig) -> int:
    return peft.tokens * shape.hidden


def _p_tuning(shape: ModelShape, peft: PeftConfig) -> int:
    return peft.tokens * shape.hidden + 3 * shape.hidden * (shape.hidden + 1)


def _tokens(shape: ModelShape, peft: PeftConfig) -> int:
    return peft.tokens


def _last(shape: ModelShape, peft: PeftConfig) -> int:
    return min(peft.layers, shape.layers) * shape.linear // shape.layers


COSTS: dict[MethodName, MethodCost] = {
    "none": MethodCost(_all, "all", is_adapter=False),
    "lora": MethodCost(_lora, "inputs", _kept_by_updates, added=_lora, added_kernels=3.0),
    "dora": MethodCost(_dora, "inputs", _kept_by_dora, added=_dora, added_kernels=33.0),
    "qlora": MethodCost(
        _lora, "inputs", _kept_by_updates, added=_lora, added_kernels=3.0, weight_bytes=4.127 / 8
    ),
    "ia3": MethodCost(_ia3, "values", _kept_by_factors, added=_ia3, added_kernels=0.5),
    "adapter": MethodCost(
        _bottlenecks, "values", _kept_by_bottlenecks, added=_bottlenecks, added_kernels=0.8
    ),
    "prefix": MethodCost(_prefix, "values", added_tokens=_tokens),
    "prompt": MethodCost(_prompt, "values", added_tokens=_tokens),
    "p_tuning": MethodCost(_p_tuning, "values", added_tokens=_tokens),
    "freeze": MethodCost(_last, "last", is_adapter=False),
}
"""Costs by method of `rlhf.models.peft.methods.METHODS`."""
