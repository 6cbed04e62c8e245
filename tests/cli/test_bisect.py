"""`bisect` and `ceiling` on real runs of the tiny model, whose judge counts a letter that the rows teach."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.chains import Chain, Outcome, run_main
from helpers.warm import Command, KillAt

JUDGE = '''
import os, pathlib, signal

def share(messages, responses):
    """The share of a's. Stops the run once, if a file asks for it."""
    if pathlib.Path("interrupt").exists():
        pathlib.Path("interrupt").unlink()
        os.kill(os.getpid(), signal.SIGINT)
    return [text.count("a") / 8 for text in responses]
'''
SETTINGS = (
    "model=tiny", "device=cpu", "stage=[sft,evaluate]", "sft.epochs=4", "sft.batch_rows=8", "gates=warn",
    "sft.optim.lr=1e-2", "evaluate.prompts=asked.jsonl", "evaluate.num_prompts=12", "evaluate.init=base",
    "evaluate.policies=[base,sft]", "evaluate.subject=sft", "evaluate.reward=null", "ppo.max_new_tokens=8",
    "evaluate.gold=python:counting:share",
)  # fmt: skip
BAD = ("sft.data=b.jsonl", "sft.optim.weight_decay=0.01", "sft.turns=last", "seed=1")


class Runs:
    """Runs in a directory with a good and a bad file."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        chain = Chain(directory)
        for letter in "ab":
            rows = [{"prompt": f"Say {n}", "completion": letter * 8} for n in range(48)]
            chain.write(f"{letter}.jsonl", rows)
        chain.write("asked.jsonl", [{"prompt": f"What is {n}?"} for n in range(24)])
        (directory / "counting.py").write_text(JUDGE)

    def run(self, name: str, *overrides: str, code: int = 0) -> Outcome:
        arguments = [*SETTINGS, "sft.data=a.jsonl", f"run_name={name}", *overrides]
        outcome = run_main(self.directory, arguments, self.directory / "runs" / name)
        assert outcome.code == code, outcome.err
        return outcome

    def say(self, *words: str, code: int = 0) -> Outcome:
        outcome = run_main(self.directory, words, self.directory)
        assert outcome.code == code, f"{outcome.code}\n{outcome.out}\n{outcome.err}"
        return outcome

    def result(self, name: str, command: str = "bisect") -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.directory / "runs" / name / f"{command}.json").read_text())
        return found

    def statuses(self, trial: str) -> dict[str, str]:
        return Outcome(0, "", "", self.directory / "runs" / trial).statuses

    def trials(self, name: str) -> list[str]:
        return sorted(path.parent.name for path in self.directory.glob(f"runs/{name}-*/summary.json"))

    def made(self) -> dict[str, int]:
        """Artifact -> when its manifest was written."""
        return {str(path): path.stat().st_mtime_ns for path in self.directory.glob("store/*/*/manifest.json")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("bisect"))
    runs.run("good")
    runs.run("bad", *BAD)
    return runs


@pytest.fixture
def runs(finished: Runs, tmp_path: Path) -> Iterator[Runs]:
    """A copy, to which tests add what they like."""
    copy = Runs(tmp_path)
    for name in ("runs", "store"):
        shutil.copytree(finished.directory / name, tmp_path / name, symlinks=True)
    yield copy


def test_the_cause_is_found_and_shown_both_ways(runs: Runs) -> None:
    told = runs.say("bisect", "good=good", "bad=bad")
    result = runs.result("bisect-good-bad")
    assert result["found"] and result["causes"] == [["sft.data"]]
    assert [*result["differences"]] == ["seed", "sft.data", "sft.optim.weight_decay", "sft.turns"]
    answers = {tuple(each["put_in"]): each for each in result["trials"]}
    alone, without = answers[("sft.data",)], answers[("seed", "sft.optim.weight_decay", "sft.turns")]
    assert alone["answer"] == "bad" and alone["gain"]["high"] < -0.2
    assert without["answer"] == "good" and without["gain"]["low"] > alone["gain"]["high"]
    assert "Cause: sft.data (a.jsonl -> b.jsonl). Put in alone, it breaks the good run: -0." in told.out
    assert "Taken out, it mends the bad run: bad without sft.data: " in told.out
    assert "Trial 1 of at most 30: " in told.out and "for the rest" in told.out
    page = (runs.directory / "runs" / "bisect-good-bad" / "bisect.md").read_text()
    assert page.startswith("# bad against good\n") and "| good with sft.data | bad | -0." in page
    assert len(runs.trials("bisect-good-bad")) == len(answers) <= 6


def test_all_differences_together_are_no_cause_while_some_may_not_be_needed(runs: Runs) -> None:
    rows = [{"prompt": f"Say {n}", "completion": "a" * 8} for n in range(40)]
    Chain(runs.directory).write("fewer.jsonl", rows)
    runs.run("weak", "sft.data=fewer.jsonl", "sft.optim.lr=1e-7")
    told = runs.say("bisect", "good=good", "bad=weak", "budget=1", code=3)
    assert "Not found: no smaller cause than all differences was shown." in told.out
    assert "It takes sft.optim.lr: without it weak is good: " in told.out
    line = "Whether it takes sft.data for that cannot be told. Without it: not tried: budget=1 is spent."
    assert line in told.out
    assert "Put in alone" not in told.out and "Taken out" not in told.out
    assert not runs.result("bisect-good-weak")["found"]
    told = runs.say("bisect", "good=good", "bad=weak")
    assert runs.result("bisect-good-weak")["causes"] == [["sft.optim.lr"]]
    (trial,) = [each for each in runs.result("bisect-good-weak")["trials"] if each["put_in"] == ["sft.data"]]
    assert trial["answer"] == "good" and trial["over_half_way"]["low"] > 0
    number = len(runs.trials("bisect-good-weak"))
    told = runs.say("bisect", "good=good", "bad=weak", f"budget={number}")
    assert "is spent" not in told.out, "nothing was asked for that was not tried"


def test_a_plan_says_which_run_is_the_better_one(runs: Runs) -> None:
    told = runs.say("bisect", "good=bad", "bad=good", "dry_run=true").out
    assert "good is the better one. Exchange good= and bad=." in told and "time alone" not in told


def test_a_run_that_cannot_be_evaluated_is_named(runs: Runs) -> None:
    arguments = ["model=tiny", "stage=sft", "sft.data=a.jsonl", "run_name=only_sft"]
    assert run_main(runs.directory, arguments, runs.directory).code == 0
    told = runs.say("bisect", "good=good", "bad=only_sft", code=2).err
    assert "bad=only_sft: it cannot be evaluated like good. No data for" in told


def test_the_same_command_again_trains_nothing(runs: Runs) -> None:
    told = runs.say("bisect", "good=good", "bad=bad")
    before, result = runs.made(), runs.result("bisect-good-bad")
    again = runs.say("bisect", "good=runs/good", "bad=runs/bad")
    assert (runs.made(), runs.result("bisect-good-bad")) == (before, result)
    assert [line[8:] for line in again.out.splitlines()] == [line[8:] for line in told.out.splitlines()]


def test_what_is_not_downstream_is_reused(runs: Runs) -> None:
    runs.run("cut", "evaluate.gold=python:counting:share", "sft.turns=last", "sft.data=b.jsonl")
    runs.say("bisect", "good=good", "bad=cut")
    (first, *_) = runs.trials("bisect-good-cut")
    assert runs.statuses(first)["sft"] == "ran"
    assert {runs.statuses(name)["prepare"] for name in runs.trials("bisect-good-cut")} <= {"reused", "ran"}
    content = json.loads((runs.directory / "runs" / first / "summary.json").read_text())
    assert [*content["stages"]] == ["prepare", "sft", "evaluate"]


@pytest.mark.parametrize("trial", [1, 2])
def test_killed_it_goes_on_and_nothing_is_trained_twice(runs: Runs, trial: int) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    arguments, at = ["bisect", "good=good", "bad=bad"], KillAt(r"/sft/[0-9a-f]{16}$", count=trial)
    process = Command(arguments, cwd=runs.directory, environment=environment, kill_at=at)
    process.communicate(timeout=150)
    assert process.returncode == -signal.SIGKILL
    before = runs.made()
    assert sum("/sft/" in path for path in before) == 2 + trial
    runs.say(*arguments)
    assert before.items() <= runs.made().items()
    assert runs.result("bisect-good-bad")["causes"] == [["sft.data"]]


def test_after_ctrl_c_the_same_command_goes_on(runs: Runs) -> None:
    (runs.directory / "interrupt").touch()
    told = runs.say("bisect", "good=good", "bad=bad", code=130)
    assert "Interrupted. The same command continues" in told.err
    assert not (runs.directory / "runs" / "bisect-good-bad" / "bisect.json").exists()
    before = runs.made()
    runs.say("bisect", "good=good", "bad=bad")
    assert before.items() <= runs.made().items()


def test_a_dry_run_lists_trials_and_times_and_runs_none(runs: Runs) -> None:
    told = runs.say("bisect", "good=good", "bad=bad", "dry_run=true").out
    assert "good with sft.data" in told and "bad without sft.data" in told and "time alone" in told
    assert "If one difference is to blame: " in told
    assert not runs.trials("bisect-good-bad")
    assert not (runs.directory / "runs" / "bisect-good-bad").exists()


def test_a_bad_run_that_was_judged_in_another_way_is_judged_anew_like_the_good_one(runs: Runs) -> None:
    runs.run("other", "sft.data=b.jsonl", "evaluate.temperature=2.5", "evaluate.num_prompts=4")
    runs.say("bisect", "good=good", "bad=other")
    (only,) = runs.trials("bisect-good-other")
    assert runs.statuses(only) == {"prepare": "reused", "sft": "reused", "evaluate": "ran"}
    assert runs.result("bisect-good-other")["causes"] == [["sft.data"]]


def test_a_bad_run_that_a_failed_gate_ended_is_judged_too(runs: Runs) -> None:
    never = ("gates=enforce", "sft.gates.held_out_loss_change.max=-99")
    runs.run("failed", "sft.data=b.jsonl", *never, code=3)
    runs.say("bisect", "good=good", "bad=failed")
    assert runs.result("bisect-good-failed")["causes"] == [["sft.data"]]


def test_what_cannot_be_told_gets_more_prompts(runs: Runs) -> None:
    two = "evaluate.num_prompts=2"
    runs.run("few", two)
    runs.run("few_bad", two, *BAD)
    told = runs.say("bisect", "good=few", "bad=few_bad")
    assert ", 8 prompts. " in told.out, "two prompts do not tell, eight do"
    assert runs.result("bisect-few-few_bad")["causes"] == [["sft.data"]]


def test_a_few_more_prompts_are_not_worth_another_answer_of_all(runs: Runs) -> None:
    most = "evaluate.num_prompts=20"
    runs.run("most", most)
    runs.run("like", most, "sft.optim.weight_decay=1e-9")
    told = runs.say("bisect", "good=most", "bad=like", code=3)
    assert "24 prompts" not in told.out and ", seed 2. " in told.out


def test_too_few_prompts_to_tell_anything_get_all_that_there_are(runs: Runs) -> None:
    rows = [{"prompt": f"Which is {n}?"} for n in range(10)]
    Chain(runs.directory).write("ten.jsonl", rows)
    six = ("evaluate.prompts=ten.jsonl", "evaluate.num_prompts=6")
    runs.run("six", *six)
    runs.run("six_bad", *six, "sft.data=b.jsonl")
    told = runs.say("bisect", "good=six", "bad=six_bad")
    assert ", 10 prompts. " in told.out and runs.result("bisect-six-six_bad")["causes"] == [["sft.data"]]


def test_runs_that_cannot_be_told_apart_get_more_prompts_and_seeds_and_end_with_3(runs: Runs) -> None:
    runs.run("same", "sft.optim.weight_decay=1e-9")
    told = runs.say("bisect", "good=good", "bad=same", code=3)
    assert "The two cannot be told apart" in told.out
    assert all(
        f", {words}. " in told.out for words in ("24 prompts", "24 prompts, seed 1", "24 prompts, seed 2")
    )
    assert not runs.result("bisect-good-same")["found"]
    assert "is the better one. Exchange" in runs.say("bisect", "good=bad", "bad=good", code=3).out


def test_a_spent_budget_is_said_and_a_larger_one_continues(runs: Runs) -> None:
    told = runs.say("bisect", "good=good", "bad=bad", "budget=1", code=3)
    assert "budget=1 is spent" in told.out and len(runs.trials("bisect-good-bad")) == 1
    assert len(runs.result("bisect-good-bad")["trials"]) == 1 and "cannot tell: " not in told.out
    assert "sft.turns" in runs.result("bisect-good-bad")["unsure"]
    before = runs.made()
    runs.say("bisect", "good=good", "bad=bad")
    assert before.items() <= runs.made().items()


def test_rows_that_are_gone_cannot_be_put_back_and_that_is_said(runs: Runs) -> None:
    shutil.copy(runs.directory / "a.jsonl", runs.directory / "rows.jsonl")
    runs.run("before", "sft.data=rows.jsonl")
    shutil.copy(runs.directory / "b.jsonl", runs.directory / "rows.jsonl")
    runs.run("after", "sft.data=rows.jsonl", "sft.turns=last")
    told = runs.say("bisect", "good=before", "bad=after", code=3)
    assert runs.result("bisect-before-after")["causes"] == [["sft.data"]], (
        "put in alone, it breaks the good run"
    )
    assert "cannot run: what sft.data named in before is gone" in told.out


def test_two_keys_that_are_bad_only_together_are_one_cause(runs: Runs) -> None:
    """Replay of bad rows needs a share of them, and a share alone is refused."""
    runs.run("replay", "sft.replay=b.jsonl", "sft.replay_fraction=0.9", "sft.turns=last", "sft.epochs=5")
    told = runs.say("bisect", "good=good", "bad=replay")
    result = runs.result("bisect-good-replay")
    assert result["causes"] == [["sft.replay", "sft.replay_fraction"]]
    assert result["unsure"] == ["sft.replay"]  # without it the other key is refused
    assert "Cause: sft.replay (null -> b.jsonl) and sft.replay_fraction (0.0 -> 0.9)." in told.out
    alone = next(each for each in result["trials"] if each["put_in"] == ["sft.replay_fraction"])
    assert (alone["answer"], alone["gain"]) == ("cannot tell", None) and "cannot run: " in alone["why"]
    assert told.out.count("Trial ") == len(runs.trials("bisect-good-replay"))  # what cannot run costs none


def test_a_judge_that_was_trained_stays_the_good_runs_judge(runs: Runs) -> None:
    """It starts from the SFT model, so the bad run's judge is another one."""
    pairs = [{"prompt": f"Tell {n}", "chosen": "a" * 8, "rejected": "b" * 8} for n in range(1000)]
    (runs.directory / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    judge = ("evaluate.gold=null", "reward.pairs=pairs.jsonl", "reward.optim.lr=1e-3")
    runs.run("good2", *judge)
    runs.run("bad2", *judge, *BAD, "reward.epochs=2")
    told = runs.say("bisect", "good=good2", "bad=bad2")
    result = runs.result("bisect-good2-bad2")
    assert "The judge's score of sft judges" in told.out and result["causes"] == [["sft.data"]]
    assert not any(name.startswith("reward") for name in result["differences"])
    for trial in runs.trials("bisect-good2-bad2"):
        assert {*runs.statuses(trial)} == {"prepare", "sft", "evaluate"}


def test_mistakes_are_named_in_the_users_words(runs: Runs) -> None:
    def error(*words: str) -> str:
        told = runs.say("bisect", *words, code=2)
        assert "Traceback" not in told.err
        return told.err

    assert "good=goood: there is no such run in runs. Did you mean good?" in error("good=goood", "bad=bad")
    assert "name both runs" in error("good=good")
    assert "Did you mean good?" in error("god=good", "bad=bad")
    assert "bad=good: it is the good run" in error("good=good", "bad=good")
    assert "budget=none: give the number of trials" in error("good=good", "bad=bad", "budget=none")
    assert "dry_run=yes: true or false" in error("good=good", "bad=bad", "dry_run=yes")
    runs.run("trained", "stage=sft")
    assert "good=trained: it has not evaluated its policies" in error("good=trained", "bad=bad")
    runs.run("unjudged", "evaluate.gold=null", "evaluate.gates.win_rate=null")
    assert "good=unjudged: no score of it can judge" in error("good=unjudged", "bad=bad")
    runs.run("twin", "evaluate.temperature=0.9")
    assert "bad=twin: nothing that can change its policy differs from good" in error("good=good", "bad=twin")
    (runs.directory / "interrupt").touch()
    runs.run("stopped", "evaluate.temperature=0.8", *BAD, code=130)
    assert "bad=stopped: it is stopped. Run its command to its end" in error("good=good", "bad=stopped")
    assert "good=stopped: it has not evaluated its policies" in error("good=stopped", "bad=bad")
