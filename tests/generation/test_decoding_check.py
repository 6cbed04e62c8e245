"""Models that the local engine would decode wrongly are refused by name before the first answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from helpers.chains import Chain
from helpers.jobs import TINY, on_cpu, user
from helpers.models import tiny_family
from rlhf.config import ConfigError
from rlhf.generation.decoding_check import check_decoding
from rlhf.generation.policy_model import PolicyModel
from rlhf.models.base import load_tokenizer
from rlhf.models.packed_attention import pack_where_possible
from rlhf.models.peft.attach import attach
from rlhf.models.peft.config import PeftConfig

DECODED = ["llama", "gpt2", "gpt_oss", "bloom", "falcon_h1", "qwen3_next", "deepseek_v2", "phimoe"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DECODED)
def test_what_is_decoded_rightly_passes(name: str, dtype: torch.dtype) -> None:
    model = tiny_family(name, dtype)
    pack_where_possible(model)
    check_decoding(model)


def test_adapters_and_virtual_tokens_pass() -> None:
    for method in ("lora", "prompt"):
        model = tiny_family("llama")
        attach(model, PeftConfig(method=method))
        check_decoding(model)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("mamba", torch.float32), ("rwkv", torch.float32), ("rwkv", torch.bfloat16),
        # its states stand in its modules: only rows that end before others, or a second batch, tell
        ("recurrent_gemma", torch.float32), ("recurrent_gemma", torch.bfloat16),
    ],
)  # fmt: skip
def test_what_keeps_a_state_elsewhere_is_refused(name: str, dtype: torch.dtype) -> None:
    model = tiny_family(name, dtype)
    words = rf"generation=local: {type(model).__name__} cannot be sampled from: decoded with a KV cache its "
    with pytest.raises(ConfigError, match=words + r".* nats per token off"):
        check_decoding(model)


def test_what_cannot_be_decoded_at_all_is_refused() -> None:
    words = r"MiniMaxForCausalLM cannot be sampled from: decoding with a KV cache fails: MiniMax uses cache"
    with pytest.raises(ConfigError, match=words):
        check_decoding(tiny_family("minimax"))


def test_it_is_found_out_before_the_first_answer(tiny_model: Path) -> None:
    model = tiny_family("mamba")
    told: list[int] = []
    policy = PolicyModel(model, load_tokenizer(tiny_model, TINY), on_cpu())
    with pytest.raises(ConfigError, match="MambaForCausalLM cannot be sampled from"):
        policy.sample(
            [user("Hi")], max_new_tokens=2, temperature=1.0, batch_rows=1,
            generator=torch.Generator(), on_rows=told.append,
        )  # fmt: skip
    assert not told


def test_sft_is_not_trained_for_a_stage_that_could_not_sample(tmp_path: Path, tiny_model: Path) -> None:
    tiny_family("mamba").save_pretrained(tmp_path / "mamba")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "mamba")
    model = ("model=local", f"model.path={tmp_path / 'mamba'}", "sft.peft=none", "precision=fp32")
    chain = Chain(tmp_path)
    outcome = chain.run("stage=generate", "generate.reward=vader", *model)
    assert outcome.code == 2
    assert "MambaForCausalLM cannot be sampled from" in outcome.err
    assert outcome.statuses == {"prepare": "ran", "sft": "failed"}
