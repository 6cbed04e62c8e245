"""How two configs differ: what counts, what belongs together, and what is gone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from helpers.chains import Chain
from helpers.experiments import compose
from rlhf.bisect.differences import MISSING, Difference, Side, differences, downstream, with_differences
from rlhf.config import ConfigError
from rlhf.digests import Recipe
from rlhf.pipeline.experiment import build_experiment
from rlhf.pipeline.key import external_digests
from rlhf.pipeline.recipe import hydra_argument
from rlhf.pipeline.store import Store


def side(name: str, *overrides: str, recipes: dict[str, Recipe] | None = None) -> Side:
    assert name in ("good", "bad")
    experiment = build_experiment(compose("model=tiny", "stage=evaluate", *overrides))
    return Side("good" if name == "good" else "bad", experiment, recipes or {})


def found(tmp_path: Path, good: tuple[str, ...], bad: tuple[str, ...]) -> dict[str, Difference]:
    sides = side("good", *good), side("bad", *bad)
    return {each.name: each for each in differences(*sides, Store(tmp_path), "evaluate", ())}


def test_what_is_in_no_key_or_only_evaluates_is_no_difference(tmp_path: Path) -> None:
    bad = (
        "sft.micro_batch_tokens=512", "ppo.gates.kl=null", "checkpoint.keep=3", "run_name=other",
        "evaluate.num_prompts=3", "evaluate.temperature=2.5", "grpo.steps=3", "zero=zero2",
        "sft.optim.lr=0.001", "sweep.trials=3",
    )  # fmt: skip
    assert not found(tmp_path, ("sft.optim.lr=1e-3",), bad)


def test_keys_of_the_chain_are_named_as_they_are_typed_in_its_order(tmp_path: Path) -> None:
    bad = ("ppo.kl.coef=0.2", "seed=3", "prepare.held_out_fraction=0.2", "ppo.peft=none", "sft.epochs=3")
    each = found(tmp_path, ("sft.epochs=2",), bad)
    assert [*each] == ["seed", "prepare.held_out_fraction", "sft.epochs", "ppo.peft", "ppo.kl.coef"]
    assert each["ppo.kl.coef"].words == "0.05 -> 0.2"
    assert [one.group for one in each.values()] == ["seed", "prepare", "sft", "ppo", "ppo"]


def test_a_key_that_repeats_another_belongs_to_it(tmp_path: Path) -> None:
    (each,) = found(tmp_path, (), ("ppo.max_new_tokens=9",)).values()
    assert each.name == "ppo.max_new_tokens"
    assert {*each.values} == {
        ("ppo", "max_new_tokens"), ("generate", "max_new_tokens"), ("prepare", "response_tokens"),
    }  # fmt: skip
    assert each.touches == {"ppo", "generate", "prepare"}
    apart = found(tmp_path, (), ("ppo.max_new_tokens=9", "prepare.response_tokens=7"))
    assert {*apart} == {"ppo.max_new_tokens", "prepare.response_tokens"}


def test_a_source_of_rows_and_the_base_model_are_single_differences(tmp_path: Path) -> None:
    model = ("model=local", "model.path=somewhere", "model.chat_template=plain")
    rows = "reward.pairs={samples: pairs, limit: 9}"
    each = found(tmp_path, (), (rows,))
    assert each["reward.pairs"].touches == {"prepare", "reward"}
    named = differences(side("good"), side("bad", *model), Store(tmp_path), "evaluate", ())
    assert [one.name for one in named if one.group == "model"] == ["model", "model.chat_template"]
    assert {place[1] for place in named[0].values} == {"kind", "path"}


@pytest.mark.parametrize(
    ("chain", "key", "readers"),
    [
        (("dpo.data=null", "dpo.init=base", "evaluate.policies=[base,dpo]"), "reward.pairs", {"dpo"}),
        (
            (
                "grpo.reward=vader",
                "grpo.score.normalize=running",
                "evaluate.policies=[base,sft,grpo]",
                "evaluate.subject=grpo",
            ),
            "ppo.prompts",
            {"grpo"},
        ),
        (
            ("ppo.prompts=sft.data", "ppo.init=base", "ppo.reward=vader", "ppo.critic.init=auto"),
            "sft.data",
            {"ppo", "generate"},
        ),
    ],
)
def test_rows_that_a_stage_reads_by_the_key_of_another_are_a_difference(
    tmp_path: Path, chain: tuple[str, ...], key: str, readers: set[str]
) -> None:
    rows = ("sft.data=s.jsonl", "reward.pairs=p.jsonl", "ppo.prompts=q.jsonl", "evaluate.prompts=e.jsonl")
    good = (*rows, "evaluate.gold=vader", "evaluate.reward=null", "evaluate.init=base", *chain)
    each = found(tmp_path, good, (*good, f"{key}=other.jsonl"))
    assert {*each} == {key}
    assert each[key].touches == {"prepare", *readers}


def test_keys_of_a_named_instance_are_put_into_its_own_keys(tmp_path: Path) -> None:
    chain = ("recipe=iterated_dpo", "evaluate.gold=vader", "evaluate.subject=dpo@2")
    good, bad = side("good", *chain), side("bad", *chain, hydra_argument("dpo@2.beta=0.7"), "dpo.optim.lr=3")
    each = {one.name: one for one in differences(good, bad, Store(tmp_path), "evaluate", ())}
    assert {*each} == {"dpo@2.beta", "dpo.optim.lr"}
    assert each["dpo@2.beta"].values == {("instances", "dpo@2", "beta"): (MISSING, 0.7)}
    assert each["dpo@2.beta"].words == "that of dpo -> 0.7"
    changed = build_experiment(with_differences(good.experiment.resolved, [each["dpo@2.beta"]]))
    assert [dict(changed.stages[name])["beta"] for name in ("dpo", "dpo@2")] == [0.1, 0.7]


def test_a_config_with_all_differences_builds_the_bad_run(tmp_path: Path) -> None:
    typed = ("sft.epochs=3", "ppo.init=base", "ppo.peft=none", "ppo.max_new_tokens=9", "seed=4")
    good, bad = side("good"), side("bad", *typed)
    all_of_them = differences(good, bad, Store(tmp_path), "evaluate", ())
    rebuilt = build_experiment(with_differences(good.experiment.resolved, all_of_them))
    for name in ("prepare", "sft", "reward", "generate", "ppo"):
        assert rebuilt.stages[name] == bad.experiment.stages[name]
    assert rebuilt.settings.seed == 4
    assert with_differences(good.experiment.resolved, []) == good.experiment.resolved


def test_what_is_downstream_is_changed_too() -> None:
    chain = side("good").experiment.stages
    assert downstream({"prepare", "reward"}, chain) >= {"prepare", "reward", "ppo", "evaluate"}
    assert "sft" not in downstream({"prepare", "reward"}, chain)


class Files:
    """Two runs that read the same file, whose content may change between them."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.store = directory, Store(directory / "store")
        Chain(directory)
        self.path = directory / "sft.jsonl"

    def write(self, word: str) -> None:
        rows = [{"prompt": f"Say {n}", "completion": word} for n in range(24)]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(self, name: str, *overrides: str) -> Side:
        typed = (
            f"sft.data={self.path}", f"reward.pairs={self.directory / 'pairs.jsonl'}",
            f"evaluate.prompts={self.directory / 'evaluation.jsonl'}", "evaluate.gold=vader", *overrides,
        )  # fmt: skip
        chain = side(name, *typed).experiment.stages
        digests = external_digests(chain["prepare"], chain, self.store.directory_digest)
        recipe: Recipe = {"stage": "prepare", "external": digests}
        return side(name, *typed, recipes={"prepare": recipe})

    def between(self, good: Side, bad: Side) -> list[Difference]:
        return differences(good, bad, self.store, "evaluate", ())


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_other_rows_under_the_same_name_are_a_difference_of_which_one_side_is_gone(files: Files) -> None:
    files.write("a")
    good = files.run("good")
    files.write("b")
    (each,) = files.between(good, files.run("bad"))
    assert (each.name, each.words, each.lost) == ("sft.data", "other content, same name", "good")
    assert "sft" in each.touches and not each.values


def test_the_same_rows_in_another_file_are_no_difference(files: Files) -> None:
    files.write("a")
    good, copy = files.run("good"), files.directory / "copy.jsonl"
    shutil.copy(files.path, copy)
    bad = files.run("bad", f"sft.data={copy}", "sft.epochs=3")
    assert [each.name for each in files.between(good, bad)] == ["sft.epochs"]
    limited = files.run("bad", f"sft.data={{path: {copy}, limit: 9}}")
    assert [each.name for each in files.between(good, limited)] == ["sft.data"]


def test_an_earlier_file_that_is_gone_marks_its_key(files: Files) -> None:
    files.write("a")
    bad = files.run("bad")
    other = files.directory / "other.jsonl"
    shutil.copy(files.path, other)
    good = files.run("good", f"sft.data={other}")
    other.unlink()
    (each,) = files.between(good, bad)
    assert (each.name, each.lost) == ("sft.data", "good") and each.values


def test_if_neither_run_can_be_repeated_or_the_judge_has_changed_it_is_refused(files: Files) -> None:
    files.write("a")
    good, bad = files.run("good"), files.run("bad", "sft.epochs=9")
    files.write("c")
    with pytest.raises(ConfigError, match=r"sft\.data: its content is no longer that of both runs"):
        files.between(good, bad)
    files.write("a")
    assert [each.name for each in files.between(good, bad)] == ["sft.epochs"]
    (files.directory / "evaluation.jsonl").write_text('{"prompt": "Another?"}\n')
    with pytest.raises(ConfigError, match=r"evaluate\.prompts: .* the good run, and it judges"):
        files.between(good, bad)
