"""A model directory in which one file is not what it should be: one line with the directory and the cause."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.chains import Chain


def text(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(content)


def first_half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def changed(**values: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def with_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(path: Path) -> None:
        weights = load_file(path)
        change(weights)
        save_file(weights, path, metadata={"format": "pt"})

    return rewrite


WEIGHT = "model.layers.0.mlp.up_proj.weight"
DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "config_cut": ("config.json", first_half),
    "config_is_a_list": ("config.json", text("[]")),
    "config_is_empty": ("config.json", text("")),
    "config_is_binary": ("config.json", lambda path: path.write_bytes(b"\xff\xfe\x00")),
    "no_model_type": ("config.json", text("{}")),
    "unknown_model_type": ("config.json", changed(model_type="no_such_model")),
    "size_is_a_text": ("config.json", changed(hidden_size="many")),
    "size_is_negative": ("config.json", changed(hidden_size=-64)),
    "heads_do_not_divide": ("config.json", changed(num_attention_heads=7)),
    "no_layers_known": ("config.json", changed(num_hidden_layers=None)),
    "vocabulary_too_small": ("config.json", changed(vocab_size=100)),
    "tokenizer_cut": ("tokenizer.json", first_half),
    "tokenizer_is_a_list": ("tokenizer.json", text("[]")),
    "tokenizer_of_no_kind": ("tokenizer.json", text('{"model": {"type": "none"}}')),
    "tokenizer_is_missing": ("tokenizer.json", Path.unlink),
    "tokenizer_config_cut": ("tokenizer_config.json", first_half),
    "tokenizer_config_is_a_list": ("tokenizer_config.json", text("[]")),
    "generation_config_cut": ("generation_config.json", first_half),
    "template_is_broken": ("chat_template.jinja", text("{% for message in messages %}{{ message")),
    "template_is_binary": ("chat_template.jinja", lambda path: path.write_bytes(b"\xff\xfe\x00")),
    "weights_cut": ("model.safetensors", first_half),
    "weights_are_garbage": ("model.safetensors", text("garbage, not weights at all")),
    "weights_are_empty": ("model.safetensors", text("")),
    "a_weight_is_missing": ("model.safetensors", with_weights(lambda found: found.pop(WEIGHT))),
    "a_weight_is_narrow": (
        "model.safetensors",
        with_weights(lambda found: found.update({WEIGHT: found[WEIGHT][:5].clone()})),
    ),
    "a_weight_is_nan": ("model.safetensors", with_weights(lambda found: found[WEIGHT].fill_(float("nan")))),
}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return Chain(tmp_path_factory.mktemp("malformed"))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_malformed_model_is_one_line_before_anything_trains(
    chain: Chain, tiny_model: Path, damage: str
) -> None:
    name, spoil = DAMAGES[damage]
    directory = shutil.copytree(tiny_model, chain.directory / damage)
    spoil(directory / name)
    outcome = chain.run("model=local", f"model.path={damage}", "stage=sft")
    assert outcome.code == 2, outcome.out
    (line,) = outcome.err.strip().splitlines()
    assert line.startswith(f"Error: model.path={damage}: ") and line.endswith("."), line
    assert len(line) < 500, line
    assert "sft done" not in outcome.out


def test_a_directory_that_is_called_memory_is_told_like_any_other(chain: Chain, tiny_model: Path) -> None:
    directory = shutil.copytree(tiny_model, chain.directory / "memory")
    first_half(directory / "config.json")
    outcome = chain.run("model=local", "model.path=memory", "stage=sft")
    assert outcome.code == 2 and "cannot be read as a model" in outcome.err
