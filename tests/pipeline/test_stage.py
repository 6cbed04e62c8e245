"""What a stage declares: what it makes, and so who may read it, and when it runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from helpers.experiments import build, compose
from rlhf.config import ConfigError
from rlhf.pipeline.experiment import build_experiment
from rlhf.pipeline.graph import in_order, inputs
from rlhf.pipeline.key import knobs
from rlhf.stages.merge import MergeStage


def test_a_stage_stands_behind_what_it_reads_wherever_it_is_mounted() -> None:
    composed = compose("model=tiny", "merge.policy=ppo")
    backwards = build_experiment(dict(reversed(composed.items())))
    names = list(backwards.stages)
    assert sorted(names) == sorted(build().stages)
    for name, stage in backwards.stages.items():
        assert {*inputs(stage, backwards.stages)} <= {*names[: names.index(name)]}
    assert backwards.needed() == ["prepare", "sft", "reward", "generate", "ppo", "evaluate"]


@pytest.mark.parametrize(
    ("reads", "complaint"),
    [
        ({"a": "b", "b": "c", "c": "b"}, "b reads c reads b: they read each other"),
        ({"a": "a"}, "a reads itself, so it can never run. Let it read another stage."),
        ({"first": "second", "second": "frist"}, r"second: it reads frist, and .* Did you mean first\?"),
    ],
)
def test_what_cannot_be_put_in_order_is_told(reads: dict[str, str], complaint: str) -> None:
    stages = {
        name: MergeStage.model_construct(policy=other, alpha=0.5, gates={}) for name, other in reads.items()
    }
    with pytest.raises(ConfigError, match=complaint):
        in_order(stages)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        (
            "merge.policy=reward",
            "merge.policy=reward: no stage .*makes a policy. Known: sft, ppo.",
        ),
        ("merge.policy=merge", "merge.policy=merge: a stage cannot read what it makes itself."),
        ("evaluate.policies=[base,sftt]", "evaluate.policies=sftt: no stage .* Did you mean sft?"),
        (
            "compare.artifacts=[ppoo]",
            "compare.artifacts=ppoo: no stage .* Did you mean ppo. Known: dpo,",
        ),
        ("compare.artifacts=[generate]", "compare.artifacts=generate: no stage"),
    ],
)
def test_only_a_stage_that_makes_a_policy_is_read_as_one(override: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        build(override, "evaluate.gates.win_rate=null")


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        (
            "plan.trains=[sft,generate]",
            "plan.trains=generate: no stage .*trains. .*sft, reward, ppo",
        ),
        ("plan.trains=[rewrd]", "plan.trains=rewrd: .*Did you mean reward?"),
    ],
)
def test_only_a_stage_that_trains_is_planned(override: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        build("stage=plan", override)


def test_the_subject_of_evaluate_owns_its_gates() -> None:
    of_sft = ("evaluate.policies=[base,sft]", "evaluate.subject=sft", "ppo.init=base")
    chain = build("stage=evaluate", *of_sft).stages
    assert inputs(chain["evaluate"], chain)[:2] == ("prepare", "sft")
    with pytest.raises(ConfigError, match=r"^evaluate\.subject=merge is not in evaluate\.policies=\[base,p"):
        build("stage=evaluate", "evaluate.subject=merge")


@pytest.mark.parametrize(
    ("policies", "subject"),
    [
        ("base,sft,ppo", "ppo"),
        ("merge,sft,ppo,base", "ppo"),
        ("merge,sft,base", "merge"),
        ("sft,base", "sft"),
        ("base", "base"),
        ("best_of_n,sft,base", "best_of_n"),
        ("best_of_n,sft,merge,base", "merge"),
    ],
)
def test_the_subject_is_found_whatever_the_order_of_the_list(policies: str, subject: str) -> None:
    for names in (policies.split(","), policies.split(",")[::-1]):
        override = f"evaluate.policies=[{','.join(names)}]"
        found = build("stage=evaluate", override, "evaluate.gates.win_rate=null").stages["evaluate"]
        assert knobs(found)["subject"] == subject


def test_of_several_policies_without_ppo_one_is_to_be_named() -> None:
    several = "evaluate.policies=[sft,merge]"
    with pytest.raises(
        ConfigError, match=r"subject=ppo is not in evaluate\.policies=.* set evaluate\.subject to one"
    ):
        build("stage=evaluate", "ppo.init=base", several)


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        (
            "rlhf.stages.sftt.SftStage",
            r"sft\._target_=.*: No module .*mean sft\?",
        ),
        ("rlhf.stages.sft.SftStge", r"sft\._target_=.*sft\.py has no SftStge\. Did you mean SftStage\?"),
        ("no_such_module.Mine", r"sft\._target_=no_such_module.Mine: No module .* Searched: .*PYTHONPATH"),
        ("rlhf.config.Sft.Stage", r"sft\._target_=.*: No module named 'rlhf\.config\.Sft'"),
        ("SftStage", r"sft\._target_=SftStage: write MODULE\.CLASS"),
        ("rlhf.config.Bound", r"Bound is not a subclass of rlhf\.pipeline\.stage\.Stage"),
        ("rlhf.pipeline.stage.Stage", r"a stage needs its own run"),
    ],
)
def test_a_mistyped_target_is_told(target: str, complaint: str) -> None:
    composed = compose("model=tiny")
    composed["sft"]["_target_"] = target
    with pytest.raises(ConfigError, match=complaint):
        build_experiment(composed)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("makes: ClassVar = 'polcy'", r"MyStage\.makes is 'polcy'\. It must be 'policy', 'reward'"),
        ("metrics: ClassVar = {'x': 'my x'}", r"MyStage\.metrics\['x'\] is 'my x'\. Write a Metric, such as"),
        ("metrics: ClassVar = {'x': Metric('x', '.2q')}", r"its format '\.2q': .* Use one such as '\.2f'"),
        ("name: str = 'x'", r"a stage is called as it is mounted, sft here\. Remove MyStage\.name"),
        ("name: ClassVar[str] = 'sft'", r"a stage is called as it is mounted, sft here\. Remove"),
        (
            "name = 'sft'",
            r"non-annotated attribute .* A stage is called as it is mounted, so it sets no name",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Field name")
def test_a_class_that_says_nonsense_is_refused_before_anything_runs(
    line: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nonsense.py").write_text(
        "from typing import ClassVar\nfrom rlhf.pipeline.metrics import Metric\n"
        f"from rlhf.stages.sft import SftStage\n\nclass MyStage(SftStage):\n    {line}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "nonsense", raising=False)
    composed = compose("model=tiny")
    composed["sft"]["_target_"] = "nonsense.MyStage"
    with pytest.raises(ConfigError, match=told):
        build_experiment(composed)


def test_a_module_that_is_no_python_is_told_by_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_written.py").write_text("class DpoStage(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    composed = compose("model=tiny")
    composed["sft"]["_target_"] = "half_written.DpoStage"
    with pytest.raises(ConfigError, match=r"sft\._target_=half_written\.DpoStage: .*half_written\.py:1: "):
        build_experiment(composed)
