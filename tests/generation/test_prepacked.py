"""Decoding on prepacked weights gives what the weights themselves give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.config import PeftConfig
from rlhf.generation.local import generate
from rlhf.generation.prepacked import _groups, _has_layout, prepacked
from rlhf.models.adapters import attach
from rlhf.models.load import ModelConfig, load_causal_lm

IDS = torch.arange(3, 15).view(2, 6)


def load(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    return load_causal_lm(directory, ModelConfig(kind="tiny"), dtype)


def replaced(model: PreTrainedModel) -> int:
    return sum("forward" in module.__dict__ for module in model.modules())


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits.float()
    return found


@pytest.mark.skipif(not _has_layout(), reason="torch has no bf16 arithmetic of oneDNN here")
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


@pytest.mark.skipif(not _has_layout(), reason="torch has no bf16 arithmetic of oneDNN here")
@pytest.mark.parametrize("rows", [1, 2])
def test_one_answer_alone_is_not_worth_the_copies(tiny_model: Path, rows: int) -> None:
    model, found = load(tiny_model, torch.bfloat16), set()
    model.register_forward_pre_hook(lambda *_: found.add(replaced(model) > 0))
    generate(
        model, list(IDS[:rows]), max_new_tokens=3, temperature=1.0, stop_ids=[], pad_id=0,
        uniform_BR=torch.full((rows, 3), 0.5), batch_rows=rows,
    )  # fmt: skip
    assert found == {rows > 1}


def test_layers_are_multiplied_together_inside_an_adapter_too(tiny_model: Path) -> None:
    model = load(tiny_model, torch.bfloat16)
    plain = _groups(model)
    attach(model, PeftConfig(method="lora"))
    assert [group for group in _groups(model) if group in plain] == plain
    assert sorted(map(len, plain)) == sorted([1, 1, 2, 3] * len(model.model.layers) + [1])


class Attention(nn.Module):
    def __init__(self, biases: str) -> None:
        super().__init__()
        for name, size in (("q", 32), ("k", 16), ("v", 16)):
            self.add_module(f"{name}_proj", nn.Linear(32, size, bias=name in biases, dtype=torch.bfloat16))

    def outputs(self, inputs: str, of: dict[str, Tensor]) -> list[Tensor]:
        """`inputs` names what query, key and value layer are asked about, in this order."""
        layers = [self.get_submodule(f"{name}_proj") for name in "qkv"]
        return [layer(of[name]) for layer, name in zip(layers, inputs, strict=True)]


@pytest.mark.skipif(not _has_layout(), reason="torch has no bf16 arithmetic of oneDNN here")
@pytest.mark.parametrize("biases", ["", "qkv", "q", "kv"])
@torch.no_grad()
def test_layers_that_are_multiplied_together_answer_for_themselves(biases: str) -> None:
    torch.manual_seed(0)
    model = Attention(biases)
    of = {name: torch.randn(2, 1, 32, dtype=torch.bfloat16) for name in "ab"}
    cases = ("aaa", "aba", "bab", "bbb", "aab")
    expected = [model.outputs(inputs, of) for inputs in cases]
    with prepacked(model, 2):
        for inputs, wanted in zip(cases, expected, strict=True):
            for found, right in zip(model.outputs(inputs, of), wanted, strict=True):
                torch.testing.assert_close(found, right, rtol=0.02, atol=0.02)
