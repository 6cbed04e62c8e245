"""The YAML files and the typed classes say the same, and every choice composes and builds."""

from __future__ import annotations

import re
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf
from pydantic import BaseModel

from helpers.experiments import build, build_stage, compose
from rlhf.config import Bound, ConfigError
from rlhf.data.sources import SourceConfig
from rlhf.models.base import ModelConfig
from rlhf.models.peft.config import PeftConfig
from rlhf.pipeline.experiment import Settings, build_experiment
from rlhf.pipeline.experiment import stage_class as class_of_target
from rlhf.pipeline.settings import CandidateConfig, DecideConfig
from rlhf.pipeline.stage import Stage
from rlhf.rewards.kinds import RewardMix, RewardPart
from rlhf.stages.ppo import PpoStage
from rlhf.stages.sft import SftStage
from rlhf.tracking.tracker import TrackerConfig
from rlhf.training.config import OptimConfig

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
DEFAULT_GROUPS = ("model", "tracker", "recipe", "hydra/sweeper")
"""Groups in the defaults list, which are chosen without a plus."""
WITH = {
    "remedy": ("+sweep=forgetting",),
    "experiment": ("sft.data=samples:instructions", "reward.pairs=samples:pairs"),
}
"""Group -> further overrides that its choices need."""
WITH_DEFAULTS = (PeftConfig, SourceConfig, Bound, RewardMix, RewardPart)
"""Sections that users write themselves, often as one word; their defaults are in the class and its docs."""
OPTIONAL = {(OptimConfig, "warmup_steps")}
"""Keys that YAML files of stages from outside the package may lack."""
CHOICES = [
    (path.parent.relative_to(CONF).as_posix(), path.stem)
    for path in sorted(CONF.rglob("*.yaml"))
    if path.parent not in (CONF, CONF / "stages", CONF / "decide")
]


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CONF / name).read_text())
    return found


STAGES = tuple(
    key.removeprefix("stages@")
    for entry in read("config.yaml")["defaults"]
    if isinstance(entry, dict)
    for key in entry
    if key.startswith("stages@")
)
"""All stages, in the order in which they are mounted."""


def stage_class(name: str) -> type[Stage]:
    return class_of_target(name, f"rlhf.stages.{name}.{name.capitalize()}Stage")


CHAIN = tuple(name for name in STAGES if stage_class(name).in_chain)


def section_classes(annotation: Any) -> list[type[BaseModel]]:
    """The config sections in a field's type: itself, an alternative, a dictionary's value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in typing.get_args(annotation) for found in section_classes(argument)]


def differences(model: type[BaseModel], values: dict[str, Any], prefix: str) -> list[str]:
    """Keys that only one side has, at any depth."""
    fields = model.model_fields
    found = [f"{prefix}.{key}: in the class only" for key in fields if key not in values]
    found += [f"{prefix}.{key}: in the YAML only" for key in values if key not in fields]
    for key, value in values.items():
        sections = section_classes(fields[key].annotation) if key in fields else []
        if sections and isinstance(value, dict) and sections[0] is not Bound:
            found += differences(sections[0], value, f"{prefix}.{key}")
    return found


def sections_of(model: type[BaseModel]) -> set[type[BaseModel]]:
    """A class and all sections under it."""
    found = {model}
    for field in model.model_fields.values():
        for section in section_classes(field.annotation):
            found |= sections_of(section)
    return found


def test_one_yaml_and_one_module_for_each_stage() -> None:
    assert {path.stem for path in (CONF / "stages").glob("*.yaml")} == set(STAGES)
    assert {path.stem for path in (ROOT / "stages").glob("*.py")} == {"__init__", *STAGES}


@pytest.mark.parametrize("name", STAGES)
def test_yaml_and_class_list_the_same_keys(name: str) -> None:
    values = read(f"stages/{name}.yaml")
    assert values.pop("_target_") == f"rlhf.stages.{name}.{name.capitalize()}Stage"
    assert differences(stage_class(name), values, name) == []


def test_a_difference_is_seen_at_any_depth() -> None:
    values = read("stages/ppo.yaml")
    del values["_target_"], values["critic"]["optim"]["lr"]
    values["kl"]["speed"] = 1
    assert differences(stage_class("ppo"), values, "ppo") == [
        "ppo.critic.optim.lr: in the class only", "ppo.kl.speed: in the YAML only",
    ]  # fmt: skip


@pytest.mark.parametrize("name", STAGES)
def test_values_stand_in_yaml_only(name: str) -> None:
    for section in sections_of(stage_class(name)) - set(WITH_DEFAULTS):
        fields = section.model_fields.items()
        with_default = {(section, key) for key, field in fields if not field.is_required()}
        assert with_default <= OPTIONAL, section.__name__


def test_stages_that_repeat_others_keys_are_checked_last() -> None:
    repeating = [name for name in STAGES if "${" in (CONF / "stages" / f"{name}.yaml").read_text()]
    assert repeating == [name for name in STAGES if stage_class(name).repeats_keys]


def test_keys_beside_the_stages() -> None:
    plain = set(read("config.yaml")) - {"defaults", "hydra"}
    assert plain | {"model", "tracker", "recipe"} == set(Settings.model_fields)
    assert not [key for key, field in Settings.model_fields.items() if not field.is_required()]
    assert set(read("model/hub.yaml")) | set(read("model/local.yaml")) == set(ModelConfig.model_fields)
    assert set(read("tracker/wandb.yaml")) == set(TrackerConfig.model_fields)


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids="/".join)
def test_every_choice_composes_and_builds(group: str, choice: str) -> None:
    plus = "" if group in DEFAULT_GROUPS else "+"
    beside = WITH.get(group, ())
    experiment = build(*beside, f"{plus}{group}={choice}")
    names = [name for name in experiment.stages if "@" not in name]
    if choice == "feedback":  # there `reward` reads what `label` makes
        assert names.index("label") < names.index("reward")
        names = sorted(names, key=STAGES.index)
    assert names == list(STAGES)
    if group in ("model", "tracker"):
        assert getattr(experiment.settings, group).kind == choice


def test_every_candidate_of_a_decision_is_tried() -> None:
    values = read("config.yaml")["decide"] | {"candidates": None}
    assert differences(DecideConfig, values, "decide") == []
    files = {path.stem: read(f"decide/{path.name}") for path in (CONF / "decide").glob("*.yaml")}
    decide = build("recipe=decide").settings.decide
    assert (
        decide.candidates
        == decide.tried
        == {name: CandidateConfig(**content) for name, content in files.items()}
    )


def test_advice_names_keys_that_exist() -> None:
    resolved = compose()
    pattern = re.compile(rf"\b((?:{'|'.join(STAGES)})(?:\.[a-z_]+)+)")
    advice = [
        gate["advice"].replace("{stage}", name)
        for name in STAGES
        for gate in resolved[name]["gates"].values()
    ]
    keys = {key for text in advice for key in pattern.findall(text)}
    assert len(keys) > 5
    for key in keys:
        assert OmegaConf.select(OmegaConf.create(resolved), key, default="missing") != "missing", key


@pytest.mark.parametrize(
    ("override", "needed"),
    [
        ("stage=all", list(CHAIN)),
        ("stage=[all,compare,merge]", [each for each in STAGES if each in (*CHAIN, "merge", "compare")]),
        ("stage=merge", ["prepare", "sft", "merge"]),
        ("stage=[merge,sft] merge.policy=ppo", [*CHAIN[:-1], "merge"]),
        ("stage=plan", ["prepare", "plan"]),
        ("stage=prepare", ["prepare"]),
        ("stage=sft", ["prepare", "sft"]),
        ("stage=[reward,sft]", ["prepare", "sft", "reward"]),
        ("stage=ppo", ["prepare", "sft", "reward", "generate", "ppo"]),
        ("stage=compare", [*CHAIN[:-1], "compare"]),
    ],
)
def test_a_stage_brings_what_it_reads(override: str, needed: list[str]) -> None:
    assert build(*override.split()).needed() == needed


def test_a_rule_reward_needs_no_reward_model() -> None:
    experiment = build("stage=ppo", "ppo.reward=vader", "ppo.critic.init=sft", "ppo.score.normalize=running")
    assert experiment.needed() == ["prepare", "sft", "ppo"]


@pytest.mark.parametrize("text", ["lora", "{method:lora,rank:8}"])
def test_peft_is_one_word_or_a_section(text: str) -> None:
    peft = build_stage(SftStage, f"sft.peft={text}").peft
    assert (peft.method, peft.alpha) == ("lora", 32.0)
    assert peft.rank == (8 if "8" in text else 16)


def test_a_stage_is_frozen_after_the_check() -> None:
    stage = build_stage(PpoStage)
    with pytest.raises(ValueError, match="frozen"):
        stage.steps = 3  # type: ignore[misc]  # which is tested


def test_all_complaints_of_a_section_come_at_once() -> None:
    resolved = compose("model=tiny", "ppo.clip=-1", "ppo.kl.coef=much")
    resolved["ppo"]["kl"] |= {"speed": 1}
    del resolved["ppo"]["gamma"]
    with pytest.raises(ConfigError) as caught:
        build_experiment(resolved)
    lines = str(caught.value).splitlines()
    assert [re.split(r"[=:]", line)[0] for line in lines] == [
        "ppo.kl.coef",
        "ppo.kl.speed",
        "ppo.clip",
        "ppo.gamma",
    ]
    assert "there is no such key" in lines[1]
    assert "a value is required" in lines[3]


def test_the_command_line_prints_the_composed_config(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rlhf", "--cfg", "job", "model=tiny", "ppo.kl.coef=0.5"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    printed = yaml.safe_load(done.stdout)
    assert printed["ppo"]["kl"]["coef"] == 0.5
    assert printed["model"]["kind"] == "tiny"
    assert printed["gates"] == "warn"
