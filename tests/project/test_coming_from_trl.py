"""docs/coming-from-trl.md: every key of TRL's configs stands there, and every key of ours exists."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from helpers.experiments import build

PAGE = (Path(__file__).parents[2] / "docs" / "coming-from-trl.md").read_text(encoding="utf-8")
PPO_CONFIG = (
    "dataset_num_proc", "num_mini_batches", "total_episodes", "local_rollout_forward_batch_size",
    "num_sample_generations", "response_length", "stop_token", "stop_token_id", "temperature",
    "missing_eos_penalty", "sft_model_path", "world_size", "num_total_batches", "micro_batch_size",
    "local_batch_size", "batch_size", "local_mini_batch_size", "mini_batch_size", "push_to_hub",
    "reward_model_path", "model_adapter_name", "ref_adapter_name", "num_ppo_epochs", "whiten_rewards",
    "kl_coef", "kl_estimator", "cliprange", "vf_coef", "cliprange_value", "gamma", "lam",
    "ds3_gather_for_generation",
    "learning_rate",
)  # fmt: skip
"""Fields of trl.experimental.ppo.PPOConfig 1.12.0 that it declares itself."""


def rows(page: str = PAGE) -> list[list[str]]:
    lines = [line for line in page.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_key_of_ppo_config_is_there() -> None:
    theirs = {key for row in rows() for key in re.findall(r"`(\w+)`", row[0])}
    assert [key for key in PPO_CONFIG if key not in theirs] == []


@pytest.mark.parametrize("name", ["GRPOConfig", "DPOConfig"])
def test_every_key_of_an_installed_config_is_there_with_its_default(name: str) -> None:
    trl = pytest.importorskip("trl")
    transformers = pytest.importorskip("transformers")
    theirs = {field.name: field.default for field in fields(getattr(trl, name))}
    inherited = {field.name for field in fields(transformers.TrainingArguments)}
    section = PAGE.split(f"\n## {name}\n")[1].split("\n## ")[0]
    told = dict(found for row in rows(section) for found in re.findall(r"`(\w+)`(?: \(([^)]+)\))?", row[0]))
    assert [key for key in theirs if key not in inherited and key not in told] == []
    assert [key for key in told if key not in theirs] == []
    for key, default in told.items():
        if key != "loss_type" or name != "DPOConfig":  # a list
            assert str(theirs[key]).lower() == default, key


def test_every_key_of_ours_exists_and_has_the_default_that_is_told() -> None:
    resolved = OmegaConf.create(dict(build().resolved))
    named = [(key, told) for row in rows() for key, told in re.findall(r"`([\w.]+)`(?: \(([^),]+))?", row[1])]
    assert len(named) > 40
    for key, told in named:
        value = OmegaConf.select(resolved, key, default="missing")
        assert value != "missing", key
        if told:
            known = {"none": "None", "false": "False", "true": "True"}.get(told, told)
            assert str(value) == known or float(value) == float(known), (key, value, told)
