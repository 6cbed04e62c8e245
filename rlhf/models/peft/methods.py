"""The methods of `peft=`, for every training stage: source, keys and abilities of each."""

from __future__ import annotations

from typing import Literal, NamedTuple

MethodName = Literal[
    "none", "lora", "dora", "qlora", "ia3", "freeze", "adapter", "prefix", "prompt", "p_tuning"
]
PREFIX = "base_model.model."
"""Prefix of the names of an adapter's weights in peft's files."""
VIRTUAL_TOKEN_METHODS: dict[str, MethodName] = {
    "PREFIX_TUNING": "prefix",
    "PROMPT_TUNING": "prompt",
    "P_TUNING": "p_tuning",
}
"""Methods with virtual tokens: name in peft's files -> our name."""


class Method(NamedTuple):
    """Properties of a method that are known before any model is loaded."""

    title: str
    """Name in tables."""
    source: str
    """Paper, or a short description."""
    knobs: tuple[str, ...] = ()
    """Keys of `PeftConfig` that it reads, besides `method`."""
    merges: bool = True
    """Whether the result can be merged into the weights, so that a plain model is published."""
    shares: bool = False
    """Whether PPO's models can share one backbone: only the adapter's own weights change."""
    shards: bool = False
    """Whether it is tested with every value of `zero`."""
    samples_by_vllm: bool = False
    """Whether vLLM can get the weights of a model in training."""
    pads: bool = False
    """Whether it puts virtual tokens before every row, so that rows are padded."""
    changes_start: bool = False
    """Whether it changes the model's outputs before the first training step."""


LOW_RANK_KEYS = ("rank", "alpha", "target_modules")

METHODS: dict[MethodName, Method] = {
    "none": Method("full", "every parameter", shards=True, samples_by_vllm=True),
    "lora": Method(
        "LoRA", "Hu et al. 2021, arXiv:2106.09685", LOW_RANK_KEYS, shares=True, shards=True,
        samples_by_vllm=True,
    ),
    # a low-rank update of each weight's direction, and its length
    "dora": Method("DoRA", "Liu et al. 2024, arXiv:2402.09353", LOW_RANK_KEYS),
    # lora on weights held in 4 bits (quantization.py)
    "qlora": Method(
        "QLoRA", "Dettmers et al. 2023, arXiv:2305.14314, NF4 with double quantization: 4.127 bits a weight",
        LOW_RANK_KEYS, changes_start=True,
    ),
    # factors of keys, values and what enters the second linear layer
    "ia3": Method("IA3", "Liu et al. 2022, arXiv:2205.05638"),
    # modules between the layers: rlhf/models/peft/bottleneck.py
    "adapter": Method(
        "adapter", "Pfeiffer et al. 2020, arXiv:2005.00247: a bottleneck a layer", ("placement", "size"),
        merges=False,
    ),
    # learned virtual tokens before every row: rlhf/models/peft/virtual_tokens.py
    "prefix": Method(
        "prefix", "Li and Liang 2021, arXiv:2101.00190", ("tokens",), merges=False, pads=True,
        changes_start=True,
    ),
    "prompt": Method(
        "prompt", "Lester et al. 2021, arXiv:2104.08691", ("tokens",), merges=False, pads=True,
        changes_start=True,
    ),
    "p_tuning": Method(
        "p-tuning", "Liu et al. 2021, arXiv:2103.10385: an MLP makes the soft tokens", ("tokens",),
        merges=False, pads=True, changes_start=True,
    ),
    # all at once (Howard and Ruder 2018, arXiv:1801.06146, start with the last one)
    "freeze": Method("last layers", "the last layers train", ("layers",), samples_by_vllm=True),
}  # fmt: skip
"""`none` trains all parameters. `rlhf.costs.peft_costs.COSTS` has the costs of each method."""
