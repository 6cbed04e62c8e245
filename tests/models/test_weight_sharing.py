"""Trees of modules on the same weights, and the adapters that are put into them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from helpers.jobs import TINY
from helpers.models import IDS, load, logits, tuned
from rlhf.digests import weights_digest
from rlhf.models.base import load_tokenizer
from rlhf.models.packed_attention import hidden_states
from rlhf.models.packed_batch import Packed
from rlhf.models.peft.attach import attach, count_parameters
from rlhf.models.peft.config import PeftConfig
from rlhf.models.peft.saved import attach_published, origin_of, save_adapter
from rlhf.models.value_head import ScalarModel, load_scalar_model, reset_head, save_scalar_model
from rlhf.models.weight_sharing import shared_copy

ROWS = [IDS[0, :9], IDS[0], IDS[0, 3:20]]


def moved(model: PreTrainedModel, seed: int = 0) -> None:
    """Move what trains away from where it was."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))


def storages(model: torch.nn.Module) -> set[int]:
    return {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}


def test_two_trees_hold_the_weights_once(tiny_model: Path) -> None:
    model = load(tiny_model)
    other = shared_copy(model)
    assert storages(other) == storages(model)
    assert not any(parameter.requires_grad for parameter in other.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not {id(parameter) for parameter in model.parameters()} & {id(each) for each in other.parameters()}
    assert other.get_input_embeddings().weight is other.get_output_embeddings().weight  # still tied
    assert torch.equal(logits(other), logits(model))
    packed = Packed(ROWS, "cpu")
    assert torch.equal(hidden_states(other, packed), hidden_states(model, packed))


def test_an_adapter_in_one_tree_is_not_in_the_other(tiny_model: Path) -> None:
    model = load(tiny_model)
    other, before = shared_copy(model), logits(model)
    adapter = tuned(model)
    moved(model)
    assert not torch.allclose(logits(model), before, atol=1e-2)
    assert torch.equal(logits(other), before)
    assert count_parameters(other)[0] == 0
    with adapter.merged():
        assert torch.equal(logits(other), before)
        assert storages(other) - storages(model)
    assert storages(other) < storages(model)


def test_gradients_of_two_trees_stay_apart(tiny_model: Path) -> None:
    """Both graphs are alive at once, as in PPO's update; either adapter gets what it gets alone."""

    def loss(model: PreTrainedModel) -> Tensor:
        return hidden_states(model, Packed(ROWS, "cpu")).square().sum()

    def gradients(model: PreTrainedModel) -> list[Tensor]:
        return [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]

    model = load(tiny_model)
    other = shared_copy(model)
    for seed, each in enumerate((model, other)):
        tuned(each)
        moved(each, seed)
    (loss(model) + loss(other)).backward()
    together = [gradients(each) for each in (model, other)]
    assert len(together[0]) == len(together[1]) == 2 * 2 * 7
    assert not torch.equal(together[0][0], together[1][0])
    for each, found in zip((model, other), together, strict=True):
        each.zero_grad()
        loss(each).backward()
        for alone, beside in zip(gradients(each), found, strict=True):
            torch.testing.assert_close(alone, beside, rtol=1e-6, atol=1e-6)


def test_a_scalar_models_head_is_its_own(tiny_model: Path) -> None:
    first = load_scalar_model(tiny_model, TINY, torch.float32, new_head=True)
    reset_head(first, deviation=1.0)
    second, before = first.shared_copy(), first.last_values(ROWS)
    assert torch.equal(second.last_values(ROWS), before)
    second.rescale(2.0, -3.0)
    torch.testing.assert_close(second.last_values(ROWS), 2 * before - 3)
    assert torch.equal(first.last_values(ROWS), before)
    assert storages(second) - storages(first) == storages(second.head)


@pytest.fixture
def published(tiny_model: Path, tmp_path: Path) -> tuple[Path, ScalarModel]:
    """A reward artifact with its adapter, and the merged model that was saved in it."""
    torch.manual_seed(5)
    scalar = load_scalar_model(tiny_model, TINY, torch.float32, new_head=True)
    reset_head(scalar)
    adapter = tuned(scalar.model)
    moved(scalar.model)
    save_adapter(adapter, tmp_path, tiny_model, "key", scalar.head.weight)
    adapter.merge()
    save_scalar_model(scalar, load_tokenizer(tiny_model, TINY), tmp_path)
    return tmp_path, scalar


def test_peft_reads_what_was_saved(published: tuple[Path, ScalarModel], tiny_model: Path) -> None:
    directory, merged = published
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, pad_token_id=0)
    model = PeftModel.from_pretrained(base, directory / "adapter").eval()
    with torch.no_grad():
        theirs = torch.cat([model(input_ids=row[None]).logits[0] for row in ROWS])
        torch.testing.assert_close(theirs, merged.last_values(ROWS), rtol=1e-5, atol=1e-5)
    assert str(tiny_model) not in (directory / "adapter/adapter_config.json").read_text()


def test_the_same_adapter_is_saved_in_the_same_bytes(tiny_model: Path, tmp_path: Path) -> None:
    files, head = [], torch.ones(1, 64)
    for name in ("one", "two", "none"):
        (tmp_path / name).mkdir()
    for name in ("one", "two"):
        save_adapter(tuned(load(tiny_model)), tmp_path / name, tiny_model, "key", head)
        files.append([path.read_bytes() for path in sorted((tmp_path / name / "adapter").iterdir())])
    assert len(files[0]) == 3
    assert files[0] == files[1]
    told = (tmp_path / "one/adapter/adapter_config.json").read_text()
    assert '"down_proj",\n    "gate_proj",\n    "k_proj"' in told
    origin = origin_of(tmp_path / "one")
    assert origin is not None
    assert (origin.digest, origin.key) == (weights_digest(tiny_model), "key")
    full = attach(load(tiny_model), PeftConfig(method="none"))
    assert save_adapter(full, tmp_path / "none", tiny_model, "key", head) == {}
    assert origin_of(tmp_path / "none") is None


def test_a_new_adapter_adds_to_a_published_one(published: tuple[Path, ScalarModel], tiny_model: Path) -> None:
    directory, merged = published
    alone = merged.model
    model = load(tiny_model)
    state = torch.get_rng_state()
    _, head = attach_published(model, directory)
    assert torch.equal(torch.get_rng_state(), state)
    assert head is not None and torch.equal(head, merged.head.weight)
    assert count_parameters(model)[0] == 0
    packed = Packed(ROWS, "cpu")

    def hidden(each: PreTrainedModel) -> Tensor:
        return hidden_states(each, packed).detach()

    torch.testing.assert_close(hidden(model), hidden(alone), rtol=1e-4, atol=1e-5)
    for each in (model, alone):
        tuned(each, rank=2)
        moved(each)
    assert [p.shape for p in model.parameters() if p.requires_grad] == [
        p.shape for p in alone.parameters() if p.requires_grad
    ]
    assert not [n for n, p in model.named_parameters() if p.requires_grad and "published" in n]
    torch.testing.assert_close(hidden(model), hidden(alone), rtol=1e-4, atol=1e-5)
