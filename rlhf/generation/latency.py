"""Measure by how much an unmerged adapter slows decoding."""

from __future__ import annotations

import time

import torch
from transformers import PreTrainedModel

from rlhf.distributed.compute import Compute
from rlhf.generation.decoding_check import UndecodableError, check_decoding
from rlhf.generation.sampler import generate
from rlhf.models.peft.attach import has_adapters, without_adapters

TOKENS, ROUNDS = 16, 3
"""Tokens per round, and number of rounds. The fastest round counts, because other work on the machine can
only slow a round down."""


def token_seconds(model: PreTrainedModel, compute: Compute) -> dict[str, float]:
    """Summary metrics: seconds per decoded token of one row, greedily and with a KV cache, with and without
    the adapters. Rank 0 measures. Empty if `zero` is not none, if the model has no adapters, or if the
    local engine cannot decode it."""
    if compute.zero != "none" or not has_adapters(model):
        return {}
    return compute.main_only(lambda: _measured(model))


def _measured(model: PreTrainedModel) -> dict[str, float]:
    try:
        check_decoding(model)
    except UndecodableError:  # this stage never samples from it; a stage that does reports the error
        return {}
    _seconds(model)  # warm-up: the first call sets up caches and threads
    rounds = []
    for _ in range(ROUNDS):
        with_adapters = _seconds(model)
        with without_adapters(model):
            rounds.append((with_adapters, _seconds(model)))
    fastest = [min(column) for column in zip(*rounds, strict=True)]
    return {"token_seconds": fastest[0], "token_seconds_base": fastest[1]}


def _seconds(model: PreTrainedModel) -> float:
    start = time.perf_counter()
    generate(
        model,
        [torch.arange(4)],
        max_new_tokens=TOKENS,
        temperature=0.0,
        stop_ids=[-1],
        pad_id=0,
        uniform_BR=torch.zeros(1, TOKENS),
        batch_rows=1,
    )
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return (time.perf_counter() - start) / TOKENS
