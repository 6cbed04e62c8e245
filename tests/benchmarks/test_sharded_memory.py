"""Two ranks take about half of what one takes, in every phase of a stage: the benchmark, smaller."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_memory import LOADING, MIB, PrivateMemory, main, map_each_block
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.jobs import TINY
from rlhf.models.load import load_causal_lm
from rlhf.models.peft.attach import attach
from rlhf.models.peft.config import PeftConfig


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["fsdp2", "zero3"])
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_no_rank_of_two_holds_a_whole_model(stage: str, zero: str) -> None:
    """Sampled from layer by layer, as the preflight chooses for a model that fits no rank whole."""
    options = ["--model", "small", "--zero", zero, "--stages", stage, "--generation", "layers"]
    (one,), (first, second) = main(options)[f"{stage} {zero}"]
    assert {"loading", "reading", "learning", "checkpointing", "publishing"} <= one.keys()
    for phase in one:
        assert max(first[phase], second[phase]) <= 0.6 * one[phase], phase
        assert first[phase] == pytest.approx(second[phase], rel=0.1), phase


def loaded_for_qlora(directory: Path, layers: int) -> tuple[float, int, int]:
    """Write a model and load it: the peak of private memory, and bytes of all quantized weights and of the
    largest one, as they are in the files."""
    shape: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=259, num_hidden_layers=layers, **shape)
    LlamaForCausalLM(config).save_pretrained(directory)
    memory = PrivateMemory()
    with memory.phase(LOADING):
        model = load_causal_lm(directory, TINY, torch.float32)
        attach(model, PeftConfig(method="qlora", rank=4))
    kind = pytest.importorskip("bitsandbytes").nn.Linear4bit
    held = [each.in_features * each.out_features for each in model.modules() if isinstance(each, kind)]
    return memory.end()[LOADING] * MIB, 4 * sum(held), 4 * max(held)


@pytest.mark.slow
def test_qlora_has_one_tensor_whole_while_it_reads_the_others(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    map_each_block()
    loaded_for_qlora(tmp_path / "first", 1)  # loads libraries
    peak, whole, largest = loaded_for_qlora(tmp_path / "model", 4)
    assert peak < 1.1 * whole / 8 + 3 * largest  # bitsandbytes copies it
    assert peak < whole / 3
