"""The schema with which editors complete YAML: right files pass, wrong ones do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator
from omegaconf import OmegaConf

from helpers.experiments import compose
from rlhf.cli.schema import json_schema

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
SCHEMA = json.loads(json_schema())
FILES = [path for path in sorted(CONF.rglob("*.yaml")) if "hydra" not in path.parts]


def complaints(config: Any) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in Draft7Validator(SCHEMA).iter_errors(config)]


def in_its_place(path: Path) -> dict[str, Any]:
    """A YAML file's keys where Hydra puts them."""
    found = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(found, dict)
    if "@package _global_" in path.read_text() or path.parent == CONF:
        return {str(key): value for key, value in found.items()}
    if path.parent.name == "decide":  # one of several candidates
        return {"decide": {"candidates": {path.stem: found}}}
    return {path.stem if path.parent.name == "stages" else path.parent.name: found}


def test_it_is_a_schema() -> None:
    Draft7Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(CONF).as_posix())
def test_every_file_of_conf_is_right(path: Path) -> None:
    assert complaints(in_its_place(path)) == []


@pytest.mark.parametrize("resolve", [False, True])
def test_the_composed_config_is_right(resolve: bool) -> None:
    assert complaints(compose(resolve=resolve)) == []


@pytest.mark.parametrize(
    "config",
    [
        {"sft": {"peft": {"method": "lora", "rank": 8}, "data": {"path": "a.jsonl", "limit": 3}}},
        {"sft": {"peft": "dora", "data": "a.jsonl", "epochs": "${reward.epochs}"}},
        {"evaluate": {"retention": "a.txt", "policies": "auto"}, "ppo": {"gates": {"kl": None}}},
        {"reward": {"gates": {"accuracy": {"min": 0.6, "advice": "more pairs"}}}, "stage": "sft"},
    ],
)
def test_what_a_user_may_write_is_right(config: dict[str, Any]) -> None:
    assert complaints(config) == []


@pytest.mark.parametrize(
    ("config", "where"),
    [
        ({"sfft": {}}, "$"),
        ({"sft": {"lr": 1e-3}}, "$.sft"),
        ({"sft": {"optim": {"lr": -1.0}}}, "$.sft.optim.lr"),
        ({"sft": {"peft": "laura"}}, "$.sft.peft"),
        ({"ppo": {"steps": "many"}}, "$.ppo.steps"),
        ({"zero": "zero4"}, "$.zero"),
        ({"sft": {"data": {"pth": "a.jsonl"}}}, "$.sft.data"),
    ],
)
def test_what_is_wrong_is_marked_where_it_stands(config: dict[str, Any], where: str) -> None:
    (complaint,) = complaints(config)
    assert complaint.startswith(f"{where}: ")


def test_it_says_what_a_key_means() -> None:
    stage = SCHEMA["$defs"]["SftStage"]["properties"]
    assert stage["micro_batch_tokens"]["description"].startswith("Tokens per forward pass")
    (gates,) = [choice for choice in stage["gates"]["anyOf"] if "properties" in choice]
    assert "lower sft.optim.lr" in gates["properties"]["held_out_loss_change"]["description"]
