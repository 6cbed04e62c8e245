"""What each tuning method trains, publishes and adds, by formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rlhf.costs.model_shape import ModelShape
from rlhf.models.peft.config import PeftConfig
from rlhf.models.peft.methods import MethodName

Keeps = Literal["all", "inputs", "values", "last"]
"""What a pass keeps for its gradients. all: what weights and activations need; inputs: of the linear layers
that an adapter stands beside too; values: only what is needed on the way to what trains; last: as all, but of
the layers that train."""
Count = Callable[[ModelShape, PeftConfig], int]
"""Of parameters, or of tokens."""
Kept = Callable[[ModelShape, int, PeftConfig], float]
"""(shape, bytes of an element, knobs) -> bytes."""


@dataclass(frozen=True)
class MethodCost:
    """Of one way to tune."""

    trained: Count
    keeps: Keeps
    keeps_too: Kept = lambda shape, b, peft: 0.0
    """A token and layer, what its own layers keep for their gradients."""
    is_adapter: bool = True
    """Whether many can stand on one model in memory."""
    added: Count = lambda shape, peft: 0
    """Parameters that each token passes beside the weights, when it is served unmerged."""
    added_kernels: float = 0.0
    """Of a layer's (`LAYER_SECONDS`), when it is served unmerged: what `token_seconds` has more than
    `token_seconds_base` in docs/methods.md. DoRA computes all weights' norms anew."""
    added_tokens: Count = lambda shape, peft: 0
    """That stand before every prompt when it is served."""
    weight_bytes: float | None = None
    """A frozen weight of the linear layers, where that differs from the precision's."""

    def published(self, shape: ModelShape, peft: PeftConfig) -> int:
        """Parameters of what is kept: of soft tokens, not of the network that makes them."""
        return (_prompt if peft.method == "p_tuning" else self.trained)(shape, peft)


def _all(shape: ModelShape, peft: PeftConfig) -> int:
    return shape.parameters


def _lora(shape: ModelShape, peft: PeftConfig) -> int:
    return peft.rank * sum(each.sides for each in shape.updated(peft.target_modules))


def _dora(shape: ModelShape, peft: PeftConfig) -> int:
    return _lora(shape, peft) + sum(each.outputs for each in shape.updated(peft.target_modules))


def _ia3(shape: ModelShape, peft: PeftConfig) -> int:
    return shape.kv_elements + shape.layers * shape.intermediate


def _places(peft: PeftConfig) -> int:
    return 2 if peft.placement == "houlsby" else 1


def _bottlenecks(shape: ModelShape, peft: PeftConfig) -> int:
    return _places(peft) * shape.layers * (2 * shape.hidden * peft.size + peft.size + shape.hidden)


def _kept_by_updates(shape: ModelShape, b: int, peft: PeftConfig) -> float:
    """Of seven linear layers, what `lora_A` makes."""
    return b * 7 * peft.rank


def _kept_by_dora(shape: ModelShape, b: int, peft: PeftConfig) -> float:
    """The frozen weight's result and the update's too: both are multiplied by a factor that trains."""
    results = 2 * sum(each.outputs for each in shape.updated(peft.target_modules))
    return _kept_by_updates(shape, b, peft) + b * results / shape.layers


def _kept_by_factors(shape: ModelShape, b: int, peft: PeftConfig) -> float:
    """What they multiply: keys and values, and in the factors' fp32 what enters the second linear layer."""
    return b * 2 * shape.kv_heads * shape.head_size + 4 * shape.intermediate


def _kept_by_bottlenecks(shape: ModelShape, b: int, peft: PeftConfig) -> float:
    """The inputs of `down` and of `up`."""
    return _places(peft) * b * (shape.hidden + peft.size)


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
"""Of each of `rlhf.models.peft.methods.METHODS`."""
