"""Random models of other families than Llama, each of two or three layers, from their configs alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT: dict[str, Any] = {
    **EXPERTS, "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8, "n_group": 1, "topk_group": 1,
}  # fmt: skip
STATE: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
HYBRID: dict[str, Any] = {
    **SIZES, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16, "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, head_dim=8, query_pre_attn_scalar=8),
    "gpt_oss": lambda: transformers.GptOssConfig(**SIZES, num_local_experts=4, head_dim=8),
    "bloom": lambda: transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
    "mpt": lambda: transformers.MptConfig(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4),
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=256,
        attention_types=[[["global", "local"], 1]], bos_token_id=1, eos_token_id=2,
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2
    ),
    "mamba": lambda: transformers.MambaConfig(**STATE),
    "rwkv": lambda: transformers.RwkvConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, context_length=256
    ),
    "recurrent_gemma": lambda: transformers.RecurrentGemmaConfig(
        **{**SIZES, "num_hidden_layers": 3, "intermediate_size": 96}, lru_width=32, attention_window_size=64
    ),
    "falcon_h1": lambda: transformers.FalconH1Config(
        **SIZES, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, head_dim=8
    ),
    "jamba": lambda: transformers.JambaConfig(
        **SIZES, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
        num_experts=4, mamba_d_state=8, mamba_dt_rank=4,
    ),
    "minimax": lambda: transformers.MiniMaxConfig(
        **SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=8, block_size=8,
        layer_types=["linear_attention", "full_attention"],
    ),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**SIZES, **EXPERTS, num_experts=4, head_dim=8),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(**HYBRID),
    "deepseek_v2": lambda: transformers.DeepseekV2Config(**{**SIZES, **LATENT}),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(**{**SIZES, **LATENT}),
    "glm4_moe": lambda: transformers.Glm4MoeConfig(
        **SIZES, **EXPERTS, n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, head_dim=8,
        n_group=1, topk_group=1,
    ),
    "ernie4_5_moe": lambda: transformers.Ernie4_5_MoeConfig(
        **SIZES, moe_num_experts=4, moe_k=2, moe_intermediate_size=16, moe_num_shared_experts=1,
        moe_layer_start_index=1,
    ),
    "phimoe": lambda: transformers.PhimoeConfig(**SIZES, num_local_experts=4),
}  # fmt: skip


def family(name: str, **changes: Any) -> PreTrainedModel:
    """Sharper than a random model is, whose logits hardly differ; in evaluation mode."""
    config = CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    return model.eval()
