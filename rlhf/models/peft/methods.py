"""The methods of `peft=`, in every training stage: what each is, reads and can do."""

from __future__ import annotations

from typing import Literal, NamedTuple

MethodName = Literal[
    "none", "lora", "dora", "qlora", "ia3", "freeze", "adapter", "prefix", "prompt", "p_tuning"
]
PREFIX = "base_model.model."
"""Prefix of the names of an adapter's weights in peft's files."""
KINDS: dict[str, MethodName] = {"PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt", "P_TUNING": "p_tuning"}
"""Methods with virtual tokens: name in peft's files -> our name."""


class Method(NamedTuple):
    """What must be known about a method before anything is loaded."""

    title: str
    """What tables call it."""
    source: str
    knobs: tuple[str, ...] = ()
    """The keys of `PeftConfig` that it reads."""
    merges: bool = True
    """Whether it can be merged into the weights, so that a plain model is published."""
    shares: bool = False
    """Whether PPO's models can share one backbone, because only the adapter's own weights change."""
    shards: bool = False
    """Whether it was tested with every `zero=`."""
    samples_by_vllm: bool = False
    """Whether a model that is being trained can be handed over to vLLM."""
    pads: bool = False
    """Whether it puts virtual tokens before every row. Rows are then padded."""
    starts_apart: bool = False
    """Whether the method changes the model before its first step."""


UPDATE = ("rank", "alpha", "target_modules")

METHODS: dict[MethodName, Method] = {
    "none": Method("full", "every parameter", shards=True, samples_by_vllm=True),
    "lora": Method(
        "LoRA", "Hu et al. 2021, arXiv:2106.09685", UPDATE, shares=True, shards=True, samples_by_vllm=True
    ),
    # a low-rank update of each weight's direction, and its length
    "dora": Method("DoRA", "Liu et al. 2024, arXiv:2402.09353", UPDATE),
    # lora on weights held in 4 bits (quantization.py)
    "qlora": Method(
        "QLoRA", "Dettmers et al. 2023, arXiv:2305.14314, NF4 with double quantization: 4.127 bits a weight",
        UPDATE, starts_apart=True,
    ),
    # factors of keys, values and what enters the second linear layer
    "ia3": Method("IA3", "Liu et al. 2022, arXiv:2205.05638"),
    # modules between the layers: rlhf/models/peft/bottleneck.py
    "adapter": Method(
        "adapter", "Pfeiffer et al. 2020, arXiv:2005.00247: a bottleneck a layer", ("placement", "size"),
        merges=False,
    ),
    # tokens that nobody wrote before every row: rlhf/models/peft/virtual_tokens.py
    "prefix": Method(
        "prefix", "Li and Liang 2021, arXiv:2101.00190", ("tokens",), merges=False, pads=True,
        starts_apart=True,
    ),
    "prompt": Method(
        "prompt", "Lester et al. 2021, arXiv:2104.08691", ("tokens",), merges=False, pads=True,
        starts_apart=True,
    ),
    "p_tuning": Method(
        "p-tuning", "Liu et al. 2021, arXiv:2103.10385: an MLP makes the soft tokens", ("tokens",),
        merges=False, pads=True, starts_apart=True,
    ),
    # as they are (Howard and Ruder 2018, arXiv:1801.06146, start with the last one)
    "freeze": Method("last layers", "the last layers train", ("layers",), samples_by_vllm=True),
}  # fmt: skip
"""`none` trains all parameters. What each one costs is in `rlhf.costs.peft_costs.COSTS`."""
