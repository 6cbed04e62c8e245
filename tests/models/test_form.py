"""Models whose files are in another precision, or hold each expert apart: no rank converts them in its own
memory."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from helpers.jobs import TINY
from helpers.models import tiny_family
from helpers.ranks import write_large
from helpers.spawned import start_ranks
from helpers.trained import write_trained
from rlhf.config import ConfigError
from rlhf.distributed.compute import Compute
from rlhf.models.base import load_tokenizer
from rlhf.models.load import load_causal_lm
from rlhf.models.on_disk import open_scratch
from rlhf.models.peft.attach import attach
from rlhf.models.peft.config import PeftConfig
from rlhf.models.peft.merge import publish_policy
from rlhf.models.value_head import load_scalar_model
from rlhf.training import trained


def mapped(weight: Tensor) -> bool:
    """Whether it lies in a file."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        first, last = (int(each, 16) for each in line.split()[0].split("-"))
        if first <= weight.data_ptr() < last:
            return ".safetensors" in line
    return False


def names_in(directory: Path) -> set[str]:
    """Of the weights in a directory's files."""
    return {name for file in directory.glob("*.safetensors") for name in load_file(file)}


def load(compute: Compute, directory: Path, scratch: Path) -> dict[str, object]:
    tempfile.tempdir, trained.FILE_BYTES = str(scratch), 500_000  # several files
    dtype = torch.bfloat16
    policy = load_causal_lm(directory, TINY, dtype, compute=compute)
    critic = load_scalar_model(directory, TINY, dtype, compute=compute, new_head=True)
    trunk = {name: each for name, each in critic.model.named_parameters() if "score" not in name}
    return {
        "name": policy.name_or_path,
        "in memory": [
            name for name, each in (*policy.named_parameters(), *trunk.items()) if not mapped(each)
        ],
        "different": [
            name
            for name, each in load_causal_lm(directory, TINY, dtype).named_parameters()
            if not torch.equal(each, dict(policy.named_parameters())[name])
        ],
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tied", "untied", "experts"])
def test_a_model_in_another_form_is_mapped_by_all_ranks(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    directory, scratch = tmp_path / "model", tmp_path / "scratch"
    if kind == "experts":
        tiny_family("qwen3_moe", torch.bfloat16).save_pretrained(directory)
    else:
        write_large(directory, tiny_model, is_tied=kind == "tied")
    scratch.mkdir()
    found = start_ranks(load, 2, directory, scratch, timeout=60, seconds=120)()
    wanted = {"name": str(directory), "in memory": [], "different": []}
    assert found == {0: wanted, 1: wanted}
    assert not list(scratch.iterdir())


def test_what_publishes_a_model_in_another_precision_maps_it(tiny_model: Path, tmp_path: Path) -> None:
    with open_scratch(tmp_path / "artifact") as scratch:
        model = load_causal_lm(tiny_model, TINY, torch.bfloat16, scratch=scratch.directory)
    weights = dict(model.named_parameters())
    assert all(mapped(each) for each in weights.values())
    for name, each in load_causal_lm(tiny_model, TINY, torch.bfloat16).named_parameters():
        assert torch.equal(each, weights[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["glm4_moe", "mixtral", "olmoe", "phimoe", "qwen3_moe", "qwen3_next"])
def test_experts_are_merged_in_files(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    tiny_family(family).save_pretrained(saved)
    with open_scratch(tmp_path / "artifact") as scratch:
        model = load_causal_lm(saved, TINY, dtype, scratch=scratch.directory)
    weights = dict(model.named_parameters())
    assert any(name.endswith("experts.gate_up_proj") for name in weights)
    assert all(mapped(each) for each in weights.values())
    alone = dict(load_causal_lm(saved, TINY, dtype).named_parameters())
    assert [*alone] == [*weights]
    for name, each in alone.items():
        assert torch.equal(each, weights[name]), name
    model.save_pretrained(tmp_path / "again")
    assert names_in(tmp_path / "again") == names_in(saved)


def test_an_encoder_is_refused_as_such(tmp_path: Path) -> None:
    """And not because no language model has its config."""
    shape: dict[str, Any] = {
        "num_labels": 1,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
    }
    BertForSequenceClassification(BertConfig(vocab_size=300, num_attention_heads=4, **shape)).save_pretrained(
        tmp_path / "bert"
    )
    with (
        open_scratch(tmp_path / "artifact") as scratch,
        pytest.raises(ConfigError, match="has no linear `score` head without bias"),
    ):
        load_scalar_model(tmp_path / "bert", TINY, torch.bfloat16, scratch=scratch.directory)


def read_by_this_rank(compute: Compute, artifact: Path) -> list[str]:
    """The weights that Python opens while an adapter is loaded: those that are hashed, as safetensors opens
    files by itself."""
    read: list[str] = []
    sys.addaudithook(lambda event, details: read.append(str(details[0])) if event == "open" else None)
    load_causal_lm(artifact, TINY, torch.float32, compute=compute)
    return [Path(path).name for path in read if path.endswith(".safetensors")]


@pytest.mark.slow
def test_one_rank_reads_the_model_below_an_adapter_to_know_it(tiny_model: Path, tmp_path: Path) -> None:
    model, config = load_causal_lm(tiny_model, TINY, torch.float32), PeftConfig(method="prefix")
    attach(model, config)
    trained: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    artifact = tmp_path / "sft" / "0"
    artifact.mkdir(parents=True)
    publish_policy(
        artifact, write_trained(tmp_path / "trained", trained), load_tokenizer(tiny_model, TINY), key="",
        start=tiny_model, settings=TINY, dtype=torch.float32, peft=config,
    )  # fmt: skip
    found = start_ranks(read_by_this_rank, 2, artifact, timeout=60, seconds=120)()
    assert found == {0: ["model.safetensors"], 1: []}
