"""What each tuning method trains, publishes and adds, by formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rlhf.plan.shape import Shape

Keeps = Literal["all", "inputs", "values", "last"]
"""What a pass keeps for its gradients. all: what weights and activations need; inputs: of the linear layers
that an adapter stands beside too; values: only what is needed on the way to what trains; last: as all, but of
the layers that train."""
Count = Callable[[Shape, int], int]
"""(shape, rank) -> parameters."""
VIRTUAL_TOKENS, BOTTLENECK, LAST_LAYERS = 20, 64, 2
"""The defaults of `PeftConfig.tokens`, `size` and `layers`."""


@dataclass(frozen=True)
class Method:
    """One way to tune."""

    title: str
    source: str
    trained: Count
    keeps: Keeps
    mergeable: bool
    """Whether the result can be folded into the weights, so that it costs nothing when it is served."""
    is_adapter: bool = True
    """Whether many can stand on one model in memory."""
    added: Count = lambda shape, rank: 0
    """Parameters that each token passes beside the weights, when it is served unmerged."""
    added_kernels: float = 0.0
    """Of a layer's, when it is served unmerged."""
    added_tokens: int = 0
    """That stand before every prompt when it is served."""
    weight_bytes: float | None = None
    """A frozen weight of the linear layers, where that differs from the precision's."""
    rank: int = 16

    def published(self, shape: Shape, rank: int) -> int:
        """Parameters of what is kept: of soft tokens, not of the network that makes them."""
        return shape.hidden * VIRTUAL_TOKENS if self is METHODS["p_tuning"] else self.trained(shape, rank)


def _all(shape: Shape, rank: int) -> int:
    return shape.parameters


def _lora(shape: Shape, rank: int) -> int:
    return rank * shape.linear_sides


def _dora(shape: Shape, rank: int) -> int:
    return _lora(shape, rank) + shape.linear_outputs


def _ia3(shape: Shape, rank: int) -> int:
    return shape.kv_elements + shape.layers * shape.intermediate


def _bottlenecks(shape: Shape, rank: int) -> int:
    return shape.layers * (2 * shape.hidden * BOTTLENECK + BOTTLENECK + shape.hidden)


def _prefix(shape: Shape, rank: int) -> int:
    return VIRTUAL_TOKENS * shape.kv_elements


def _prompt(shape: Shape, rank: int) -> int:
    return VIRTUAL_TOKENS * shape.hidden


def _p_tuning(shape: Shape, rank: int) -> int:
    return VIRTUAL_TOKENS * shape.hidden + 3 * shape.hidden**2


def _last(shape: Shape, rank: int) -> int:
    return min(LAST_LAYERS, shape.layers) * shape.linear // shape.layers


METHODS: dict[str, Method] = {
    "none": Method("full", "every parameter", _all, "all", True, is_adapter=False),
    "lora": Method(
        "LoRA", "Hu et al. 2021, arXiv:2106.09685", _lora, "inputs", True, added=_lora, added_kernels=1.0
    ),
    "dora": Method(
        "DoRA", "Liu et al. 2024, arXiv:2402.09353", _dora, "inputs", True, added=_dora, added_kernels=1.5
    ),
    "qlora": Method(
        "QLoRA", "Dettmers et al. 2023, arXiv:2305.14314, NF4 with double quantization: 4.127 bits a weight",
        _lora, "inputs", True, added=_lora, added_kernels=1.0, weight_bytes=4.127 / 8,
    ),
    "ia3": Method(
        "IA3", "Liu et al. 2022, arXiv:2205.05638", _ia3, "values", True, added=_ia3, added_kernels=0.2
    ),
    "adapter": Method(
        "adapter", "Pfeiffer et al. 2020, arXiv:2005.00247: a bottleneck a layer", _bottlenecks, "values",
        False, added=_bottlenecks, added_kernels=0.2,
    ),
    "prefix": Method(
        "prefix", "Li and Liang 2021, arXiv:2101.00190", _prefix, "values", False, added_tokens=VIRTUAL_TOKENS
    ),
    "prompt": Method(
        "prompt", "Lester et al. 2021, arXiv:2104.08691", _prompt, "values", False,
        added_tokens=VIRTUAL_TOKENS,
    ),
    "p_tuning": Method(
        "p-tuning", "Liu et al. 2021, arXiv:2103.10385: an MLP makes the soft tokens", _p_tuning, "values",
        False, added_tokens=VIRTUAL_TOKENS,
    ),
    "freeze": Method("last layers", "the last two layers train", _last, "last", True, is_adapter=False),
}  # fmt: skip
"""By the name that `peft=` has for it."""
