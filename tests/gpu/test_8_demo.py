"""The whole chain in bf16: the demo on a GPU, the tiny model on a CPU. Its speed is recorded."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

import pytest
import torch

from helpers.chains import Chain, Outcome, run_main
from helpers.gpu import Reaches
from rlhf.costs.model_shape import shape_in
from rlhf.distributed.device import matmul_speed

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
OPERATIONS = 4
"""A frozen weight and token, forward and backward, at least; of policy and critic each."""
MISMATCH = 0.05
"""Nats a token between the engine that samples and the pass that learns."""


def run(directory: Path, on_gpu: bool) -> Outcome:
    if on_gpu:
        arguments = ["run_name=demo", "precision=bf16"]
        return run_main(directory, arguments, directory / "runs" / "demo")
    return Chain(directory).run("precision=bf16", "ppo.steps=3")


def test_the_chain_runs_in_bf16(tmp_path: Path, device: torch.device, on_gpu: bool, reaches: Reaches) -> None:
    outcome = run(tmp_path, on_gpu)
    assert outcome.code == 0, outcome.err
    assert not on_gpu or "generation=auto is vllm" in outcome.out
    assert set(outcome.statuses.values()) == {"ran"}
    lines = [json.loads(line) for line in (outcome.directory / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step" in line and "ppo/seconds_update" in line][
        1:
    ]  # the first warms up
    assert steps
    reaches("mismatch", max(step["ppo/engine_mismatch"] for step in steps), at_most=MISMATCH)

    def tokens(step: dict[str, float]) -> float:
        return step["ppo/prompt_tokens"] + step["ppo/response_tokens"]

    learned = median(tokens(step) / step["ppo/seconds_update"] for step in steps)
    sampled = median(step["ppo/response_tokens"] / step["ppo/seconds_generate"] for step in steps)
    parameters = shape_in(outcome.artifact("ppo")).parameters
    peak = 1e9 * matmul_speed(torch.bfloat16, device)
    reaches("tokens/s sampled", sampled, at_least=1.0)
    reaches("tokens/s learned", learned, at_least=1.0)
    reaches("share of the peak while learning", 2 * OPERATIONS * parameters * learned / peak, at_most=1.0)
