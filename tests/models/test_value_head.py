"""Reward models and critics: where they are read, and that what is saved scores alike elsewhere."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    CTRLConfig,
    GraniteConfig,
    LlamaConfig,
    PreTrainedTokenizerBase,
)

from helpers.jobs import TINY, on_cpu
from rlhf.config import ConfigError
from rlhf.models.base import load_tokenizer
from rlhf.models.logprobs import pack_sequences
from rlhf.models.value_head import (
    ScalarModel,
    check_scorable,
    load_scalar_model,
    reset_head,
    save_scalar_model,
)
from rlhf.rewards.kinds import reward_digest

CPU = torch.device("cpu")
STOP = 2


@pytest.fixture
def scalar(tiny_model: Path) -> ScalarModel:
    torch.manual_seed(0)
    found = load_scalar_model(tiny_model, TINY, torch.float32, new_head=True)
    reset_head(found, deviation=1.0)
    return found


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny_model, TINY)


def rows() -> list[Tensor]:
    """Different lengths; every one ends in the stop token, one holds it twice."""
    generator = torch.Generator().manual_seed(3)
    found = [torch.randint(3, 259, (length,), generator=generator) for length in (4, 11, 1, 7)]
    for row in found:
        row[-1] = STOP
    found[3][2] = STOP
    return found


@torch.no_grad()
def by_hand(scalar: ScalarModel, row: Tensor) -> Tensor:
    """The head on every position of one row, without padding."""
    hidden_TH: Tensor = scalar.model.model(input_ids=row[None]).last_hidden_state[0]
    return hidden_TH @ scalar.head.weight[0] + float(scalar.offset)


def test_a_value_is_read_where_its_token_is_predicted(scalar: ScalarModel) -> None:
    prompts = [torch.tensor([5, 6, 7]), torch.tensor([8])]
    responses = [torch.tensor([9, STOP]), torch.tensor([10, STOP, 11, 12])]
    values_N = scalar.values(pack_sequences(prompts, responses, CPU))
    first, second = (by_hand(scalar, torch.cat(pair)) for pair in zip(prompts, responses, strict=True))
    # V(prompt + y_<t): for the first token at the prompt's last one, never at the token itself
    expected = torch.cat([first[2:4], second[0:4]])
    torch.testing.assert_close(values_N.detach(), expected, atol=1e-5, rtol=1e-5)
    assert values_N.dtype == torch.float32


@pytest.mark.parametrize("micro_batch_tokens", [1, 12, 10_000])
def test_a_score_is_read_at_the_last_real_token(scalar: ScalarModel, micro_batch_tokens: int) -> None:
    expected = torch.stack([by_hand(scalar, row)[-1] for row in rows()])
    torch.testing.assert_close(scalar.last_values(rows()).detach(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        scalar.score(rows(), micro_batch_tokens, on_cpu()), expected, atol=1e-5, rtol=1e-5
    )
    assert expected.std() > 0.1


def test_transformers_scores_the_saved_directory_alike(
    scalar: ScalarModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    save_scalar_model(scalar, tokenizer, tmp_path)
    published = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert published.config.num_labels == 1
    assert tokenizer.pad_token_id != tokenizer.eos_token_id == STOP
    padded = tokenizer.pad({"input_ids": [row.tolist() for row in rows()]}, return_tensors="pt")
    with torch.no_grad():
        theirs = published(**padded).logits.squeeze(-1)  # with their own pooling: the last non-pad token
    ours = scalar.score(rows(), 1000, on_cpu())
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    again = load_scalar_model(tmp_path, TINY, torch.float32)
    assert torch.equal(again.score(rows(), 1000, on_cpu()), scalar.score(rows(), 1000, on_cpu()))


def test_rescaling_folds_gain_and_bias(scalar: ScalarModel) -> None:
    before = scalar.score(rows(), 1000, on_cpu())
    scalar.rescale(2.0, -3.0)
    torch.testing.assert_close(scalar.score(rows(), 1000, on_cpu()), 2 * before - 3, atol=1e-5, rtol=1e-5)
    scalar.rescale(0.5, 1.0)  # the offset is scaled too: 0.5 (2x - 3) + 1
    torch.testing.assert_close(scalar.score(rows(), 1000, on_cpu()), before - 0.5, atol=1e-5, rtol=1e-5)


def test_an_offset_cannot_be_lost_on_the_way_to_disk(
    scalar: ScalarModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    scalar.rescale(1.0, 0.25)
    with pytest.raises(AssertionError, match="no bias"):
        save_scalar_model(scalar, tokenizer, tmp_path)


def test_heads_are_drawn_as_asked(scalar: ScalarModel) -> None:
    reset_head(scalar, deviation=0.0)
    assert not scalar.score(rows(), 1000, on_cpu()).any()
    torch.manual_seed(0)
    draws = []
    for _ in range(200):
        reset_head(scalar)
        draws.append(scalar.head.weight.detach().flatten().clone())
    drawn = torch.cat(draws)  # 12800 numbers of variance 1 / (64 + 1)
    assert float(drawn.std()) == pytest.approx(math.sqrt(1 / 65), rel=0.03)
    assert abs(float(drawn.mean())) < 0.005


def test_the_head_stays_fp32_and_learns(tiny_model: Path) -> None:
    scalar = load_scalar_model(tiny_model, TINY, torch.bfloat16, new_head=True)
    assert scalar.model.dtype == torch.bfloat16
    assert scalar.head.weight.dtype == scalar.offset.dtype == torch.float32
    scores = scalar.last_values(rows())
    assert scores.dtype == torch.float32
    scores.sum().backward()
    assert scalar.head.weight.grad is not None and scalar.head.weight.grad.any()
    assert scalar.offset.grad == len(rows())
    assert scalar.model.model.embed_tokens.weight.grad is not None


def test_a_head_that_nobody_trained_is_no_reward_model(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="its score head was never trained"):
        load_scalar_model(tiny_model, TINY, torch.float32)


def test_a_model_without_a_linear_score_head_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    sizes: dict[str, Any] = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
        "num_labels": 1,
    }  # fmt: skip
    BertForSequenceClassification(BertConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"Bert.* no linear `score` head"):
        load_scalar_model(tmp_path, TINY, torch.float32)


def test_a_reward_model_that_lacks_weights_is_refused(
    scalar: ScalarModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Else transformers would draw them."""
    save_scalar_model(scalar, tokenizer, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    for new_head in (False, True):
        with pytest.raises(ConfigError, match=r"its weights lack model\.layers\.1\.mlp\.up_proj\.weight"):
            load_scalar_model(tmp_path, TINY, torch.float32, new_head=new_head)


def score_of(directory: Path) -> dict[str, str]:
    """What `ppo.reward=model:DIRECTORY` is asked when the config is checked."""
    return reward_digest(f"model:{directory}")


def test_what_cannot_score_is_told_without_being_loaded(
    scalar: ScalarModel, tokenizer: PreTrainedTokenizerBase, tiny_model: Path, tmp_path: Path
) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    sizes: dict[str, Any] = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
        "num_labels": 1,
    }  # fmt: skip
    bert = BertForSequenceClassification(BertConfig(vocab_size=64, **sizes))
    bert.save_pretrained(tmp_path / "bert")
    with pytest.raises(ConfigError, match=r"BertForS.* has no linear `score` head without bias, as a reward"):
        score_of(tmp_path / "bert")
    with pytest.raises(ConfigError, match="its score head was never trained"):
        score_of(tiny_model)
    save_scalar_model(scalar, tokenizer, tmp_path / "one")
    assert list(score_of(tmp_path / "one"))
    scalar.model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert list(score_of(tmp_path / "shards"))
    weights = load_file(tmp_path / "one" / "model.safetensors")
    for change, complaint in (
        ({"score.bias": torch.zeros(1)}, "has no linear `score` head without bias"),
        (
            {"score.weight": torch.zeros(2, 64)},
            "it has 2 labels. Give a sequence-classification model with one label",
        ),
    ):
        save_file(weights | change, tmp_path / "one" / "model.safetensors", {"format": "pt"})
        with pytest.raises(ConfigError, match=complaint):
            score_of(tmp_path / "one")
    (tmp_path / "one" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ConfigError, match="cannot be read as a model"):
        score_of(tmp_path / "one")


def test_a_base_model_with_another_kind_of_head_is_refused_before_anything_trains() -> None:
    for config in (LlamaConfig(), GraniteConfig()):  # of transformers, and made as transformers makes its own
        check_scorable(config)
    with pytest.raises(ConfigError, match=r"CTRLForSequenceClassification has no linear `score` head"):
        check_scorable(CTRLConfig(n_layer=1))

    class OwnConfig(LlamaConfig):  # what transformers makes of a config that brings code
        model_type = "own"
        auto_map: ClassVar[dict[str, str]] = {"AutoModelForCausalLM": "own.OwnForCausalLM"}

    with pytest.raises(ConfigError, match="this own has no AutoModelForSequenceClassification"):
        check_scorable(OwnConfig())
    OwnConfig.auto_map["AutoModelForSequenceClassification"] = "own.OwnForSequenceClassification"
    check_scorable(OwnConfig())
