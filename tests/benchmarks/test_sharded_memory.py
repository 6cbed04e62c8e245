"""Two ranks take about half of what one takes, in every phase of a stage: the benchmark, smaller."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sharded_memory import LOADING, MIB, PrivateMemory, main, map_each_block
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.jobs import TINY
from helpers.spawned import start_ranks
from helpers.warm import context
from rlhf.distributed.compute import Compute
from rlhf.models.load import load_causal_lm
from rlhf.models.peft.attach import attach
from rlhf.models.peft.config import PeftConfig


@pytest.mark.parametrize(("zero", "generation"), [("fsdp2", "local"), ("zero3", "layers")])
@pytest.mark.parametrize(
    "stage", [pytest.param("ppo", marks=pytest.mark.slow), pytest.param("sft", marks=pytest.mark.nightly)]
)
def test_no_rank_of_two_holds_a_whole_model(stage: str, zero: str, generation: str) -> None:
    """The local engine samples in both ways: fsdp2's weights gathered whole, as the preflight chooses for a
    model that fits; zero3's layer by layer, as for one that does not. PPO has all that SFT has."""
    context()  # the benchmark forks its ranks from the same server
    options = ["--model", "small", "--zero", zero, "--stages", stage, "--generation", generation]
    (one,), (first, second) = main(options)[f"{stage} {zero}"]
    assert {"loading", "reading", "learning", "checkpointing", "publishing"} <= one.keys()
    for phase in one:
        assert max(first[phase], second[phase]) <= 0.6 * one[phase], phase
        assert first[phase] == pytest.approx(second[phase], rel=0.1), phase


def load_for_qlora(compute: Compute, directory: Path) -> tuple[float, int]:
    """Write a model and load it, after a smaller one that brings the libraries: the peak of private memory,
    and bytes of all quantized weights, as they are in the files."""
    import bitsandbytes

    kinds: Any = bitsandbytes.nn
    map_each_block()
    shape: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8}
    for layers in (1, 12):
        config = LlamaConfig(vocab_size=259, num_hidden_layers=layers, **shape)
        LlamaForCausalLM(config).save_pretrained(directory / str(layers))
        memory = PrivateMemory()
        with memory.phase(LOADING):
            model = load_causal_lm(directory / str(layers), TINY, compute.dtype)
            attach(model, PeftConfig(method="qlora", rank=4))
        peak = memory.end()[LOADING] * MIB
    held = [
        each.in_features * each.out_features for each in model.modules() if isinstance(each, kinds.Linear4bit)
    ]
    return peak, 4 * sum(held)


@pytest.mark.slow
@pytest.mark.qlora
def test_qlora_quantizes_each_tensor_as_it_is_read(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    peak, whole = start_ranks(load_for_qlora, 1, tmp_path, timeout=60, seconds=120)()[0]
    # an eighth is the result; bitsandbytes works with up to seven times the largest tensor, 1/53 of the whole
    assert peak < whole / 3
