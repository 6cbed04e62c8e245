"""A complaint from deep inside names what the user wrote."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.chains import Chain
from helpers.experiments import build
from helpers.verdicts import mounted
from rlhf.config import STAGE, Complaint, ConfigError, in_user_keys
from rlhf.models.base import BaseModelFiles, ModelConfig
from rlhf.pipeline.checks import check
from rlhf.pipeline.graph import naming_keys
from rlhf.pipeline.stage import View
from rlhf.pipeline.store import DamagedError
from rlhf.stages.merge import MergeStage

KEYS = {"mine": "ppo.init=mine", "python:m:f": "ppo.reward=python:m:f"}
IA3 = Complaint(f"{STAGE}.peft=ia3", "no.", f"Use {STAGE}.peft=lora.")


@pytest.mark.parametrize(
    ("inside", "outside"),
    [
        (IA3, "sft.peft=ia3: no. Use sft.peft=lora."),
        (Complaint("mine", "cannot be read."), "ppo.init=mine: cannot be read."),
        (Complaint("ppo.init=mine", "cannot be read."), "ppo.init=mine: cannot be read."),  # it says so
        (Complaint("/is/mine", "mine: no.", "Fix mine."), "/is/mine: mine: no. Fix mine."),  # another file
        (Complaint("python:m:f", "it gave 2 scores."), "ppo.reward=python:m:f: it gave 2 scores."),
        ("mine: no.", "mine: no."),
    ],
)
def test_what_a_complaint_is_about_becomes_the_users_key(inside: Complaint | str, outside: str) -> None:
    with pytest.raises(ConfigError) as error, in_user_keys(KEYS, "sft"):
        raise ConfigError(inside)
    assert str(error.value) == outside


def test_complaints_are_told_in_a_line_each() -> None:
    error = ConfigError(Complaint("ppo.clip=0", "too small.", "Use 0.2."), "Nothing was loaded.")
    assert str(error) == "ppo.clip=0: too small. Use 0.2.\nNothing was loaded."


def test_an_error_with_words_of_its_own_keeps_them(tmp_path: Path) -> None:
    class Reads(MergeStage):
        def complaints(self, view: View) -> Iterator[Complaint]:
            raise DamagedError(tmp_path, "a file is missing")

    stages = build().stages
    stage = mounted("merge", Reads.model_construct(gates={}, alpha=0.5, policy="sft"))
    with pytest.raises(ConfigError) as error:
        check(stage, View(stages))
    assert str(error.value).startswith(f"{tmp_path} is damaged: a file is missing. The next command ")


def test_what_a_stage_was_told(tmp_path: Path) -> None:
    base = BaseModelFiles(tmp_path, "", ModelConfig(kind="local", path="here"))
    stages = build("ppo.init=mine", "ppo.reward=model:judge").stages
    assert naming_keys(stages["ppo"], base) == {
        "model:judge": "ppo.reward=model:judge",
        "judge": "ppo.reward=model:judge",
        "mine": "ppo.init=mine",
        str(tmp_path): "model.path=here",
    }
    stages = build("ppo.reward=vader", "ppo.critic.init=sft").stages
    assert naming_keys(stages["ppo"]) == {}  # vader may stand for something else


def test_a_reward_models_directory_is_named_by_its_key(tmp_path: Path, tiny_model: Path) -> None:
    chain, judge = Chain(tmp_path), tmp_path / "judge"
    shutil.copytree(tiny_model, judge)
    key = "Error: ppo.reward=model:judge"
    settings = ("stage=ppo", "ppo.reward=model:judge", "ppo.critic.init=sft", "evaluate.reward=null")
    assert chain.run(*settings).err.startswith(f"{key}: its score head was never trained")
    (judge / "model.safetensors").write_bytes(b"no weights")
    outcome = chain.run(*settings)
    assert outcome.err.startswith(f"{key}: cannot be read as a model: ") and outcome.code == 2
    assert outcome.err.rstrip().endswith("judge: fetch or save them again.")
    (judge / "config.json").unlink()
    assert chain.run(*settings).err.startswith(f"{key}: no config.json there")


def test_a_complaint_that_leaves_a_running_stage_is_named_too(tmp_path: Path, tiny_model: Path) -> None:
    chain, base = Chain(tmp_path), tmp_path / "base"
    shutil.copytree(tiny_model, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))  # one has no weights
    outcome = chain.run("stage=sft", "model=local", "model.path=base")
    assert outcome.statuses["sft"] == "failed"
    assert list((tmp_path / "store").glob("*/.*.part-*")) == []
    assert outcome.err.startswith("Error: model.path=base: cannot be read as a model: its weights lack ")
    assert outcome.err.rstrip().endswith("Save it again, whole.")
