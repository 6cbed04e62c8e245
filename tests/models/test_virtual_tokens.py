"""Virtual tokens: what peft makes of the same file, whatever stands beside a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, OPTConfig, PreTrainedModel

from helpers.jobs import TINY, on_cpu
from helpers.models import IDS, load, saved, train
from rlhf.config import ConfigError
from rlhf.generation import sampler as local
from rlhf.generation.policy_model import PolicyModel
from rlhf.generation.sampler import generate
from rlhf.models.load import load_causal_lm
from rlhf.models.logprobs import pack_sequences, response_statistics
from rlhf.models.packed_attention import hidden_states
from rlhf.models.packed_batch import Packed
from rlhf.models.peft.attach import attach, count_parameters, merged_weights
from rlhf.models.peft.config import PeftConfig
from rlhf.models.peft.merge import merged_policy
from rlhf.models.peft.saved import attach_published
from rlhf.models.peft.virtual_tokens import virtual_tokens
from rlhf.models.recompute import checkpoint_layers
from rlhf.models.weight_sharing import shared_copy

METHODS = ["prefix", "prompt", "p_tuning"]
ROWS = [IDS[0, :9], IDS[0], IDS[0, 3:20]]
TOKENS = 20
TRAINED = {
    "prefix": TOKENS
    * 2
    * 2
    * 2
    * 16,  # layers; keys and values; heads of these, of which there are two; size
    "prompt": TOKENS * 64,
    "p_tuning": TOKENS * 64 + 3 * (64 * 64 + 64),
}


def with_tokens(directory: Path, method: str) -> PreTrainedModel:
    model = load(directory)
    torch.manual_seed(0)
    attach(model, PeftConfig.model_validate({"method": method}))
    return model


@torch.no_grad()
def last_hidden(model: PreTrainedModel, rows: list[Tensor]) -> list[Tensor]:
    return list(hidden_states(model, Packed(rows, "cpu")).split([len(row) for row in rows]))


@pytest.mark.parametrize("method", METHODS)
def test_only_the_tokens_train(method: str, tiny_model: Path) -> None:
    model = with_tokens(tiny_model, method)
    assert count_parameters(model)[0] == TRAINED[method]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    hidden = last_hidden(model, ROWS)
    train(model)
    moved = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert moved == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert moved and all(name.startswith("virtual_tokens.") for name in moved)
    assert (last_hidden(model, ROWS)[0] - hidden[0]).abs().max() > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_every_row_has_them_before_it_whatever_stands_beside_it(method: str, tiny_model: Path) -> None:
    model = with_tokens(tiny_model, method)
    plain = last_hidden(load(tiny_model), ROWS)
    together = last_hidden(model, ROWS)
    for row, found, without in zip(ROWS, together, plain, strict=True):
        torch.testing.assert_close(found, last_hidden(model, [row])[0], atol=1e-5, rtol=1e-5)
        assert (found - without).abs().max() > 0.05


@pytest.mark.parametrize("method", METHODS)
def test_peft_reads_what_is_saved_and_says_the_same(method: str, tiny_model: Path, tmp_path: Path) -> None:
    artifact, expected = saved(tmp_path, tiny_model, PeftConfig.model_validate({"method": method}))
    ours = load(tiny_model)
    attach_published(ours, artifact)
    assert count_parameters(ours)[0] == 0
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, artifact / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=IDS).logits, expected, atol=1e-6, rtol=1e-6)
        found = theirs(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, -IDS.shape[1] :]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    kept = (artifact / "adapter" / "adapter_model.safetensors").stat().st_size
    assert kept < 4 * TOKENS * 128 + 1000  # of an MLP that made embeddings, only these


@pytest.mark.parametrize("method", METHODS)
def test_they_cannot_be_merged_nor_handed_over(method: str, tiny_model: Path, tmp_path: Path) -> None:
    artifact, _ = saved(tmp_path, tiny_model, PeftConfig.model_validate({"method": method}))
    with pytest.raises(ConfigError, match=f"what {method} trains cannot be merged into the weights"):
        merged_policy(artifact, TINY, torch.float32)
    with pytest.raises(
        ConfigError, match=r"^generation=vllm: .* vLLM cannot use them\. Use generation=local"
    ):
        list(merged_weights(load_causal_lm(artifact, TINY, torch.float32)))


@pytest.mark.parametrize("method", METHODS)
def test_layers_computed_anew_give_the_same_gradients(method: str, tiny_model: Path) -> None:
    found = []
    for anew in (False, True):
        model = with_tokens(tiny_model, method)
        if anew:
            checkpoint_layers(model)
        batch = pack_sequences([row[:4] for row in ROWS], [row[4:] for row in ROWS], torch.device("cpu"))
        response_statistics(model, batch, 1.0).logp_N.mean().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for first, second in zip(*found, strict=True):
        assert first is not None and first.abs().max() > 0
        assert torch.equal(first, second)


def test_a_prefix_starts_from_what_the_model_makes_of_real_tokens(tiny_model: Path) -> None:
    """So a prefix of one token is that token read before the row."""
    model = load(tiny_model)
    torch.manual_seed(3)
    attach(model, PeftConfig(method="prefix", tokens=1))
    torch.manual_seed(3)
    torch.nn.Embedding(1, 2 * 2 * 2 * 16)  # draws as peft's encoder does
    token = torch.randint(259, (1,))
    plain = load(tiny_model)
    expected = last_hidden(plain, [torch.cat([token, ROWS[0]])])[0][1:]
    torch.testing.assert_close(last_hidden(model, [ROWS[0]])[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_second_tree_has_tokens_of_its_own(method: str, tiny_model: Path) -> None:
    model = with_tokens(tiny_model, method)
    own = virtual_tokens(model)
    assert own is not None
    other = shared_copy(model, own=own.parameters())
    before = last_hidden(other, ROWS)
    train(model)
    assert torch.equal(last_hidden(other, ROWS)[0], before[0])
    assert not torch.allclose(last_hidden(model, ROWS)[0], before[0], atol=1e-3)


def small_model(kind: str) -> PreTrainedModel:
    sizes: dict[str, Any] = {"vocab_size": 300, "max_position_embeddings": 64, "num_attention_heads": 2}
    if kind == "gpt2":
        config: Any = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=300, n_positions=64)
    elif kind == "opt":
        config = OPTConfig(
            hidden_size=32, ffn_dim=64, num_hidden_layers=2, word_embed_proj_dim=32, dropout=0.0, **sizes
        )
    else:
        config = GPTNeoXConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, **sizes)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "opt"])
def test_sampling_sees_them_in_models_of_other_families(
    kind: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was sampled has the probability that the model says it has, and another one without them."""
    model = small_model(kind)
    uniform_BR = torch.rand(2, 8, generator=torch.Generator().manual_seed(0))
    prompts = [IDS[0, :5], IDS[0, :9]]
    settings: dict[str, Any] = {
        "max_new_tokens": 8,
        "temperature": 1.0,
        "stop_ids": [299],
        "pad_id": 0,
        "batch_rows": 2,
    }
    attach(model, PeftConfig.model_validate({"method": method, "tokens": 4}))
    monkeypatch.setattr(local, "PREFILL_TOKENS", 8)  # each prompt by itself
    whole = generate(model, prompts, uniform_BR=uniform_BR, **settings)
    settings["stop_ids"] = [int(whole.response_ids[1][1])]  # then the longer prompt's columns are cut
    rollout = generate(model, prompts, uniform_BR=uniform_BR, **settings)
    assert len(rollout.response_ids[1]) <= 2 < len(rollout.response_ids[0])
    assert rollout.sampled_logp is not None
    batch = pack_sequences(prompts, rollout.response_ids, torch.device("cpu"))
    with torch.no_grad():
        logp_N = response_statistics(model, batch, 1.0).logp_N
        without_N = response_statistics(small_model(kind), batch, 1.0).logp_N
    torch.testing.assert_close(torch.cat(rollout.sampled_logp), logp_N, atol=1e-4, rtol=1e-4)
    assert (logp_N - without_N).abs().max() > 1e-3


def test_they_take_room_from_the_context(tiny_model: Path, tmp_path: Path) -> None:
    artifact, _ = saved(tmp_path, tiny_model, PeftConfig.model_validate({"method": "prompt"}))
    plain = PolicyModel.load(tiny_model, TINY, on_cpu())
    found = PolicyModel(load_causal_lm(artifact, TINY, torch.float32), plain.tokenizer, on_cpu())
    assert found.context_length == plain.context_length - TOKENS


def test_what_cannot_have_them(tiny_model: Path) -> None:
    model = with_tokens(tiny_model, "prompt")
    words = r"^\{stage\}\.peft=prefix: .* already has virtual tokens\. Use another \{stage\}\.peft, such as"
    with pytest.raises(ConfigError, match=words):
        attach(model, PeftConfig(method="prefix"))
    windowed = load(tiny_model)
    windowed.config.sliding_window = 8
    words = r"^\{stage\}\.peft=p_tuning: not every layer of LlamaForCausalLM att.* Use \{stage\}\.peft=lora"
    with pytest.raises(ConfigError, match=words):
        attach(windowed, PeftConfig(method="p_tuning"))
