"""Decoding with few operations gives what the model itself gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention

from helpers.models import in_dtype
from rlhf.generation.cpu_decoder import LeanDecoder, Product, is_lean
from rlhf.generation.sampler import generate, growing_cache
from rlhf.models.peft.attach import attach, without_adapters
from rlhf.models.peft.config import PeftConfig

LENGTHS, NEW = (3, 9, 1, 6), 5
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}), ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {"head_dim": 8, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    ("llama", {"num_key_value_heads": 4}),
    ("mistral", {"sliding_window": None, "head_dim": 32}), ("qwen2", {}),
]  # fmt: skip
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("mistral", {"sliding_window": 4}), ("qwen3", {}), ("gpt2", {}), ("olmo2", {}), ("granite", {}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
]  # fmt: skip


def tiny(kind: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """With biases and norms of its own, and weights that matter."""
    shape = {"num_key_value_heads": 2, "hidden_act": "silu", "hidden_size": 64, "n_embd": 64, "n_head": 4}
    config = AutoConfig.for_model(
        kind, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, vocab_size=100,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **shape | options,
    )  # fmt: skip
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn_like(parameter) * 0.2 + (parameter.mean() if parameter.dim() == 1 else 0)
            )
    return in_dtype(model, dtype)


def applies(model: PreTrainedModel) -> bool:
    return is_lean(model, growing_cache(model))


@torch.inference_mode()
def logits(model: PreTrainedModel, *, lean: bool) -> Tensor:
    """Of NEW tokens behind prompts padded on the left; rows are dropped on the way. [..., V]"""
    generator = torch.Generator().manual_seed(1)
    width = max(LENGTHS)
    tokens = torch.randint(3, 100, (len(LENGTHS), width + NEW), generator=generator)
    mask = (torch.arange(width + NEW) >= width - torch.tensor(LENGTHS)[:, None]).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache: DynamicCache = growing_cache(model)
    model(
        input_ids=tokens[:, :width], attention_mask=mask[:, :width], position_ids=positions[:, :width],
        past_key_values=cache, use_cache=True,
    )  # fmt: skip
    decoder = LeanDecoder(model, len(LENGTHS)) if lean else None
    found = []
    for end in range(width + 1, width + NEW + 1):
        if end == width + 3:
            rows = torch.tensor([0, 2, 3])
            cache.batch_select_indices(rows)
            tokens, mask, positions = tokens[rows], mask[rows], positions[rows]
        if decoder is not None:
            step = decoder(tokens[:, end - 1], mask[:, :end], positions[:, end - 1], cache)
        else:
            step = model(
                input_ids=tokens[:, end - 1 : end], attention_mask=mask[:, :end],
                position_ids=positions[:, end - 1 : end], past_key_values=cache, use_cache=True,
            ).logits[:, -1]  # fmt: skip
        found.append(step.float())
    return torch.cat(found)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_logits_are_the_models(kind: str, options: dict[str, Any]) -> None:
    model = tiny(kind, **options)
    assert applies(model)
    expected = logits(model, lean=False)
    assert float(expected.std()) > 0.5
    torch.testing.assert_close(logits(model, lean=True), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_in_bf16_they_are_as_close_to_the_exact_ones(kind: str, options: dict[str, Any]) -> None:
    model = tiny(kind, torch.bfloat16, **options)
    plain, found = logits(model, lean=False), logits(model, lean=True)
    exact = logits(model.float(), lean=False)
    rounding = float((plain - exact).norm() / exact.norm())
    assert 0 < rounding < 0.05
    assert float((found - exact).norm() / exact.norm()) < 1.5 * rounding


@pytest.mark.parametrize(("kind", "options"), OTHERS)
def test_other_models_decode_as_they_are(kind: str, options: dict[str, Any]) -> None:
    assert not applies(tiny(kind, **options))


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "adapter", "prefix", "prompt"])
def test_an_adapter_beside_the_weights_is_never_left_out(method: str) -> None:
    model = tiny()
    assert applies(model)
    attach(model, PeftConfig.model_validate({"method": method}))
    assert not applies(model)


def test_a_model_that_attends_in_its_own_way_is_left_alone() -> None:
    class Other(LlamaAttention):
        """Code that comes with a model may say anything."""

    model = tiny()
    assert applies(model)
    model.model.layers[1].self_attn.__class__ = Other
    assert not applies(model)


@pytest.mark.parametrize("is_folded", [True, False], ids=["folded in", "left out"])
def test_an_adapter_that_is_folded_in_or_left_out(is_folded: bool) -> None:
    model = tiny()
    before = logits(model, lean=True)
    adapter = attach(model, PeftConfig.model_validate({"method": "lora"}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    with adapter.merged() if is_folded else without_adapters(model):
        assert applies(model)
        expected = logits(model, lean=False)
        torch.testing.assert_close(logits(model, lean=True), expected, atol=1e-4, rtol=1e-4)
    assert torch.allclose(before, expected, atol=1e-3) != is_folded


@pytest.mark.parametrize(("rows", "calls"), [(1, 3), (2, 1)])
def test_the_engine_decodes_with_it(rows: int, calls: int) -> None:
    """A single answer is not worth the copies."""
    model, lengths = tiny(), []
    model.register_forward_pre_hook(lambda *_: lengths.append(1))
    generate(
        model, [torch.arange(3, 7)] * rows, max_new_tokens=3, temperature=1.0, stop_ids=[], pad_id=0,
        uniform_BR=torch.full((rows, 3), 0.5), batch_rows=rows,
    )  # fmt: skip
    assert len(lengths) == calls


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
