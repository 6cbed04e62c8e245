"""What a run does otherwise than one that worked, and what the verdict makes of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from helpers.chains import Chain
from helpers.experiments import build
from helpers.store import manifest
from rlhf.evaluation.sampled import Sampled
from rlhf.pipeline.defaults import Change
from rlhf.pipeline.graph import in_order
from rlhf.pipeline.key import knobs
from rlhf.pipeline.run import Run
from rlhf.pipeline.stage import Stage
from rlhf.pipeline.store import write_manifest
from rlhf.report import verdict as judging
from rlhf.report.against import worked_before

STAGES = ("prepare", "sft", "reward", "generate", "ppo", "evaluate")
UP, UNKNOWN = Sampled(0.5, 0.4, 0.6, 96), Sampled(0.02, -0.1, 0.14, 96)
EXTERNAL = {"prepare": {"sft": "s1", "pairs": "p1", "ppo": "q1", "names": "n1"}, "evaluate": {"vader": "3.3"}}


def verdict(run: Run) -> str:
    """In one line."""
    return judging.verdict(run).replace("\n", " ")


@pytest.fixture(scope="module")
def chain() -> dict[str, Stage]:
    stages = in_order(build().stages)
    return {name: stages[name] for name in STAGES}


def recipes_of(chain: Mapping[str, Stage]) -> dict[str, Any]:
    """As `Experiment` makes them; digests are words here."""
    found: dict[str, Any] = {
        name: {
            "stage": name, "version": stage.version, "knobs": deepcopy(knobs(stage)), "inputs": {},
            "external": dict(EXTERNAL.get(name, {})), "seed": 0, "dtype": "float32", "model": "m1",
        }
        for name, stage in chain.items()
    }  # fmt: skip
    found["prepare"]["knobs"]["response_tokens"] = 40
    return found


def write(
    directory: Path, chain: Mapping[str, Stage], recipes: Mapping[str, Any], gold: Sampled, outcome: str,
    changed: Mapping[str, str] | None = None, level: float | None = None, **told: float,
) -> Run:  # fmt: skip
    """A finished run with these recipes, of which SFT, the reward model and PPO improved.

    Args:
        level: PPO's mean gold score.
        told: figures of SFT, such as its tokens, and of `evaluate`, such as PPO's perplexity.
    """
    run = Run(directory, chain=chain)
    run.stages = {name: {"metrics": {}} for name in recipes}
    for name, metric, value in (
        ("sft", "held_out_loss_change", Sampled(-0.5, -0.6, -0.4, 96)),
        ("reward", "accuracy_over_baseline", UP), ("ppo", "held_out_score_gain", UP),
        ("evaluate", "gold_gain/ppo", gold),
    ):  # fmt: skip
        if name in run.stages:
            figures = value.metrics(metric)
            run.stages[name]["metrics"] = {f"{name}/{metric}": each for metric, each in figures.items()}
    if level is not None:
        levels = {"evaluate/gold_mean/ppo": level, "evaluate/gold_deviation/ppo": 0.5}
        run.stages["evaluate"]["metrics"] |= levels
    if "perplexity" in told:
        known = told["perplexity"]
        figures = Sampled(known, known - 3, known + 3, 226).metrics("perplexity/ppo")
        run.stages["evaluate"]["metrics"] |= {f"evaluate/{name}": each for name, each in figures.items()}
        run.stages["sft"]["metrics"]["sft/tokens"] = told["tokens"]
    run.changed = [
        Change(key=key, default="as packaged", value=value) for key, value in (changed or {}).items()
    ]
    for name, recipe in recipes.items():
        artifact = directory / "artifacts" / name
        artifact.mkdir(parents=True)
        write_manifest(artifact, manifest(name, recipe=recipe))
    judged_by = "gold_gain" if "evaluate" in recipes else "held_out_loss_change"
    content = {
        "stages": run.stages, "outcome": outcome, "judged_by": judged_by, "changed": run.changed,
    }  # fmt: skip
    (directory / "summary.json").write_text(json.dumps(content))
    return run


def fault(recipes: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The recipes with one value changed."""
    found = deepcopy(recipes)
    *parts, last = path.split("/")
    at = found
    for part in parts:
        at = at[part]
    assert at.get(last) != value
    at[last] = value
    return found


def spoiled(runs: Path, chain: Mapping[str, Stage], path: str, value: Any, **changes: Any) -> Run:
    """A run with a fault, beside one without."""
    recipes = recipes_of(chain)
    write(runs / "good", chain, recipes, UP, "worked")
    return write(runs / "bad", chain, fault(recipes, path, value), UNKNOWN, "cannot be told", **changes)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("sft/knobs/optim/lr", 0.1, "sft.optim.lr=0.1 (there: 3e-05)"),
        ("prepare/external/pairs", "p2", "reward.pairs (other rows)"),
        ("prepare/knobs/held_out_fraction", 0.9, "prepare.held_out_fraction=0.9 (there: 0.1)"),
        ("ppo/external/learned", "code", "ppo.reward=learned (another content)"),
        ("ppo/external/init", "d2", "ppo.init=sft (another content)"),
        ("prepare/external/my_rows", "c2", "prepare.my_rows (another content)"),
        ("sft/seed", 1, "seed=1 (there: 0)"),
        ("sft/dtype", "bfloat16", "precision=bfloat16 (there: float32)"),
        ("sft/model", "m2", "the base model"),
        ("sft/version", 1, "the version of rlhf"),
    ],
)
def test_the_only_difference_is_named(
    tmp_path: Path, chain: dict[str, Stage], path: str, value: Any, said: str
) -> None:
    run = spoiled(tmp_path, chain, path, value)
    assert f"Against run good, which worked, only {said} differs." in verdict(run)
    assert verdict(run).endswith(f"bisect good=good bad=bad runs_dir={tmp_path}")


def test_what_follows_from_another_difference_is_left_out(tmp_path: Path, chain: dict[str, Stage]) -> None:
    """generate and evaluate repeat PPO's key, and `prepare` counts with it."""
    recipes = recipes_of(chain)
    write(tmp_path / "good", chain, recipes, UP, "worked")
    for name in ("ppo", "generate", "evaluate"):
        recipes[name]["knobs"]["max_new_tokens"] = 3
    recipes["prepare"]["knobs"]["response_tokens"] = 3
    run = write(tmp_path / "bad", chain, recipes, UNKNOWN, "cannot be told")
    assert "which worked, only ppo.max_new_tokens=3 (there: 40) differs." in verdict(run)


def test_the_code_of_one_of_several_rewards_is_named_by_the_key_that_has_it(
    tmp_path: Path, chain: dict[str, Stage]
) -> None:
    recipes = recipes_of(chain)
    for name in ("ppo", "generate", "evaluate"):
        recipes[name]["knobs"]["reward"] = {"of": [{"source": "learned"}, {"source": "python:my:score"}]}
        recipes[name]["external"]["python:my:score"] = "old"
    write(tmp_path / "good", chain, recipes, UP, "worked")
    for name in ("ppo", "generate", "evaluate"):
        recipes[name]["external"]["python:my:score"] = "new"
    run = write(tmp_path / "bad", chain, recipes, UNKNOWN, "cannot be told")
    said = verdict(run)
    assert "Against run good, which worked, only ppo.reward={" in said
    assert '"python:my:score"}]} (another content) differs.' in said


def test_keys_of_the_base_model_are_named(tmp_path: Path, chain: dict[str, Stage]) -> None:
    run = spoiled(tmp_path, chain, "sft/model", "m2", changed={"model.chat_template": "odd.jinja"})
    said = "model.chat_template=odd.jinja (there: as packaged)"
    assert f"Against run good, which worked, only {said} differs." in verdict(run)


def test_what_nobody_typed_is_worked_out_from_what_was(tmp_path: Path, chain: dict[str, Stage]) -> None:
    """With a directory of one's own as PPO's start, `auto` compares other policies."""
    recipes = recipes_of(chain)
    write(tmp_path / "good", chain, recipes, UP, "worked", {"ppo.steps": "8"})
    for name, knob in (("ppo", "init"), ("generate", "policy"), ("evaluate", "init")):
        recipes[name]["knobs"][knob], recipes[name]["external"]["init"] = "directory", "d1"
    recipes["evaluate"]["knobs"]["policies"] = ["base", "init", "ppo"]
    run = write(
        tmp_path / "bad",
        chain,
        recipes,
        UNKNOWN,
        "cannot be told",
        {"ppo.steps": "8", "ppo.init": "mine/4bit"},
    )
    said = "ppo.init=mine/4bit (there: as packaged)"
    assert f"Against run good, which worked, only {said} differs." in verdict(run)


def test_a_whole_section_that_was_typed_stands_for_its_parts(tmp_path: Path, chain: dict[str, Stage]) -> None:
    recipes = recipes_of(chain)
    write(tmp_path / "good", chain, recipes, UP, "worked")
    recipes["sft"]["knobs"]["peft"] = {"method": "lora", "rank": 1}
    run = write(tmp_path / "bad", chain, recipes, UNKNOWN, "cannot be told", {"sft.peft": "lora"})
    assert "which worked, only sft.peft=lora (there: as packaged) differs." in verdict(run)


def test_several_differences_are_listed(tmp_path: Path, chain: dict[str, Stage]) -> None:
    recipes = fault(recipes_of(chain), "sft/knobs/epochs", 9.0)
    write(tmp_path / "good", chain, recipes_of(chain), UP, "worked")
    run = write(tmp_path / "bad", chain, fault(recipes, "ppo/knobs/steps", 1), UNKNOWN, "cannot be told")
    said = "sft.epochs=9.0 (there: 2.0) and ppo.steps=1 (there: 12)"
    assert f"Against run good, which worked, only {said} differ." in verdict(run)


def test_the_run_that_differs_least_is_taken_and_of_several_the_newest(
    tmp_path: Path, chain: dict[str, Stage]
) -> None:
    recipes = recipes_of(chain)
    far = fault(fault(recipes, "sft/knobs/epochs", 5.0), "reward/knobs/epochs", 7)
    for age, (name, each, outcome) in enumerate(
        [("far", far, "worked"), ("newest", recipes, "worked"), ("older", recipes, "worked"),
         ("failed", recipes, "did not work")]
    ):  # fmt: skip
        write(tmp_path / name, chain, each, UP, outcome)
        os.utime(tmp_path / name / "summary.json", (10_000 - age, 10_000 - age))
    run = write(tmp_path / "bad", chain, fault(recipes, "sft/knobs/epochs", 9.0), UNKNOWN, "cannot be told")
    found = worked_before(run)
    assert found is not None and found.name == "newest"


def test_other_experiments_and_ruins_are_left_aside(tmp_path: Path, chain: dict[str, Stage]) -> None:
    recipes = recipes_of(chain)
    other = deepcopy(recipes)
    for number, key in enumerate(("lr", "eps", "weight_decay", "warmup_fraction", "max_grad_norm")):
        other["sft"]["knobs"]["optim"][key] = 0.5 + number
    write(tmp_path / "other", chain, other, UP, "worked")
    write(tmp_path / "the_same", chain, recipes, UP, "worked")
    write(tmp_path / "sft_alone", chain, {name: recipes[name] for name in STAGES[:2]}, UP, "worked")
    gone = write(tmp_path / "gone", chain, fault(recipes, "ppo/knobs/steps", 1), UP, "worked")
    (gone.directory / "artifacts" / "ppo" / "manifest.json").unlink()
    torn = write(tmp_path / "torn_manifest", chain, fault(recipes, "ppo/knobs/steps", 1), UP, "worked")
    (torn.directory / "artifacts" / "ppo" / "manifest.json").write_text("[1]")
    old = {name: {"stage": name} for name in STAGES}
    write(tmp_path / "of_another_version", chain, old, UP, "worked")
    null = write(tmp_path / "null", chain, fault(recipes, "ppo/knobs/steps", 1), UP, "worked")
    (null.directory / "artifacts" / "sft" / "manifest.json").write_text("null")
    for name, text in (
        ("torn", '{"stages": {'), ("list", "[]"), ("foreign", '{"outcome": "worked"}'),
        ("as_list", '{"outcome": "worked", "stages": [1]}'), ("latin", '"\xe4"'),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(text)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    run = write(tmp_path / "bad", chain, recipes, UNKNOWN, "cannot be told")
    assert worked_before(run) is None
    assert "gainst run" not in verdict(run)


def test_real_recipes_are_compared(as_finished: Path, tmp_path: Path) -> None:
    """The same file with other rows, and a key; the summary of the run before is told that it worked."""
    chain = Chain(shutil.copytree(as_finished, tmp_path / "chain", symlinks=True))
    path = chain.directory / "runs" / "run1" / "summary.json"
    told = {"outcome": "worked", "judged_by": "held_out_loss_change"}
    path.write_text(json.dumps(json.loads(path.read_text()) | told))

    def differs(name: str, *overrides: str) -> str:
        directory = chain.run("stage=sft", *overrides, f"run_name={name}").directory.parent / name
        summary = json.loads((directory / "summary.json").read_text())
        stages = in_order(build("model=tiny").stages)
        run = Run(directory, summary["stages"], chain=stages, changed=summary["changed"])
        return str(worked_before(run))

    assert differs("faster", "sft.optim.lr=2e-3") == (
        "against run run1, which worked, only sft.optim.lr=0.002 (there: 0.001) differs."
    )
    chain.write("sft.jsonl", [{"prompt": f"Say {n}", "completion": "No."} for n in range(24)])
    assert differs("other") == "against run run1, which worked, only sft.data (other rows) differs."


@pytest.mark.parametrize("key", ["gold", "judge", "reward"])
def test_a_run_with_another_judge_does_not_count(tmp_path: Path, chain: dict[str, Stage], key: str) -> None:
    recipes = recipes_of(chain)
    write(tmp_path / "code", chain, fault(recipes, "evaluate/external/vader", "4.0"), UP, "worked")
    write(tmp_path / "good", chain, fault(recipes, f"evaluate/knobs/{key}", "python:mine:f"), UP, "worked")
    assert worked_before(write(tmp_path / "bad", chain, recipes, UNKNOWN, "cannot be told")) is None


@pytest.mark.parametrize("name", ["bisect-good-bad-03", "ceiling-good-01"])
def test_a_trial_of_a_search_is_not_proposed(tmp_path: Path, chain: dict[str, Stage], name: str) -> None:
    """It differs in few keys by its nature, and the user did not run it."""
    write(tmp_path / name, chain, fault(recipes_of(chain), "sft/knobs/epochs", 9.0), UP, "worked")
    bad = write(tmp_path / "bad", chain, recipes_of(chain), UNKNOWN, "cannot be told")
    assert worked_before(bad) is None


def test_a_run_that_judged_itself_did_not_work(tmp_path: Path, chain: dict[str, Stage]) -> None:
    """As all runs did before `judged_by` was written down."""
    other = write(tmp_path / "other", chain, fault(recipes_of(chain), "sft/knobs/epochs", 9.0), UP, "worked")
    bad = write(tmp_path / "bad", chain, recipes_of(chain), UNKNOWN, "cannot be told")
    assert worked_before(bad) is not None
    path = other.directory / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"judged_by": None}))
    assert worked_before(bad) is None
