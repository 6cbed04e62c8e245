"""The whole chain on tiny models of other families than Llama: six of them, or all by `make families`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.chains import Chain
from helpers.models import FAMILIES, REFUSED, tiny_family
from rlhf.models.base import ModelConfig, load_tokenizer
from rlhf.models.save import save_policy
from rlhf.models.value_head import load_scalar_model

LOCAL = ModelConfig(kind="local")
SIX = ("deepseek_v3", "gemma3n_text", "granite", "lfm2", "llama4_text", "nemotron")
"""Latent attention and experts, layers of unlike sizes, scaled logits, convolutions, chunks and own masks;
transformers has a classification class for two of them."""
ALL = os.environ.get("RLHF_FAMILIES") == "all"


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES if ALL else SIX)
def test_the_whole_chain(name: str, tmp_path: Path, tiny_model: Path) -> None:
    model = tmp_path / "model"
    save_policy(tiny_family(name), load_tokenizer(tiny_model, LOCAL), model)
    chain = Chain(tmp_path)
    settings = (
        "model=local",
        f"model.path={model}",
        "model.chat_template=chatml",
        "gates=warn",
        "precision=fp32",
    )
    outcome = chain.run(*settings)
    if name in REFUSED:
        assert outcome.code == 2 and REFUSED[name] in outcome.err and "Traceback" not in outcome.err
        assert "sft" not in outcome.statuses or outcome.statuses["sft"] == "failed"
        assert not any((tmp_path / "store" / "sft").glob("*/manifest.json"))
        return
    assert outcome.code == 0, outcome.err
    others = chain.run(*settings, "sft.peft=lora", "reward.peft=none", "ppo.peft=none")
    assert others.code == 0, others.err
    for each in (outcome, others):
        assert each.summary["stages"]["ppo"]["metrics"]["ppo/engine_mismatch"] < 1e-4
        for stage in ("sft", "ppo"):
            AutoModelForCausalLM.from_pretrained(each.artifact(stage))
        load_scalar_model(each.artifact("reward"), LOCAL, torch.float32)
