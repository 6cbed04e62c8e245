"""Each rank reads its slices of a model alone, and the sharded model is the whole one, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from helpers.slices import Case, go_through
from helpers.spawned import start_ranks

CASES = [
    case
    for zero in ("fsdp2", "zero3")
    for case in (
        Case(zero, "policy", "tied"),
        Case(zero, "policy", "pieces", "lora"),
        Case(zero, "critic", "pieces"),
        Case(zero, "critic", "tied", "lora"),
        Case(zero, "reference", "pieces"),
        Case(zero, "reward", "reward"),
    )
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tied: one file; pieces: several, with an output layer of its own. No matrix is small enough for
    DeepSpeed to leave it whole, and three ranks cannot share any equally."""
    directory = tmp_path_factory.mktemp("models")
    shape: dict[str, Any] = {
        "hidden_size": 400,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    ids: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    torch.manual_seed(0)
    for name, is_tied, size in (("tied", True, "1GB"), ("pieces", False, "1MB")):
        config = LlamaConfig(vocab_size=259, tie_word_embeddings=is_tied, **shape, **ids)
        LlamaForCausalLM(config).save_pretrained(directory / name, max_shard_size=size)
    scorer = LlamaConfig(vocab_size=259, **shape, **ids)
    scorer.num_labels = 1
    LlamaForSequenceClassification(scorer).save_pretrained(directory / "reward")
    assert len(list((directory / "pieces").glob("*.safetensors"))) > 2
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_sharded_model_is_the_whole_one(ranks: int, models: Path, tmp_path: Path) -> None:
    found = start_ranks(go_through, ranks, CASES, models, tmp_path, timeout=300, seconds=900)()
    for rank, by_case in sorted(found.items()):
        assert isinstance(by_case, dict), f"rank {rank}: {by_case}"
        assert by_case == {case: [] for case in CASES}
