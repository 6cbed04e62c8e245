"""Every method of `peft=` on the tiny model: what it trains, and how it is folded, merged, saved and read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Literal

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, PreTrainedModel

from helpers.jobs import TINY
from helpers.models import embedding, in_dtype, load, logits, saved, store, train
from rlhf.compare.sizes import model_bytes
from rlhf.config import ConfigError
from rlhf.models.load import load_causal_lm
from rlhf.models.peft.attach import Adapter, attach, count_parameters, merged_weights
from rlhf.models.peft.bottleneck import BottleneckConfig, BottleneckLayer
from rlhf.models.peft.config import PeftConfig
from rlhf.models.peft.merge import merged_policy
from rlhf.models.peft.methods import METHODS, MethodName
from rlhf.models.peft.saved import attach_published, origin_of, save_adapter

LINEAR_OUT = 2 * (64 + 32) + 128 + 128 + 64  # q, o; k, v; gate, up; down
LORA = 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
LAYER = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64
BOTTLENECK = 64 * 8 + 8 + 8 * 64 + 64
TRAINED = {
    "lora": 2 * LORA, "dora": 2 * (LORA + LINEAR_OUT), "ia3": 2 * (32 + 32 + 128), "freeze": LAYER,
    "adapter": 2 * BOTTLENECK,
}  # fmt: skip
"""Parameters of rank-4 updates, of the last of two layers, or of bottlenecks of size 8."""
MERGING: list[MethodName] = ["lora", "dora", "ia3", "freeze"]
EVERY: list[MethodName] = [*MERGING, "adapter"]
IN_PEFTS_FORMAT: list[MethodName] = ["lora", "dora", "ia3", "adapter"]


def config(method: MethodName) -> PeftConfig:
    size = {"rank": 4, "layers": 1, "size": 8}
    return PeftConfig.model_validate(
        {"method": method, **{key: size[key] for key in METHODS[method].knobs if key in size}}
    )


def tuned(model: PreTrainedModel, method: MethodName) -> Adapter:
    torch.manual_seed(0)
    return attach(model, config(method))


@pytest.mark.parametrize("method", EVERY)
def test_it_starts_as_the_model_it_is_put_into(method: MethodName, tiny_model: Path) -> None:
    model = load(tiny_model)
    before = logits(model)
    tuned(model, method)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("method", EVERY)
def test_it_trains_what_it_says_and_nothing_else(method: MethodName, tiny_model: Path) -> None:
    model = load(tiny_model)
    before = logits(model)
    tuned(model, method)
    assert count_parameters(model)[0] == TRAINED[method]
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    moving = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    train(model)
    assert (logits(model) - before).abs().max() > 1e-3
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, {**frozen, **moving}[name]) == (name in frozen), name


@pytest.mark.parametrize("method", EVERY)
def test_folded_in_it_says_the_same_and_leaves_nothing_behind(method: MethodName, tiny_model: Path) -> None:
    model = load(tiny_model)
    adapter = tuned(model, method)
    train(model)
    before, weights = logits(model), {name: value.clone() for name, value in model.named_parameters()}
    for _ in range(2):
        with adapter.merged():
            torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)
        assert torch.equal(logits(model), before)
        for name, value in model.named_parameters():
            assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize("method", EVERY)
def test_what_is_saved_belongs_on_its_base_and_says_the_same(
    method: MethodName, tiny_model: Path, tmp_path: Path
) -> None:
    artifact, expected = saved(tmp_path, tiny_model, config(method))
    base = tmp_path / "base" / "1"
    assert not torch.allclose(logits(load(base)), expected, atol=1e-3)
    model = load(base)
    attach_published(model, artifact)
    assert torch.equal(logits(model), expected)
    assert count_parameters(model)[0] == 0
    whole = (base / "model.safetensors").stat().st_size
    assert (artifact / "adapter" / "adapter_model.safetensors").stat().st_size < 0.6 * whole
    if method not in MERGING:
        with pytest.raises(ConfigError, match=f"what {method} trains cannot be merged into the weights"):
            merged_policy(artifact, TINY, torch.float32)
        return
    merged = merged_policy(artifact, TINY, torch.float32)
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
    assert list(merged.state_dict()) == list(load(base).state_dict())


def test_what_answers_is_counted_once(tiny_model: Path, tmp_path: Path) -> None:
    artifact, _ = saved(tmp_path, tiny_model, config("adapter"))
    base = tmp_path / "base" / "1"
    alone, whole = (sum(path.stat().st_size for path in base.iterdir()), model_bytes(artifact))
    assert whole > alone == model_bytes(base)
    assert whole - alone == sum(path.stat().st_size for path in artifact.rglob("*") if path.is_file())
    for path in base.iterdir():
        shutil.copy(path, artifact)  # merged: the adapter beside it is not needed
    assert model_bytes(artifact) == alone


@pytest.mark.parametrize("method", IN_PEFTS_FORMAT)
def test_peft_reads_it(method: MethodName, tiny_model: Path, tmp_path: Path) -> None:
    artifact, expected = saved(tmp_path, tiny_model, config(method))
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, artifact / "adapter").eval()
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["dora", "ia3"])
def test_in_bf16_factors_stay_fp32_and_it_still_starts_where_the_model_is(
    method: MethodName, tiny_model: Path
) -> None:
    model = load_causal_lm(tiny_model, TINY, torch.bfloat16)
    before = logits(model)
    adapter = tuned(model, method)
    kept = {p.dtype for n, p in model.named_parameters() if "magnitude" in n or "ia3" in n}
    assert kept == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if "lora_A" in n or "base" in n} <= {torch.bfloat16}
    assert logits(model).dtype == torch.bfloat16
    torch.testing.assert_close(logits(model), before, atol=0.01, rtol=0.02)
    with adapter.merged():
        torch.testing.assert_close(logits(model), before, atol=0.01, rtol=0.02)


def test_dora_is_not_handed_over_as_if_it_were_lora(tiny_model: Path) -> None:
    model = load(tiny_model)
    tuned(model, "dora")
    with pytest.raises(
        ConfigError, match=r"^generation=vllm: .*q_proj: an adapter of DoRA cannot be .* Use generation=local"
    ):
        list(merged_weights(model))


def test_a_moved_store_is_still_whole(tiny_model: Path, tmp_path: Path) -> None:
    saved(tmp_path / "before", tiny_model, config("ia3"))
    (tmp_path / "before").rename(tmp_path / "after")
    artifact = tmp_path / "after" / "sft" / "2"
    origin = origin_of(artifact)
    assert origin is not None
    assert origin.checked_directory(artifact) == (tmp_path / "after" / "base" / "1").resolve()
    merged_policy(artifact, TINY, torch.float32)


def test_a_base_elsewhere_is_named_by_its_whole_path(tiny_model: Path, tmp_path: Path) -> None:
    _, artifact = store(tmp_path, tiny_model)
    model = load(tiny_model)
    save_adapter(tuned(model, "ia3"), artifact, tiny_model, "theirs")
    told = json.loads((artifact / "adapter" / "base.json").read_text())
    assert told["directory"] == str(tiny_model.resolve())
    assert told["key"] == "theirs"


def test_another_base_or_none_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    artifact, _ = saved(tmp_path, tiny_model, config("freeze"))
    base = tmp_path / "base" / "1"
    other = load(base)
    with torch.no_grad():
        embedding(other)[7, 7] += 1e-3
    other.save_pretrained(base)
    with pytest.raises(ConfigError, match="has other weights than the adapter was trained on"):
        merged_policy(artifact, TINY, torch.float32)
    shutil.rmtree(base)
    with pytest.raises(ConfigError, match=r"its base model \(1\) is no longer in .*"):
        merged_policy(artifact, TINY, torch.float32)
    with pytest.raises(ConfigError, match="it has no adapter/"):
        merged_policy(tiny_model, TINY, torch.float32)


def test_freeze_leaves_the_last_layers_to_train(tiny_model: Path) -> None:
    model = load(tiny_model)
    attach(model, PeftConfig(method="freeze", layers=1))
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 9  # seven linear layers and two norms
    assert all(name.startswith("model.layers.1.") for name in trainable)


def test_more_layers_than_there_are(tiny_model: Path) -> None:
    words = (
        r"^\{stage\}\.peft\.layers=3: LlamaForCausalLM has 2 layers that can be told apart\. "
        r"Use \{stage\}\.peft\.layers=2 or less, or \{stage\}\.peft=none\.$"
    )
    with pytest.raises(ConfigError, match=words):
        attach(load(tiny_model), PeftConfig(method="freeze", layers=3))


def test_ia3_on_a_model_that_peft_does_not_know(tiny_model: Path) -> None:
    model = load(tiny_model)
    setattr(model.config, "model_type", "unheard-of")  # noqa: B010 (to mypy it is the class's)
    words = r"^\{stage\}\.peft=ia3: peft does not know which layers of a .* Use \{stage\}\.peft=lora or dora"
    with pytest.raises(ConfigError, match=words):
        attach(model, PeftConfig(method="ia3"))


def test_a_key_that_the_method_does_not_read_is_refused_and_not_in_the_recipe() -> None:
    with pytest.raises(ValidationError, match="method=freeze does not read rank; it reads layers"):
        PeftConfig(method="freeze", rank=4)
    with pytest.raises(ValidationError, match="method=none does not read layers; it reads no other key"):
        PeftConfig(method="none", layers=2)
    assert PeftConfig(method="ia3").model_dump(mode="json") == {"method": "ia3"}
    assert PeftConfig(method="lora").model_dump(mode="json") == {
        "method": "lora", "rank": 16, "alpha": 32, "target_modules": "all-linear",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("placement", "behind"),
    [("pfeiffer", ["mlp.down_proj"]), ("houlsby", ["mlp.down_proj", "self_attn.o_proj"])],
)
def test_bottlenecks_stand_behind_their_sublayers(
    placement: Literal["pfeiffer", "houlsby"], behind: list[str], tiny_model: Path
) -> None:
    model = load(tiny_model)
    attach(model, PeftConfig(method="adapter", placement=placement, size=8))
    names = [name for name, module in model.named_modules() if isinstance(module, BottleneckLayer)]
    assert sorted(names) == sorted(f"model.layers.{layer}.{name}" for layer in range(2) for name in behind)
    assert count_parameters(model)[0] == len(names) * BOTTLENECK


def test_a_bottleneck_by_hand() -> None:
    linear = torch.nn.Linear(3, 2)
    layer = BottleneckLayer(linear, "default", BottleneckConfig(size=2))
    layer._active_adapter = ["default"]
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    assert isinstance(down, torch.nn.Linear) and isinstance(up, torch.nn.Linear)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
        linear.bias.zero_()
        down.weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        up.weight.copy_(torch.tensor([[10.0, 0.0], [0.0, 100.0]]))
        up.bias.copy_(torch.tensor([0.5, 0.0]))
    # h = (1, 3); down: 4, and -2, which relu cuts off; up: 40 and 0
    assert layer(torch.tensor([1.0, 3.0, 9.0])).tolist() == [41.5, 3.0]


@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_a_new_adapter_stands_on_published_bottlenecks(
    method: MethodName, tiny_model: Path, tmp_path: Path
) -> None:
    """As a critic's on the reward model's: it starts as that and trains alone."""
    artifact, expected = saved(tmp_path, tiny_model, config("adapter"))
    model = load_causal_lm(artifact, TINY, torch.float32)
    tuned(model, method)
    torch.testing.assert_close(logits(model), expected, atol=1e-6, rtol=1e-6)
    assert count_parameters(model)[0] == TRAINED[method]
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert not [name for name in trainable if "published" in name]
    train(model)
    assert (logits(model) - expected).abs().max() > 1e-3


def test_bottlenecks_in_a_model_whose_layers_cannot_be_told_apart(tiny_model: Path) -> None:
    model = load(tiny_model)
    for layer in model.model.layers:
        layer.mlp.down_proj = torch.nn.Identity()
    words = (
        r"^\{stage\}\.peft=adapter: .* cannot be told apart \(found: self_attn.o_proj\)\. "
        r"Use \{stage\}\.peft=lora or dora\.$"
    )
    with pytest.raises(ConfigError, match=words):
        attach(model, PeftConfig(method="adapter"))


@pytest.mark.parametrize(
    ("method", "how"),
    [
        ("lora", "folded in"),
        ("lora", "merged"),
        ("lora", "handed over"),
        ("dora", "folded in"),
        ("dora", "merged"),
        ("ia3", "folded in"),
        ("ia3", "merged"),
    ],
)
def test_in_bf16_small_updates_reach_the_weights(method: MethodName, how: str, tiny_model: Path) -> None:
    """In the mean: rounded to nearest, nearly all weights would stay where they are."""
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = in_dtype(load_causal_lm(tiny_model, TINY, torch.bfloat16), dtype)
        before = {name: weight.detach().clone().float() for name, weight in model.named_parameters()}
        adapter = tuned(model, method)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(1e-6 * torch.randn(parameter.shape))
                elif "ia3_l" in name:
                    parameter.add_(5e-4)
        if how == "folded in":
            with adapter.merged():
                after = {
                    name.replace(".base_layer", ""): w.detach().clone()
                    for name, w in model.named_parameters()
                }
        else:
            if how == "merged":
                adapter.merge()
            after = dict(merged_weights(model))
        found[dtype] = torch.cat([(after[name].float() - w).flatten() for name, w in before.items()])
    moved, wanted = found[torch.bfloat16], found[torch.float32]
    assert float((moved == 0).float().mean()) > 0.8
    assert float((moved * wanted).sum() / wanted.square().sum()) == pytest.approx(1.0, abs=0.2)
