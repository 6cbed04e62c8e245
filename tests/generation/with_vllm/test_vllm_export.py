"""An exported policy, served as docs/using.md says."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.chains import Chain, run_main
from helpers.vllm import needs_vllm, served, written


@needs_vllm
@pytest.mark.slow
def test_vllm_serves_what_was_exported_and_answers_as_transformers_does(tmp_path: Path) -> None:
    (base := tmp_path / "base").mkdir()
    (directory := tmp_path / "chain").mkdir()
    chain = Chain(directory)
    model = ("model=local", f"model.path={written(base, head_dim=32)}", "model.chat_template=chatml")
    keys = ("sft.peft=lora", "precision=fp32", "sft.gates.prompt_gain=null")
    outcome = chain.run("stage=sft", *keys, *model)
    assert outcome.code == 0, outcome.err
    assert run_main(chain.directory, ("export", "run1", "mine"), chain.directory).code == 0
    mine, messages = chain.directory / "mine", [{"role": "user", "content": "Say 3"}]

    with served(mine) as address:
        content: dict[str, Any] = {
            "model": str(mine), "messages": messages, "max_tokens": 12, "temperature": 0.0,
        }  # fmt: skip
        request = urllib.request.Request(
            f"{address}/chat/completions", json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as reply:
            said = json.loads(reply.read())["choices"][0]["message"]["content"]

    theirs = AutoModelForCausalLM.from_pretrained(mine, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(mine)
    inputs: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = theirs.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert said == tokenizer.decode(ids, skip_special_tokens=True)
