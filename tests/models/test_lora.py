"""LoRA put into a model in place, trained, and folded away."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from helpers.jobs import TINY
from helpers.models import LINEARS, load, logits, tiny_config, tiny_family, train, tuned
from helpers.trained import write_trained
from rlhf.config import ConfigError
from rlhf.models.base import load_tokenizer, skeleton
from rlhf.models.peft import target_modules as targets
from rlhf.models.peft.attach import attach, check_adapters_used, count_parameters, merged_weights
from rlhf.models.peft.config import PeftConfig
from rlhf.models.peft.merge import publish_policy
from rlhf.models.peft.saved import check_publishable
from rlhf.models.peft.target_modules import targets_summary
from rlhf.models.value_head import load_scalar_model

UP = "model.layers.0.mlp.up_proj.base_layer.weight"


def test_lora_starts_as_the_identity(tiny_model: Path) -> None:
    model = load(tiny_model)
    before = logits(model)
    tuned(model)
    assert torch.equal(logits(model), before)


def test_folded_in_for_a_while_it_says_the_same_and_leaves_nothing_behind(tiny_model: Path) -> None:
    model = load(tiny_model)
    adapter = tuned(model)
    train(model)
    before, weights = logits(model), {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(KeyError), adapter.merged():
        assert not torch.equal(dict(model.named_parameters())[UP], weights[UP])
        torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)
        raise KeyError  # an error in sampling
    assert torch.equal(logits(model), before)
    for name, value in model.named_parameters():
        assert torch.equal(value, weights[name]), name


def test_only_the_adapter_trains_and_beside_every_inner_linear_layer(tiny_model: Path) -> None:
    model = load(tiny_model)
    frozen = {name: parameter.clone() for name, parameter in model.named_parameters()}
    tuned(model)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)
    assert sorted({name.split(".")[-4] for name in trainable}) == LINEARS
    assert not [name for name in trainable if "lm_head" in name or "embed" in name]
    # rank 4: q and o are 64x64, k and v 64x32, gate and up 64x128, down 128x64; two layers
    assert count_parameters(model)[0] == 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    train(model)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, frozen[name.replace(".base_layer", "")]), name


def test_merging_changes_nothing_but_the_form(tiny_model: Path, tmp_path: Path) -> None:
    model = load(tiny_model)
    names, before = set(model.state_dict()), logits(model)
    adapter = tuned(model)
    train(model)
    trained = logits(model)
    assert (trained - before).abs().max() > 0.01
    adapter.merge()
    torch.testing.assert_close(logits(model), trained, atol=1e-5, rtol=1e-5)
    assert set(model.state_dict()) == names
    adapter.merge()  # nothing left to do
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("adapter*"))
    published = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(logits(published.eval()), trained, atol=1e-5, rtol=1e-5)


def test_merged_weights_are_the_merged_models_and_leave_the_model_alone(tiny_model: Path) -> None:
    model = load(tiny_model)
    names = [name for name, _ in model.named_parameters()]
    adapter = tuned(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape))
    before = {name: (value.data_ptr(), value.clone()) for name, value in model.named_parameters()}
    found = dict(merged_weights(model))
    for name, value in model.named_parameters():
        assert value.data_ptr() == before[name][0]
        assert torch.equal(value, before[name][1])
    assert list(found) == names
    with adapter.merged():
        for name, merged in merged_weights(model):
            torch.testing.assert_close(found[name], merged, atol=1e-5, rtol=1e-5, msg=name)
    adapter.merge()
    for name, value in model.named_parameters():
        torch.testing.assert_close(found[name], value.detach(), atol=1e-5, rtol=1e-5, msg=name)
    assert {name: value.data_ptr() for name, value in merged_weights(model)} == {
        name: value.data_ptr() for name, value in model.named_parameters()
    }  # nothing is copied where there is no adapter


def test_the_output_layer_is_refused_for_what_it_is(tiny_model: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"lm_head is the output layer of Llama.* use \{stage\}\.peft\.target_m"
    ):
        attach(load(tiny_model), PeftConfig(method="lora", target_modules=["q_proj", "lm_head"]))


@pytest.mark.parametrize("name", ["v_prjo", "embed_tokens"])
def test_what_is_no_linear_layer_inside_is_refused(name: str, tiny_model: Path) -> None:
    """An update of embeddings would change the output layer too, where they are tied and it is merged."""
    words = (
        rf"^\{{stage\}}\.peft\.target_modules=\[q_proj,{name}\]: {name} is not a linear layer inside Llama.* "
        r"Leave it out, or use \{stage\}\.peft\.target_modules=all-linear, which takes down_proj, gate"
    )
    with pytest.raises(ConfigError, match=words):
        attach(load(tiny_model), PeftConfig(method="lora", target_modules=["q_proj", name]))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_peft_need_not_guess_how_gpt2s_weights_lie(method: Literal["lora", "dora", "ia3"]) -> None:
    attach(GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2)), PeftConfig(method=method))


def test_gpt2s_layers_are_linear_too() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=300)).eval()
    adapter = attach(model, PeftConfig(method="lora", rank=4))
    assert count_parameters(model)[0] == 2 * 4 * (32 + 96 + 32 + 32 + 32 + 128 + 128 + 32)
    train(model)
    trained = logits(model)
    with adapter.merged():
        torch.testing.assert_close(logits(model), trained, atol=1e-5, rtol=1e-5)
    adapter.merge()
    torch.testing.assert_close(logits(model), trained, atol=1e-5, rtol=1e-5)


EXPERTS = "not experts (weights of three dimensions)"
NAMED = "not gate_proj, up_proj, down_proj (peft means the experts by that)"


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("qwen3_moe", f"lora updates k_proj, o_proj, q_proj, v_proj; {EXPERTS}."),
        ("glm4_moe", f"lora updates k_proj, o_proj, q_proj, v_proj; {EXPERTS}; {NAMED}."),
        ("phimoe", f"lora updates k_proj, o_proj, q_proj, v_proj; {EXPERTS}; not router (a PhimoeTopKRouter "
            "gives more than a linear layer)."),
        ("llama", f"lora updates {', '.join(LINEARS)}."),
        ("falcon", "lora updates dense, dense_4h_to_h, dense_h_to_4h, query_key_value."),
    ],
)  # fmt: skip
def test_what_all_linear_takes_is_told(name: str, line: str) -> None:
    base = skeleton(tiny_config(name))
    assert targets_summary(base, PeftConfig(method="lora")) == line
    assert targets_summary(base, PeftConfig(method="lora", target_modules=["q_proj"])) is None
    assert targets_summary(base, PeftConfig(method="none")) is None


def test_layers_that_peft_takes_for_experts_are_refused_by_name() -> None:
    base = skeleton(tiny_config("deepseek_v3"))
    words = (
        r"^\{stage\}\.peft\.target_modules=\[o_proj,gate_proj\]: gate_proj of DeepseekV3ForCausalLM cannot "
        r"be updated \(peft means the experts by that\)\. Leave it out, or use \{stage\}\.peft\.target_"
    )
    with pytest.raises(ConfigError, match=words):
        attach(base, PeftConfig(method="lora", target_modules=["o_proj", "gate_proj"]))


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "adapter", "freeze", "prompt", "none"])
def test_a_publication_is_rehearsed_without_weights(method: str) -> None:
    base = skeleton(tiny_config("llama"))
    before = {name: type(module) for name, module in base.named_modules()}
    check_publishable(base, PeftConfig(method=method))
    assert {name: type(module) for name, module in base.named_modules()} == before


def test_what_could_not_be_published_is_refused_before_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    base, config = skeleton(tiny_config("deepseek_v3")), PeftConfig(method="lora")
    check_publishable(base, config)
    monkeypatch.setattr(targets, "excluded_layers", lambda model: {})  # peft adapts the experts then
    words = (
        r"^\{stage\}\.peft=lora: what it trains in DeepseekV3ForCausalLM cannot be published: 'Deepseek.* "
        r"Use \{stage\}\.peft=freeze or none, or name other layers in \{stage\}\.peft\.target_modules\.$"
    )
    with pytest.raises(ConfigError, match=words):
        check_publishable(base, config)


@pytest.mark.parametrize("name", ["glm4_moe", "qwen3_next", "phimoe"])
def test_peft_reads_an_adapter_of_a_mixture_of_experts(name: str, tiny_model: Path, tmp_path: Path) -> None:
    tiny_family(name).save_pretrained(tmp_path / "base")
    model, config = load(tmp_path / "base"), PeftConfig(method="lora", rank=4)
    attach(model, config)
    trained: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.normal_(std=0.1)
    artifact = tmp_path / "sft" / "0"
    artifact.mkdir(parents=True)
    publish_policy(
        artifact, write_trained(tmp_path / "trained", trained), load_tokenizer(tiny_model, TINY), key="",
        start=tmp_path / "base", settings=TINY, dtype=torch.float32, peft=config,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    read = PeftModel.from_pretrained(base, artifact / "adapter").eval()
    torch.testing.assert_close(logits(read), logits(model), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(load(artifact)), logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "layer"), [("jamba", "dt_proj"), ("mamba", "dt_proj")])
def test_adapters_that_no_pass_goes_through_are_refused(
    name: str, layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_family(name)
    attach(model, PeftConfig(method="lora"))
    check_adapters_used(model)
    monkeypatch.setattr(targets, "BYPASSED_LAYERS", {"mamba": ("out_proj",)})  # which peft refuses
    unknown = tiny_family(name)
    attach(unknown, PeftConfig(method="lora"))
    words = (
        rf"^\{{stage\}}\.peft: {type(model).__name__} would not use an adapter of {layer}, .* "
        r"Name only other layers in \{stage\}\.peft\.target_modules, or use \{stage\}\.peft=freeze or none\.$"
    )
    with pytest.raises(ConfigError, match=words):
        check_adapters_used(unknown)


@pytest.mark.parametrize("method", ["none", "lora", "dora", "ia3", "adapter", "freeze", "prompt"])
def test_adapters_are_reached(method: str) -> None:
    for name in ("llama", "phimoe") if method == "lora" else ("llama",):
        model = tiny_family(name)
        attach(model, PeftConfig(method=method))
        check_adapters_used(model)


def test_layers_that_cannot_be_held_in_4_bits_are_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=300))
    with pytest.raises(
        ConfigError, match=r"^\{stage\}\.peft=qlora: .* of GPT2LMHeadModel .* Use \{stage\}\.peft=lora"
    ):
        attach(model, PeftConfig(method="qlora", rank=4))


def test_rank_and_alpha_are_told_apart(tiny_model: Path) -> None:
    moved = {}
    for alpha in (8.0, 16.0):
        model = load(tiny_model)
        torch.manual_seed(0)
        adapter = attach(model, PeftConfig(method="lora", rank=4, alpha=alpha))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.01)
        adapter.merge()
        difference = (
            model.state_dict()["model.layers.0.self_attn.q_proj.weight"]
            - load(tiny_model).state_dict()["model.layers.0.self_attn.q_proj.weight"]
        )
        assert torch.linalg.matrix_rank(difference) == 1  # equal rows of B
        moved[alpha] = difference
    torch.testing.assert_close(moved[16.0], 2 * moved[8.0], atol=1e-6, rtol=1e-4)  # alpha / rank


def test_chosen_modules_only(tiny_model: Path) -> None:
    model = load(tiny_model)
    attach(model, PeftConfig(method="lora", target_modules=["q_proj"]))
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable and all(".q_proj." in name for name in trainable)


def test_none_trains_everything(tiny_model: Path) -> None:
    model = load(tiny_model)
    model.requires_grad_(False)
    attach(model, PeftConfig(method="none")).merge()
    trained, everything = count_parameters(model)
    assert trained == everything > 0


def test_a_score_head_is_left_alone(tiny_model: Path) -> None:
    scalar = load_scalar_model(tiny_model, TINY, torch.float32, new_head=True)
    tuned(scalar.model)
    assert not scalar.head.weight.requires_grad  # the stage turns it on
    assert type(scalar.model.score) is torch.nn.Linear
    assert scalar.head.weight is scalar.model.score.weight
    with pytest.raises(AttributeError):
        _ = scalar.model.score.lora_A
