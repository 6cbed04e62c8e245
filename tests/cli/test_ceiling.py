"""`ceiling` on a small chain: which parts it replaces, how the table ends, and what it cannot replace."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.chains import Chain, Outcome, run_main
from rlhf.cli.ceiling import Gain, conclusion
from rlhf.evaluation.sampled import Sampled
from rlhf.pipeline.run import Run

REWARD = """
def length(messages, responses):
    return [float(len(text)) for text in responses]

def letters(messages, responses):
    return [float(sum(each.isascii() and each.isalpha() for each in text)) for text in responses]
"""
CHAIN = (
    "stage=evaluate", "ppo.reward=python:scoring:length", "evaluate.gold=python:scoring:letters",
    "ppo.score.normalize=running", "ppo.critic.init=sft", "gates=warn", "evaluate.num_prompts=8",
    "evaluate.prompts=many.jsonl", "evaluate.best_of=3",
)  # fmt: skip


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    made = Chain(tmp_path_factory.mktemp("ceiling"))
    made.write("many.jsonl", [{"prompt": f"What is {n}?", "answer": f"{n}"} for n in range(40)])
    (made.directory / "scoring.py").write_text(REWARD)
    outcome = made.run(*CHAIN)
    assert outcome.code == 0, outcome.err
    return made


@pytest.fixture(scope="module")
def later(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """A run whose last policy, without a critic, starts from PPO's."""
    made = Chain(shutil.copytree(chain.directory, tmp_path_factory.mktemp("later") / "chain", symlinks=True))
    outcome = made.run(
        *CHAIN, "grpo.init=ppo", "grpo.steps=2", "grpo.batch_episodes=8", "grpo.minibatch_episodes=8",
        "evaluate.policies=[base,sft,ppo,grpo]", "evaluate.subject=grpo", "run_name=later",
        "evaluate.gold={source: verify:regex, args: {pattern: a}}",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    return made


def say(chain: Chain, *words: str, code: int = 0) -> Outcome:
    outcome = run_main(chain.directory, ("ceiling", *words), chain.directory)
    assert outcome.code == code, f"{outcome.code}\n{outcome.out}\n{outcome.err}"
    return outcome


def parts_of(chain: Chain, name: str) -> dict[str, dict[str, Any]]:
    content = json.loads((chain.directory / "runs" / name / "ceiling.json").read_text())
    return {each["part"]: each for each in content["parts"]}


def trial(chain: Chain, number: int) -> Outcome:
    return Outcome(0, "", "", chain.directory / "runs" / f"ceiling-run1-0{number}")


def compared(chain: Chain, run: str) -> list[dict[str, Any]]:
    """A run's evaluation prompts, each with the policies' answers."""
    path = chain.directory / "runs" / run / "artifacts" / "evaluate" / "comparison.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_part_is_replaced_and_only_what_is_downstream_is_made(chain: Chain) -> None:
    planned = say(chain, "run1", "dry_run=true").out
    assert all(
        words in planned for words in ("ppo.init=base", "ppo.reward=python:scoring:letters", "best of 3")
    )
    assert not (chain.directory / "runs" / "ceiling-run1").exists()
    told = say(chain, "run1")
    assert "Trial 4 of at most 4: prompts replaced: 32 prompts of evaluate that are not asked" in told.out
    parts = parts_of(chain, "ceiling-run1")
    assert {*parts} == {"sft", "reward", "policy gradient", "prompts", "(policy base)", "(policy sft)"}
    assert all(each["result"] in ("restores", "cannot tell", "is worse") for each in parts.values())
    assert [trial(chain, number).statuses["sft"] for number in (2, 3, 4)] == ["reused"] * 3
    assert "ppo" in trial(chain, 1).statuses and trial(chain, 1).statuses["ppo"] == "ran"
    assert trial(chain, 2).statuses["ppo"] == "ran"
    assert "ppo" not in trial(chain, 3).statuses, "best of n needs no policy that learned from scores"
    assert trial(chain, 4).statuses["ppo"] == "ran"
    assert (
        "| policy gradient | the best of 3 answers by the same reward |"
        in (chain.directory / "runs" / "ceiling-run1" / "ceiling.md").read_text()
    )


def test_a_replacement_that_restores_is_the_first_row(chain: Chain) -> None:
    """Best of three by its length: an answer of the start that has more letters too."""
    say(chain, "run1")
    rows = [*parts_of(chain, "ceiling-run1").values()][:4]
    gains = [float(each["gain"].partition(" ")[0]) for each in rows]
    assert gains == sorted(gains, reverse=True)


def test_the_last_line_says_where_to_look_first(chain: Chain) -> None:
    out = say(chain, "run1").out
    best = next(iter(parts_of(chain, "ceiling-run1").values()))
    line = "No replacement is shown to be better than what the run has."
    if best["result"] == "restores":
        line = f"Look first at {best['part']}: "
    assert line in out
    assert line in (chain.directory / "runs" / "ceiling-run1" / "ceiling.md").read_text()


@pytest.mark.parametrize(
    ("gains", "told"),
    [
        ({"sft": (0.1, 0.0, 0.2), "reward": (0.3, 0.2, 0.4), "prompts": (0.2, 0.1, 0.3)}, "at reward:"),
        ({"sft": (0.5, -0.1, 1.1), "reward": (0.3, 0.2, 0.4)}, "at reward:"),
        ({"sft": (0.5, -0.1, 1.1), "reward": (-0.3, -0.4, -0.2)}, "(evaluate.num_prompts)."),
        ({"sft": (-0.3, -0.4, -0.2)}, "is shown to be better than what the run has."),
        ({}, "is shown to be better than what the run has."),
    ],
)
def test_only_what_is_shown_is_where_to_look(gains: dict[str, tuple[float, float, float]], told: str) -> None:
    results = {part: Gain(Sampled(*gain, 8)) for part, gain in gains.items()}
    line = conclusion("evaluate", results | {"policy gradient": "cannot run: no prompts"})
    assert told in line
    assert told == "at reward:" or line.endswith(told)


def test_the_best_answers_are_compared_with_those_of_the_policy(chain: Chain) -> None:
    say(chain, "run1")
    best, own = ([row[name]["gold"] for row in compared(chain, run)] for name, run in (
        ("best_of_n", "ceiling-run1-03"), ("ppo", "run1")
    ))  # fmt: skip
    gain = (sum(best) - sum(own)) / len(own)
    assert gain != 0
    assert parts_of(chain, "ceiling-run1")["policy gradient"]["gain"].startswith(f"{gain:+.3f} (95%: ")


def test_the_trials_learn_from_what_they_should(chain: Chain) -> None:
    say(chain, "run1")
    recipes = {
        number: json.loads((trial(chain, number).artifact("ppo") / "manifest.json").read_text())["recipe"]
        for number in (1, 2, 4)
    }
    assert recipes[1]["knobs"]["init"] == "base"
    assert recipes[2]["knobs"]["reward"] == "python:scoring:letters"
    directory = chain.directory / "runs" / "ceiling-run1"
    practised = [json.loads(line) for line in (directory / "not_asked.jsonl").read_text().splitlines()]
    asked = [json.loads(line) for line in (directory / "asked.jsonl").read_text().splitlines()]
    assert (len(practised), len(asked)) == (32, 8)
    assert all({*row} == {"prompt", "answer"} for row in (*practised, *asked)), "columns are kept for rewards"
    for number in (1, 2, 3, 4):
        rows = compared(chain, f"ceiling-run1-0{number}")
        prompts = [row["prompt"][0]["content"] for row in rows]
        assert prompts == [row["prompt"] for row in asked], "every trial is asked the same"
        asks = {name for row in rows for name in row if isinstance(row[name], dict)}
        assert asks == {"best_of_n" if number == 3 else "ppo"}, "a trial asks only the policy that is judged"


def test_the_same_command_again_makes_nothing(chain: Chain) -> None:
    say(chain, "run1")
    made = {path: path.stat().st_mtime_ns for path in chain.directory.glob("store/*/*/manifest.json")}
    say(chain, "run1")
    assert made == {path: path.stat().st_mtime_ns for path in chain.directory.glob("store/*/*/manifest.json")}


def test_what_cannot_be_replaced_is_said(chain: Chain, tmp_path: Path) -> None:
    other = Chain(shutil.copytree(chain.directory, tmp_path / "chain", symlinks=True))
    outcome = other.run(
        "stage=evaluate", "evaluate.policies=[base,sft]", "evaluate.subject=sft", "evaluate.init=base",
        "evaluate.reward=null", "evaluate.gold=python:scoring:letters", "gates=warn", "run_name=only_sft",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    say(other, "only_sft")
    parts = parts_of(other, "ceiling-only_sft")
    assert parts["start"]["gain"] == "sft starts from no stage's model"
    assert parts["prompts"]["gain"] == "sft learns from no prompts"
    assert parts["(policy base)"]["result"] in ("restores", "cannot tell", "is worse")


def test_a_later_policy_is_compared_with_the_best_of_its_own_start(later: Chain) -> None:
    say(later, "later")
    trials = [later.directory / "runs" / f"ceiling-later-0{number}" for number in (1, 2, 3, 4)]
    starts = [yaml.safe_load((each / "config.yaml").read_text())["evaluate"]["init"] for each in trials]
    assert starts == ["sft", "sft", "ppo", "sft"], "best of n is that of what grpo started from"


def test_prompts_that_are_those_of_ppo_are_replaced_too(later: Chain) -> None:
    say(later, "later")
    assert parts_of(later, "ceiling-later")["prompts"]["result"] != "no trial"
    config = yaml.safe_load((later.directory / "runs" / "ceiling-later-04" / "config.yaml").read_text())
    assert config["ppo"]["prompts"].endswith("runs/ceiling-later/not_asked.jsonl")


def test_what_replaces_a_part_is_said_as_it_is_typed(later: Chain) -> None:
    typed = "grpo.reward={source: verify:regex, args: {pattern: a}}"
    assert typed in say(later, "later", "dry_run=true").out


def test_files_and_code_that_have_changed_are_refused_before_any_trial(later: Chain, tmp_path: Path) -> None:
    """Prompts that only ppo.prompts names, and that grpo learns from; the code of two rewards; a file."""
    other = Chain(shutil.copytree(later.directory, tmp_path / "chain", symlinks=True))
    own, changed = other.directory / "prompts.jsonl", other.directory / "other.jsonl"
    say(other, "later", "dry_run=true")
    changed.write_text(own.read_text().replace("Tell", "Show"))
    shutil.copy(changed, own)
    fix = "Put it back, or run its command again."
    said = say(other, "later", code=2).err
    assert said == f"Error: ppo.prompts: the content is no longer that of later. {fix}\n"
    own.unlink()
    assert f"ppo.prompts=prompts.jsonl: there is no such file (looked in {other.directory})" in (
        say(other, "later", code=2).err
    )


def test_a_reward_whose_code_has_changed_is_refused(chain: Chain, tmp_path: Path) -> None:
    other = Chain(shutil.copytree(chain.directory, tmp_path / "chain", symlinks=True))
    (other.directory / "scoring.py").write_text(REWARD.replace("len(text)", "-len(text)"))
    written = other.directory / "runs" / "ceiling-run1" / "ceiling.md"
    written.parent.mkdir(exist_ok=True)
    written.write_text("an earlier result")
    keys = "evaluate.gold, evaluate.reward, ppo.reward"  # one file has them all
    for words in ((), ("dry_run=true",)):
        said = say(other, "run1", *words, code=2).err
        assert f"{keys}: the content is no longer that of run1. Put it back, or run its command" in said
    assert written.read_text() == "an earlier result"


def test_a_directory_whose_name_no_trial_can_have_is_refused_once(chain: Chain, tmp_path: Path) -> None:
    other = Chain(shutil.copytree(chain.directory, tmp_path / "chain", symlinks=True))
    (other.directory / "runs" / "run1").rename(other.directory / "runs" / "my run (1)")
    for words in ((), ("dry_run=true",)):
        said = say(other, "my run (1)", *words, code=2)
        assert "ceiling-my run (1): trials are called so, and a run's name has only letters" in said.err
        assert "Rename the run's directory." in said.err and not said.out


def test_an_evaluation_that_is_no_longer_in_the_store_is_said(chain: Chain, tmp_path: Path) -> None:
    other = Chain(shutil.copytree(chain.directory, tmp_path / "chain", symlinks=True))
    shutil.rmtree((other.directory / "runs" / "run1" / "artifacts" / "evaluate").resolve())
    said = say(other, "run1", code=2).err
    assert "ceiling run1: the artifact of its evaluate is no longer there." in said
    assert "Put it back, or run its command again." in said


def test_the_same_command_twice_at_once_names_no_key_that_it_lacks(chain: Chain) -> None:
    with Run(chain.directory / "runs" / "ceiling-run1").locked():
        said = say(chain, "run1", code=2).err
    assert said.startswith("Error: ceiling-run1: this ceiling is already going on (pid ")
    assert "run_name" not in said and said.endswith("Wait for its end.\n")


def test_a_policy_that_few_held_out_prompts_left_as_it_started_judges_no_part(later: Chain) -> None:
    """Four held-out prompts, of which two choose: `grpo` is what it started from, and so in its trials."""
    say(later, "later")
    why = "; the policy is what grpo started from: too few held-out prompts chose among its steps"
    parts = parts_of(later, "ceiling-later")
    summary = json.loads((later.directory / "runs" / "ceiling-later-04" / "summary.json").read_text())
    assert summary["stages"]["grpo"]["metrics"]["grpo/best_step"] == 0
    assert parts["prompts"]["gain"].endswith(why) and parts["prompts"]["result"] == "cannot tell"
    assert why not in parts["policy gradient"]["gain"], "best of n learns nothing"
    lower = Sampled(-1.0, -1.5, -0.5, 24)
    assert (Gain(lower).word, Gain(lower, why).word) == ("is worse", "cannot tell")


def test_mistakes_are_named_in_the_users_words(chain: Chain) -> None:
    assert "name one run" in say(chain, code=2).err
    assert "ceiling run2: there is no such run in runs. Did you mean run1?" in say(chain, "run2", code=2).err
    assert "Did you mean dry_run?" in say(chain, "run1", "dry_runs=true", code=2).err
