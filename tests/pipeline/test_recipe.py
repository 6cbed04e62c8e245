"""Recipes and named instances: which stages they make, what these read, and slips in their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.experiments import build, compose
from rlhf.cli.messages import hydra_arguments
from rlhf.config import ConfigError
from rlhf.data.roles import ROLES
from rlhf.pipeline.experiment import Experiment, build_experiment
from rlhf.pipeline.graph import inputs, roles_of
from rlhf.pipeline.made_rows import context_of
from rlhf.pipeline.metrics import purpose_metric
from rlhf.pipeline.recipe import as_typed, hydra_argument
from rlhf.pipeline.run import gate_results
from rlhf.stages.dpo import DpoStage


def instances(names: dict[str, Any], *overrides: str) -> Experiment:
    """The experiment with these named instances."""
    return build_experiment(compose(*overrides) | {"instances": names})


def on_command_line(*overrides: str) -> Experiment:
    return build(*hydra_arguments(overrides))


def test_a_recipe_says_what_all_means_and_what_is_compared() -> None:
    dpo = build("recipe=dpo", "evaluate.reward=null")
    assert dpo.needed() == ["prepare", "sft", "dpo", "evaluate"]
    assert dict(dpo.stages["evaluate"])["policies"] == ["base", "dpo", "sft"]
    assert dict(dpo.stages["evaluate"])["subject"] == "dpo"
    assert dict(dpo.stages["compare"])["artifacts"] == ["sft", "dpo"]
    assert build("recipe=dpo").needed() == ["prepare", "sft", "reward", "dpo", "evaluate"]
    assert "ppo" not in build("recipe=grpo").needed()
    sft = build("recipe=sft")
    assert sft.needed() == ["prepare", "sft", "evaluate"]
    assert [dict(sft.stages["evaluate"])[key] for key in ("init", "subject")] == ["base", "sft"]
    assert build().needed() == ["prepare", "sft", "reward", "generate", "ppo", "evaluate"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ("sft.data=mine.jsonl", "reward.pairs=mine.jsonl"),
            r"reward\.pairs=mine\.jsonl: this recipe= makes these rows itself",
        ),
        (
            ("+experiment=own_data", "sft.data=mine.jsonl"),
            r"reward\.pairs=null: .* Set reward\.pairs=stage:label",
        ),
    ],
)
def test_a_source_in_the_place_of_the_recipes_is_refused(overrides: tuple[str, ...], said: str) -> None:
    """With it, no person would be asked for labels."""
    with pytest.raises(ConfigError, match=said):
        build("recipe=feedback", *overrides)
    assert "label" in build("recipe=feedback", *overrides, "reward.pairs=stage:label").needed()
    assert "label" not in build("recipe=feedback", *overrides, "stage=sft").needed()


def test_a_source_of_a_recipe_has_a_key() -> None:
    config = compose()
    for key in ("sft.nope", "nope.data"):
        config["recipe"] = {**config["recipe"], "sources": {key: "stage:label"}}
        with pytest.raises(ConfigError, match=rf"recipe\.sources: {key}: there is no such key"):
            build_experiment(config)


def test_a_recipe_follows_the_start_that_the_user_names() -> None:
    dpo = build("recipe=dpo", "dpo.init=base", "evaluate.reward=null")
    assert dpo.needed() == ["prepare", "dpo", "evaluate"]
    assert dict(dpo.stages["evaluate"])["policies"] == ["base", "dpo"]


@pytest.mark.parametrize("rounds", [1, 3])
def test_each_round_starts_from_the_one_before(rounds: int) -> None:
    found = build("recipe=iterated_dpo", f"recipe.rounds={rounds}")
    more = [stage for number in range(2, rounds + 1) for stage in (f"generate@{number}", f"dpo@{number}")]
    assert found.needed() == ["prepare", "sft", "reward", "dpo", *more, "evaluate"]
    if rounds > 1:
        third = dict(found.stages["dpo@3"])
        assert (third["init"], str(third["data"])) == ("dpo@2", "stage:generate@3")
        assert dict(found.stages["generate@2"])["policy"] == "dpo", "the first round has no number"
        assert inputs(found.stages["dpo@3"], found.stages) == ("prepare", "dpo@2", "generate@3")
    assert dict(found.stages["evaluate"])["subject"] == (f"dpo@{rounds}" if rounds > 1 else "dpo")


def test_an_instance_has_its_stages_keys_but_for_its_own() -> None:
    found = on_command_line("recipe=iterated_dpo", "dpo.beta=0.3", "dpo@3.beta=0.4", "dpo@3.optim.lr=1e-6")
    betas = {name: dict(stage)["beta"] for name, stage in found.stages.items() if isinstance(stage, DpoStage)}
    assert betas == {"dpo": 0.3, "dpo@2": 0.3, "dpo@3": 0.4}
    learned = dict(found.stages["dpo@3"])["optim"]
    assert (learned.lr, learned.schedule) == (1e-6, dict(found.stages["dpo"])["optim"].schedule)
    assert found.resolved["dpo@3"]["beta"] == 0.4, "config.yaml shows it"


def test_the_command_line_alone_makes_one() -> None:
    found = on_command_line("stage=dpo@long", "dpo@long.epochs=7")
    assert found.needed() == ["prepare", "sft", "dpo@long"]
    assert (found.stages["dpo@long"].full_title, dict(found.stages["dpo@long"])["epochs"]) == ("DPO long", 7)
    assert dict(found.stages["dpo"])["epochs"] == 1


def test_a_second_reward_model_is_an_instance_too() -> None:
    found = on_command_line("ppo.reward=[learned,learned@wide]", "reward@wide.epochs=2", "stage=ppo")
    assert inputs(found.stages["ppo"], found.stages) == (
        "prepare",
        "sft",
        "reward",
        "reward@wide",
        "generate",
    )
    with pytest.raises(ConfigError, match=r"it reads reward@other, and there is no such .* to `instances`"):
        build("ppo.reward=learned@other")


def test_each_evaluation_has_a_subject_of_its_own() -> None:
    found = instances({"evaluate@2": {"policies": ["base", "sft", "dpo"]}})
    subjects = {name: dict(found.stages[name])["subject"] for name in ("evaluate", "evaluate@2")}
    assert subjects == {"evaluate": "ppo", "evaluate@2": "dpo"}
    two = on_command_line("recipe=dpo", "dpo@2.beta=0.3", "evaluate.policies=[base,sft,dpo,dpo@2]")
    assert dict(two.stages["evaluate"])["subject"] == "dpo", "the recipe's"


def test_an_instance_that_nothing_reads_is_told() -> None:
    """stage=all means the recipe's stages, and no other."""
    found = instances({"evaluate@2": {"policies": ["base", "sft", "dpo"]}}, "recipe=dpo")
    assert (
        "Not run: evaluate@2. Nothing that stage=all means reads it. To run it: stage=[all,evaluate@2]."
        in found.notes
    )
    asked = instances(
        {"evaluate@2": {"policies": ["base", "sft", "dpo"]}}, "recipe=dpo", "stage=[all,evaluate@2]"
    )
    assert "evaluate@2" in asked.needed() and not any("Not run" in note for note in asked.notes)


def test_the_verdict_tells_instances_apart() -> None:
    found = on_command_line(
        "ppo.reward=[learned,learned@wide]", "reward@wide.epochs=2", "dpo@2.beta=0.3", "stage=[ppo,dpo@2]"
    )
    purposes = [purpose_metric(found.stages[name]) for name in ("reward", "reward@wide", "dpo@2")]
    assert [each and each[1].purpose.partition(" against ")[0] for each in purposes] == [
        "the reward model's ranking", "the reward model wide's ranking", "DPO 2's ranking",
    ]  # fmt: skip


def test_ppo_after_ppo_is_told_what_it_needs() -> None:
    with pytest.raises(ConfigError, match=r"are not there\. Use ppo@2\.score\.normalize=running with ppo@2"):
        instances({"ppo@2": {"init": "ppo"}}, "stage=ppo@2")


@pytest.mark.parametrize("argument", ["dpo@.beta=1", "dpo@a/b.beta=1", "dpo@2=5"])
def test_a_label_that_is_none_is_told(argument: str) -> None:
    with pytest.raises(ConfigError, match=r"write STAGE@LABEL.KEY=VALUE, such as dpo@2.beta=0.3"):
        hydra_arguments([argument])
    assert hydra_arguments(["+stages@toy=toy"]) == ["+stages@toy=toy"]


def test_values_and_other_keys_stay_as_they_are() -> None:
    for argument in ("stage=dpo@2", "dpo.init=dpo@2", "-m", "evaluate.policies=[base,dpo@2]", "a@b=c"):
        assert hydra_argument(argument) == argument
    typed = hydra_argument("dpo@2.optim.lr=1e-4,1e-5")
    assert typed == "++instances.dpo-at-2.optim.lr=1e-4,1e-5"
    assert hydra_argument("instances.dpo@2.optim.lr=1e-4,1e-5") == typed
    assert as_typed(f"+remedy=full {typed} ppo.clip=0.1") == (
        "+remedy=full dpo@2.optim.lr=1e-4,1e-5 ppo.clip=0.1"
    )


def test_gates_of_an_instance_advise_about_its_own_keys() -> None:
    stage, name = build("recipe=iterated_dpo").stages["dpo@2"], "held_out_loss_change"
    wide = {f"{name}_low": -0.1, f"{name}_high": 0.1, f"{name}_rows": 20}
    (failed, *_), (unsure, *_) = (gate_results(stage, {name: 0.09} | more) for more in ({}, wide))
    assert failed.name == unsure.name == name
    assert "dpo@2.optim.lr" in failed.advice and "docs/problems/dpo-does-not-help.md" in failed.advice
    assert "dpo@2.data" in unsure.advice


def test_rows_of_its_own_are_a_role_of_its_own() -> None:
    found = instances({"sft@short": {"data": "samples:prompts"}, "sft@long": {"epochs": 9}})
    assert found.stages["sft@short"].mount.own_role("sft") == "sft@short"
    assert roles_of(found.stages)["sft@short"].key == "sft@short.data"
    assert found.stages["sft@long"].mount.own_role("sft") == "sft"
    assert roles_of(build().stages) == ROLES


def test_rows_that_are_not_made_yet_are_counted_as_the_most_that_there_can_be() -> None:
    from helpers.costs import gpus

    found = build("recipe=iterated_dpo", "generate.num_prompts=10", "generate.samples_per_prompt=4")
    stages, on = found.stages, gpus(80.0)
    prompts = on.sizes("ppo", "train")
    sizes = context_of(stages["dpo@2"], stages, on).sizes("dpo", "train")
    assert sizes.rows == 18, "ten prompts, two pairs each, of which a tenth is held out"
    assert sizes.longest == prompts.longest + dict(stages["generate@2"])["max_new_tokens"]
    assert context_of(stages["dpo"], stages, on) is on


@pytest.mark.parametrize(
    ("names", "overrides", "complaint"),
    [
        ({"dpo@2": {"beeta": 1}}, [], "dpo@2.beeta: there is no such key. Did you mean beta?"),
        ({"dbo@2": {}}, [], "dbo@2: there is no stage dbo. Did you mean dpo?"),
        ({"dpo@": {}}, [], "instances.dpo@: write STAGE@LABEL, such as dpo@2"),
        ({"dpo": {}}, [], "instances.dpo: write STAGE@LABEL"),
        ({"dpo@2": [1]}, [], r"instances.dpo@2=\[1\]: it must be a mapping of keys of dpo"),
        ({"dpo@2": {"data": "stage:generat"}}, [], "stage:generat: there is no such stage. Did you mean"),
        ({"dpo@2": {"data": "stage:sft"}}, [], "sft makes no such rows. Stages that do: label, generate"),
        (
            {"dpo@2": {"data": "stage:generate@2"}, "generate@2": {"policy": "dpo@2"}},
            ["stage=dpo@2"],
            "generate@2 reads dpo@2 reads generate@2: they read",
        ),
        ({}, ["sft.data=stage:generate"], "they read each other"),
        ({}, ["stage=dpo@2"], "stage=dpo@2: there is no such stage.* such as dpo@2.KEY=VALUE"),
        ({}, ["recipe.policies=[base,sft,dop]"], "evaluate.policies=dop: no stage .*Did you mean dpo"),
        ({}, ["recipe.stages=[dbo]"], "recipe.stages=dbo: there is no such stage. Did you mean dpo"),
        ({"dpo@2": {"gates": {"acuracy": {"min": 0.9}}}}, [], "dpo@2.gates.acuracy: there is no such gate"),
        ({"dpo@2": {"gates": None}}, [], "dpo@2.gates=None: it must be a mapping"),
        (
            {"generate@2": {"policy": "dpo", "splits": ["train"]}, "dpo@2": {"data": "stage:generate@2"}},
            ["stage=dpo@2"],
            r"dpo@2.data=stage:generate@2: generate@2.splits=\[train\] answers no held-out prompts",
        ),
        ({}, ["recipe.rounds=0"], "recipe.rounds=0: "),
        ({}, ["recipe.rounds=two"], "recipe.rounds='two': "),
        ({}, ["evaluate.retention=[stage:generate]"], "evaluate.retention: `stage:` has no place in a list"),
    ],
)  # fmt: skip
def test_a_slip_is_said_in_the_users_own_keys(
    names: dict[str, Any], overrides: list[str], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        instances(names, *overrides)


def test_an_instance_has_the_class_of_its_stage_or_one_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_dpo.py").write_text(
        "from rlhf.stages.dpo import DpoStage\n\nclass OwnStage(DpoStage):\n    title = 'Own'\n"
    )
    assert type(instances({"dpo@x": {}}, "stage=dpo@x").stages["dpo@x"]) is DpoStage
    found = instances({"dpo@x": {"_target_": "own_dpo.OwnStage"}}, "stage=dpo@x").stages
    assert [(type(found[name]).__name__, found[name].full_title) for name in ("dpo", "dpo@x")] == [
        ("DpoStage", "DPO"), ("OwnStage", "Own x"),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"dpo@x\._target_=nonsense: write MODULE.CLASS"):
        instances({"dpo@x": {"_target_": "nonsense"}}, "stage=dpo@x")


def test_a_slip_in_an_instances_name_is_no_new_instance() -> None:
    with pytest.raises(ConfigError, match=r"dpo@4: no stage of this run .* There are: .*To run it, name it"):
        on_command_line("recipe=iterated_dpo", "dpo@4.beta=0.2")
    on_command_line("recipe=iterated_dpo", "stage=dpo@2", "dpo@3.beta=0.2")


def test_a_prompt_cannot_be_of_rows_that_are_not_there_yet() -> None:
    with pytest.raises(ConfigError, match=r"ppo.prompts=dpo.data: rows of stage:generate@x are not there"):
        instances(
            {"generate@x": {"policy": "base"}}, "dpo.data=stage:generate@x", "ppo.prompts=dpo.data",
            "generate.policy=base", "stage=dpo",
        )  # fmt: skip
