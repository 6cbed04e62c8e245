"""Decoding on prepacked weights gives what the weights themselves give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from helpers.jobs import TINY
from rlhf.generation.cpu_decoder import Product, is_packable, prepacked
from rlhf.generation.sampler import generate
from rlhf.models.load import load_causal_lm

has_layout = pytest.mark.skipif(
    not is_packable(nn.Linear(1, 1, dtype=torch.bfloat16)),
    reason="torch has no bf16 arithmetic of oneDNN here",
)
IDS = torch.arange(3, 15).view(2, 6)


def load(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    return load_causal_lm(directory, TINY, dtype)


def replaced(model: PreTrainedModel) -> int:
    return sum("forward" in module.__dict__ for module in model.modules())


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits.float()
    return found


@has_layout
def test_the_logits_are_the_models_up_to_rounding(tiny_model: Path) -> None:
    model = load(tiny_model, torch.bfloat16)
    exact, plain = logits(load(tiny_model, torch.float32)), logits(model)
    with prepacked(model, 2):
        linears = sum(isinstance(module, nn.Linear) for module in model.modules())
        assert replaced(model) == linears > 0
        found = logits(model)
    rounding = float((plain - exact).abs().max())
    assert 0 < rounding < 0.05 * float(exact.abs().max())
    assert float((found - exact).abs().max()) < 2 * rounding


def test_the_copies_are_of_the_weights_as_they_are_now(tiny_model: Path) -> None:
    model = load(tiny_model, torch.bfloat16)
    before = logits(model)
    with pytest.raises(KeyError), prepacked(model, 2):
        raise KeyError
    assert replaced(model) == 0
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(20.0)
    after, largest = logits(model), float(before.abs().max())
    assert float((after - before).abs().max()) > 0.5 * largest
    with prepacked(model, 2):
        torch.testing.assert_close(logits(model), after, rtol=0.0, atol=0.1 * largest)


def test_fp32_weights_are_used_themselves(tiny_model: Path) -> None:
    model = load(tiny_model, torch.float32)
    with prepacked(model, 2):
        assert replaced(model) == 0


@has_layout
@pytest.mark.parametrize("rows", [1, 2])
def test_one_answer_alone_is_not_worth_the_copies(rows: int) -> None:
    config = AutoConfig.for_model(
        "qwen3", num_hidden_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=32,
        vocab_size=50, head_dim=16, num_key_value_heads=2,
    )  # fmt: skip
    model, found = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), set()
    model.register_forward_pre_hook(lambda *_: found.add(replaced(model) > 0))
    generate(
        model, list(IDS[:rows]), max_new_tokens=3, temperature=1.0, stop_ids=[], pad_id=0,
        uniform_BR=torch.full((rows, 3), 0.5), batch_rows=rows,
    )  # fmt: skip
    assert found == {rows > 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biases", ["", "qkv", "q", "kv"])
@torch.no_grad()
def test_layers_that_are_multiplied_together_answer_for_themselves(biases: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers = [
        nn.Linear(32, size, bias=name in biases, dtype=dtype)
        for name, size in (("q", 32), ("k", 16), ("v", 16))
    ]
    x, other = torch.randn(2, 32, dtype=dtype), torch.randn(2, 64, dtype=dtype)
    expected = torch.cat([layer(x) for layer in layers], dim=-1)
    product = Product(layers, 2)
    torch.testing.assert_close(product(x), expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(product.plus(other, x), expected + other, rtol=0.02, atol=0.02)
