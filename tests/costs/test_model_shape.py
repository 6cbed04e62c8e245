"""What is counted from a config alone, against the model that it describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from helpers.jobs import tiny_base
from helpers.models import tiny_config
from rlhf.costs.model_shape import shape_of
from rlhf.costs.peft_costs import COSTS
from rlhf.models.base import UnknownShapeError, skeleton
from rlhf.models.peft.attach import attach, count_parameters
from rlhf.models.peft.config import PeftConfig

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 101,
}
CONFIGS = {
    "tied": LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=True),
    "untied": LlamaConfig(**SMALL, intermediate_size=48, tie_word_embeddings=False),
    "wide heads": Qwen3Config(**SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=16),
    "gpt2": GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=101),
}  # fmt: skip


def real(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_model(name: str) -> None:
    shape, model = shape_of(CONFIGS[name]), real(CONFIGS[name])
    assert shape.parameters == count_parameters(model)[1]
    assert shape.head == model.get_output_embeddings().weight.numel()
    assert shape.is_tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    backbone = getattr(model, model.base_model_prefix)
    assert shape.parameters - shape.own_head == count_parameters(backbone)[1]


@pytest.mark.parametrize("name", ["tied", "untied", "wide heads"])
@pytest.mark.parametrize(
    "peft",
    [
        PeftConfig(method="none"), PeftConfig(method="lora", rank=5), PeftConfig(method="dora", rank=5),
        PeftConfig(method="lora", target_modules=["q_proj", "v_proj"]),
        PeftConfig(method="dora", target_modules=["down_proj"]),
        PeftConfig(method="adapter", size=7), PeftConfig(method="adapter", placement="houlsby"),
        PeftConfig(method="prefix", tokens=3), PeftConfig(method="prompt", tokens=3),
        PeftConfig(method="p_tuning", tokens=3),
    ],
    ids=str,
)  # fmt: skip
def test_a_method_trains_and_publishes_as_many_parameters_as_are_counted(name: str, peft: PeftConfig) -> None:
    model, method, shape = real(CONFIGS[name]), COSTS[peft.method], shape_of(CONFIGS[name])
    adapter = attach(model, peft)
    assert method.trained(shape, peft) == count_parameters(model)[0]
    if peft.method != "none":
        assert method.published(shape, peft) == sum(each.numel() for each in adapter.weights().values())


def test_what_is_counted_nearly(tiny_model: Path) -> None:
    for peft in (PeftConfig(method="freeze", layers=1), PeftConfig(method="ia3")):
        model = real(CONFIGS["tied"])
        attach(model, peft)
        counted = COSTS[peft.method].trained(shape_of(CONFIGS["tied"]), peft)
        assert counted == pytest.approx(count_parameters(model)[0], rel=0.01)  # but for the norms


@pytest.mark.parametrize("name", CONFIGS)
def test_keys_and_values_of_a_token_are_those_that_the_cache_holds(name: str) -> None:
    model = real(CONFIGS[name])
    cache = model(torch.arange(7)[None], use_cache=True).past_key_values
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert 7 * shape_of(CONFIGS[name]).kv_elements == held


@pytest.mark.parametrize("config", [
    MixtralConfig(**SMALL, intermediate_size=48, num_key_value_heads=2, num_local_experts=4,
                  num_experts_per_tok=2),
    Qwen3MoeConfig(**SMALL, moe_intermediate_size=48, num_key_value_heads=2, num_experts=4,
                   num_experts_per_tok=2, decoder_sparse_step=1),
], ids=["mixtral", "qwen3"])  # fmt: skip
def test_a_mixtures_experts_count_as_far_as_a_token_passes_them(config: PreTrainedConfig) -> None:
    assert shape_of(config).experts == 3 * 2 * (3 * 32 * 48)  # layers, experts of a token, three projections
    assert shape_of(CONFIGS["tied"]).experts == 0


@pytest.mark.parametrize("name", ["glm4_moe", "deepseek_v3", "qwen3_moe"])
def test_layers_that_a_low_rank_update_leaves_out_do_not_count_as_updated(name: str) -> None:
    """peft means a mixture's experts by the names of its dense layers."""
    config, peft = tiny_config(name), PeftConfig(method="lora", rank=5)
    model = skeleton(config)
    attach(model, peft)
    assert COSTS["lora"].trained(shape_of(config), peft) == count_parameters(model)[0]


def test_parameters_of_layers_and_beside_them() -> None:
    for name in ("tied", "untied", "wide heads", "gpt2"):
        shape, model = shape_of(CONFIGS[name]), real(CONFIGS[name])
        blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        assert shape.layer == count_parameters(blocks[0])[1]
        assert shape.outside + 3 * shape.layer == shape.parameters
        assert shape.small == shape.parameters  # no tensor has a hundred thousand elements
    wide = LlamaConfig(**SMALL | {"vocab_size": 5000}, intermediate_size=48, tie_word_embeddings=True)
    assert shape_of(wide).small == shape_of(wide).parameters - 5000 * 32


def test_what_the_lean_decoder_runs() -> None:
    assert shape_of(CONFIGS["tied"]).is_lean
    assert not shape_of(CONFIGS["gpt2"]).is_lean and not shape_of(CONFIGS["wide heads"]).is_lean
    assert not shape_of(MistralConfig(**SMALL, intermediate_size=48, sliding_window=8)).is_lean


def test_norms_of_queries_and_keys_count_for_each_head() -> None:
    # 2 norms of 32, one of 4 heads of 16 and one of 2; the last norm stands behind all three layers
    assert shape_of(CONFIGS["wide heads"]).norm_elements == 2 * 32 + 4 * 16 + 2 * 16 + 32 // 3


def test_the_base_models_config_needs_no_weights(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    files = tiny_base(tmp_path)
    alone = files.architecture
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert shape_of(alone).parameters == count_parameters(model)[1]


def test_what_is_no_transformer_is_said_so() -> None:
    nothing = LlamaConfig(num_hidden_layers=0)
    with pytest.raises(UnknownShapeError, match="LlamaConfig has num_hidden_layers=0"):
        shape_of(nothing)
    with pytest.raises(UnknownShapeError, match="MambaConfig names no num_attention_heads"):
        shape_of(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1))
