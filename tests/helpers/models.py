"""The tiny model, tuned and published; and tiny models of many families, of two layers of random weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from helpers.jobs import TINY
from rlhf.models.base import load_tokenizer
from rlhf.models.load import load_causal_lm
from rlhf.models.logprobs import pack_sequences, response_statistics
from rlhf.models.packed_attention import pack_where_possible
from rlhf.models.peft.attach import Adapter, attach
from rlhf.models.peft.config import PeftConfig
from rlhf.models.peft.saved import save_adapter
from rlhf.models.save import save_settings
from rlhf.models.value_head import load_scalar_model, reset_head, save_scalar_model

COMMON: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 259, "max_position_embeddings": 1024,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
"""What most configs call the same things. The vocabulary is that of `model=tiny`: bytes."""
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024}
WIDE = {"head_dim": 16}
WINDOW = {"sliding_window": 8}
EXPERTS = {
    "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}  # fmt: skip
DENSE_AND_SHARED = {
    "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "head_dim": 8,
}  # fmt: skip
MAMBA = {
    "mamba_d_state": 16, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_ssm": 128,
}  # fmt: skip
DELTA = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}  # fmt: skip
PER_LAYER = {"vocab_size_per_layer_input": 259, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}

FAMILIES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "bloom": GPT2,
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, **WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "deepseek_v2": EXPERTS | LATENT | DENSE_AND_SHARED,
    "deepseek_v3": EXPERTS | LATENT | DENSE_AND_SHARED,
    "ernie4_5": {},
    "ernie4_5_moe": EXPERTS | {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
    "exaone4": WINDOW,
    "falcon": {},
    "falcon_h1": MAMBA | {"lm_head_multiplier": 0.5},
    "gemma": WIDE,
    "gemma2": WIDE | WINDOW,
    "gemma3_text": WIDE | WINDOW,
    "gemma3n_text": WIDE | WINDOW | PER_LAYER | {
        "intermediate_size": [96, 96], "laurel_rank": 8, "activation_sparsity_pattern": [0.5, 0.0],
    },
    "gemma4_text": WIDE | WINDOW | PER_LAYER | {"global_head_dim": 16},
    "glm": WIDE,
    "glm4": WIDE,
    "glm4_moe": EXPERTS | DENSE_AND_SHARED | WIDE,
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gpt_neox": {},
    "gpt_oss": EXPERTS | WIDE | WINDOW,
    "gptj": GPT2 | {"rotary_dim": 8},
    "granite": {"logits_scaling": 4.0},
    "granitemoe": EXPERTS | {"logits_scaling": 4.0},
    "granitemoehybrid": EXPERTS | MAMBA | {"layer_types": ["mamba", "attention"], "logits_scaling": 4.0},
    "helium": WIDE,
    "hunyuan_v1_dense": WIDE,
    "jamba": EXPERTS | MAMBA | {"mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama": {},
    "llama4_text": EXPERTS | WIDE | {"intermediate_size_mlp": 96},
    "mamba": {"state_size": 16},
    "minicpm3": LATENT,
    "minimax": EXPERTS | WIDE | {"block_size": 8},
    "minimax_m2": EXPERTS | WIDE,
    "mistral": WINDOW,
    "mixtral": EXPERTS,
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 1024},
    "nemotron": {},
    "nemotron_h": WIDE | {
        "hybrid_override_pattern": "M*", "mamba_num_heads": 4, "mamba_head_dim": 32, "n_groups": 1,
        "ssm_state_size": 16,
    },
    "olmo": {},
    "olmo2": {},
    "olmo3": WINDOW,
    "olmoe": EXPERTS,
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "phi": {},
    "phi3": {},
    "phimoe": EXPERTS,
    "qwen2": {},
    "qwen2_moe": EXPERTS,
    "qwen3": WIDE,
    "qwen3_moe": EXPERTS | WIDE,
    "qwen3_5_text": WIDE | DELTA | {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_next": EXPERTS | WIDE | DELTA | {"layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": WIDE | {"num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 16},
    "rwkv": {"attention_hidden_size": 64, "context_length": 1024},
    "seed_oss": WIDE,
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
}  # fmt: skip
"""transformers' name of a family -> what its config needs beside the common sizes."""

OWN_STATE = "it keeps a state elsewhere"
REFUSED = {
    "mamba": OWN_STATE,
    "minimax": "uses cache of its own",
    "recurrent_gemma": OWN_STATE,
    "rwkv": OWN_STATE,
}
"""What is not run, and the words of the refusal."""


def tiny_config(family: str) -> PreTrainedConfig:
    """The config of a family's tiny model."""
    config: PreTrainedConfig = AutoConfig.for_model(family, **COMMON | FAMILIES[family])
    return config


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The same model; transformers' own `to` has lost its types."""
    nn.Module.to(model, dtype)
    return model


def tiny_family(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model whose answers differ from prompt to prompt."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(3.0)
                else:  # biases, norms and scales, so that none is without effect
                    parameter.add_(0.02 * torch.randn(parameter.shape))
    model.eval()
    return in_dtype(model, dtype)


IDS = torch.arange(3, 35)[None]
LINEARS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@torch.no_grad()
def scale(model: PreTrainedModel, factor: float) -> None:
    """Multiply all matrices, so that logits differ more."""
    for parameter in model.parameters():
        parameter.mul_(factor if parameter.dim() > 1 else 1.0)


def sharper(directory: Path) -> PreTrainedModel:
    """A tiny model whose logits differ, as those of the untrained one hardly do."""
    found = load_causal_lm(directory, TINY, torch.float32)
    scale(found, 6.0)
    return found


def small_of(kind: str, options: dict[str, Any]) -> PreTrainedModel:
    """A random model of two layers; packed, where its kind can be."""
    config = AutoConfig.for_model(
        kind, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        vocab_size=100, n_embd=64, n_layer=2, n_head=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        **{"num_key_value_heads": 2, **options},
    )  # fmt: skip
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    pack_where_possible(model)
    return model


def load(directory: Path) -> PreTrainedModel:
    return load_causal_lm(directory, TINY, torch.float32)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


def embedding(model: PreTrainedModel) -> Tensor:
    """Its first weights."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def train(model: PreTrainedModel, steps: int = 3) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    batch = pack_sequences([IDS[0, :4]], [IDS[0, 4:]], torch.device("cpu"))
    for _ in range(steps):
        optimizer.zero_grad()
        (-response_statistics(model, batch, 1.0).logp_N.mean()).backward()
        optimizer.step()


def tuned(model: PreTrainedModel, rank: int = 4) -> Adapter:
    torch.manual_seed(0)
    return attach(model, PeftConfig(method="lora", rank=rank, alpha=8.0))


def store(directory: Path, tiny_model: Path) -> tuple[Path, Path]:
    """A base model and a place for an artifact, as they lie in a store."""
    base, artifact = directory / "base" / "1", directory / "sft" / "2"
    shutil.copytree(tiny_model, base)
    artifact.mkdir(parents=True)
    return base, artifact


def saved(directory: Path, tiny_model: Path, peft: PeftConfig) -> tuple[Path, Tensor]:
    """An artifact with a trained adapter and no weights beside it, and what the trained model says."""
    base, artifact = store(directory, tiny_model)
    model = load(base)
    torch.manual_seed(0)
    adapter = attach(model, peft)
    train(model)
    metrics = save_adapter(adapter, artifact, base, "1")
    save_settings(model, load_tokenizer(base, TINY), artifact)
    files = list((artifact / "adapter").iterdir())
    assert metrics == {"adapter_bytes": sum(path.stat().st_size for path in files)}
    return artifact, logits(model)


def write_reward(directory: Path, model: Path, template: str | None = None) -> Path:
    """A reward model of any weights on that model; with another chat template if one is given."""
    torch.manual_seed(1)
    scalar = load_scalar_model(model, TINY, torch.float32, new_head=True)
    reset_head(scalar)
    tokenizer = load_tokenizer(model, TINY)
    tokenizer.chat_template = template or tokenizer.chat_template
    directory.mkdir(exist_ok=True)
    save_scalar_model(scalar, tokenizer, directory)
    return directory
