"""The methods of `peft=`, in every training stage: what each one reads, and what can be done with it."""

from __future__ import annotations

from typing import NamedTuple

PREFIX = "base_model.model."
"""Prefix of the names of an adapter's weights in peft's files."""
KINDS = {"PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt", "P_TUNING": "p_tuning"}
"""Methods with virtual tokens: name in peft's files -> our name."""


class Method(NamedTuple):
    """What must be known about a method before anything is loaded."""

    knobs: tuple[str, ...]
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

METHODS = {
    "none": Method((), shards=True, samples_by_vllm=True),
    # Hu et al. 2021, arXiv:2106.09685
    "lora": Method(UPDATE, shares=True, shards=True, samples_by_vllm=True),
    # Liu et al. 2024, arXiv:2402.09353: a low-rank update of each weight's direction, and its length
    "dora": Method(UPDATE),
    # Dettmers et al. 2023, arXiv:2305.14314: lora on weights held in 4 bits (quantization.py)
    "qlora": Method(UPDATE, starts_apart=True),
    # Liu et al. 2022, arXiv:2205.05638: factors of keys, values and what enters the second linear layer
    "ia3": Method(()),
    # the last layers, as they are (Howard and Ruder 2018, arXiv:1801.06146, start with the last one)
    "freeze": Method(("layers",), samples_by_vllm=True),
    # modules between the layers: rlhf/models/peft/bottleneck.py
    "adapter": Method(("placement", "size"), merges=False),
    # tokens that nobody wrote before every row: rlhf/models/peft/virtual_tokens.py
    "prefix": Method(("tokens",), merges=False, pads=True, starts_apart=True),
    "prompt": Method(("tokens",), merges=False, pads=True, starts_apart=True),
    "p_tuning": Method(("tokens",), merges=False, pads=True, starts_apart=True),
}
"""`none` trains all parameters."""
