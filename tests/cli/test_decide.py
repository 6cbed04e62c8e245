"""`recipe=decide` on real runs of the tiny model, whose judge counts a letter that the rows teach."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.chains import Chain, Outcome, run_main
from rlhf.cli.api import compose
from rlhf.cli.api import run as run_config

JUDGE = """
import os, pathlib, signal, threading

def share(messages, responses):
    '''The share of a's. Stops or kills the run once, or waits for a stop, if a file asks for it.'''
    if pathlib.Path("slow").exists() and sum(text.count("b") for text in responses) > len(responses):
        pathlib.Path("slow").unlink()
        threading.Event().wait(60)
    taught = any("aaaa" in text for text in responses)
    if pathlib.Path("kill").exists() and taught:
        pathlib.Path("kill").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    if pathlib.Path("interrupt").exists() and taught:
        pathlib.Path("interrupt").unlink()
        raise KeyboardInterrupt
    return [text.count("a") / 8 for text in responses]
"""
QUOTA = """
def share(messages, responses):
    if any("aaaa" in text for text in responses):
        raise RuntimeError("the quota is exceeded")
    return [0.0 for text in responses]
"""
CANDIDATES = """
# @package _global_
decide:
  candidates:
    wrong:
      title: SFT on wrong rows
      asks: sft
      set: [sft.data=b.jsonl]
      length: sft.epochs
    elsewhere:
      title: base model, other questions
      asks: base
      set: [evaluate.prompts=others.jsonl]
"""
SETTINGS = (
    "model=tiny", "device=cpu", "sft.data=a.jsonl", "sft.epochs=4", "sft.batch_rows=8", "sft.optim.lr=1e-2",
    "evaluate.prompts=asked.jsonl", "ppo.max_new_tokens=8", "evaluate.gold=python:counting:share",
)  # fmt: skip
DECIDE = (
    "recipe=decide", "budget=20m", "run_name=choice", "+experiment=candidates.yaml",
    "decide.only=[base,elsewhere,sft,wrong]",
    "decide.shares=[0.5,1]", "decide.num_timed=1",
)  # fmt: skip


class Decisions:
    """Decisions in a directory with rows that teach the letter, and rows that teach another one."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        chain = Chain(directory)
        for letter in "ab":
            rows = [{"prompt": f"Say {n}", "completion": letter * 8} for n in range(48)]
            chain.write(f"{letter}.jsonl", rows)
        chain.write("asked.jsonl", [{"prompt": f"What is {n}?"} for n in range(60)])
        chain.write("others.jsonl", [{"prompt": f"Which is {n}?"} for n in range(60)])
        (directory / "counting.py").write_text(JUDGE)
        (directory / "candidates.yaml").write_text(CANDIDATES)

    def decide(self, *overrides: str, code: int = 0) -> Outcome:
        arguments = [*SETTINGS, *DECIDE, *overrides]
        outcome = run_main(self.directory, arguments, self.directory / "runs" / "choice")
        assert outcome.code == code, f"{outcome.code}\n{outcome.out}\n{outcome.err}"
        return outcome

    @property
    def result(self) -> dict[str, Any]:
        """decision.json."""
        found: dict[str, Any] = json.loads((self.directory / "runs" / "choice" / "decision.json").read_text())
        return found

    def made(self, stage: str) -> list[str]:
        """The artifacts of a stage in the store."""
        return sorted(path.parent.name for path in self.directory.glob(f"store/{stage}/*/manifest.json"))


@pytest.fixture(scope="module")
def decided(tmp_path_factory: pytest.TempPathFactory) -> tuple[Decisions, Outcome]:
    decisions = Decisions(tmp_path_factory.mktemp("decide"))
    return decisions, decisions.decide()


def state_of(result: dict[str, Any]) -> dict[str, str]:
    return {each["name"]: each["state"] for each in result["candidates"]}


def test_what_the_judge_likes_is_shipped_and_the_other_is_dropped(decided: tuple[Decisions, Outcome]) -> None:
    decisions, told = decided
    result = decisions.result
    assert result["outcome"] == "ship" and result["winner"] == "sft" and result["untrained"] == "base"
    assert state_of(result) == {
        "base": "compared", "elsewhere": "failed", "sft": "winner", "wrong": "worse"
    }  # fmt: skip
    won = next(each for each in result["candidates"] if each["name"] == "sft")
    assert won["share"] == 1.0 and won["gain"]["low"] > 0.2 and won["gain"] == won["gain_over_base"]
    assert won["gain"]["rows"] == result["questions"]["sealed"]
    assert result["questions"]["sealed"] + result["questions"]["choosing"] == 60
    assert "Ship SFT, all parameters: its gold score is +" in told.out
    ran = [(each["candidate"], each["share"], each["part"]) for each in result["pilots"]]
    assert ran[:2] == [("base", 1.0, "choosing"), ("elsewhere", 1.0, "choosing")]
    assert {*ran[2:4]} == {("sft", 0.5, "choosing"), ("wrong", 0.5, "choosing")}  # the shorter one first
    assert ran[4:] == [("sft", 1.0, "choosing"), ("base", 1.0, "sealed"), ("sft", 1.0, "sealed")]
    page = (decisions.directory / "runs" / "choice" / "report.html").read_text()
    assert "Ship SFT, all parameters" in page


def listed(decisions: Decisions) -> str:
    """The line of the decision in what `ls` prints."""
    lines = run_main(decisions.directory, ["ls"], decisions.directory).out.splitlines()
    return next(line for line in lines if line.startswith("choice "))


def test_it_is_listed_among_the_runs(decided: tuple[Decisions, Outcome]) -> None:
    line = listed(decided[0])
    assert "decided" in line and "not decided" not in line and "Ship SFT, all parameters: its" in line


def test_its_command_makes_the_very_model_that_was_judged(
    decided: tuple[Decisions, Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And that model is the one that two pilots trained, one after the other."""
    decisions, _ = decided
    monkeypatch.chdir(decisions.directory)
    result, before = decisions.result, decisions.made("sft")
    words = result["command"].removeprefix("python -m rlhf ").split()
    assert {"+experiment=candidates.yaml", "sft.data=a.jsonl"} <= {*words}  # as they were typed
    finished = run_config(compose(*(word.strip("'") for word in words), "run_name=again"), quiet=True)
    assert finished.summary and decisions.made("sft") == before and len(before) == 3
    judged = (decisions.directory / result["artifact"]).resolve()
    assert (finished.directory / "artifacts" / "sft").resolve() == judged


def test_the_same_command_again_trains_nothing(decided: tuple[Decisions, Outcome]) -> None:
    decisions, _ = decided
    before, made = decisions.result, decisions.made("sft")
    told = decisions.decide()
    after = decisions.result
    assert decisions.made("sft") == made and after["pilots"] == before["pilots"]
    assert after["sentences"] == before["sentences"] and after["budget"] == before["budget"]
    assert "all of it is in the store" in told.out


def test_a_result_stays_until_there_is_another_one(tmp_path: Path) -> None:
    decisions = Decisions(tmp_path)
    decisions.decide("decide.only=[base]")
    before, page = decisions.result, tmp_path / "runs" / "choice" / "report.html"
    shown = page.read_text()
    decisions.decide("decide.only=[base,sft]", "evaluate.prompts=missing.jsonl", code=2)
    (tmp_path / "interrupt").touch()
    decisions.decide("decide.only=[base,sft]", code=130)
    assert decisions.result == before and page.read_text() == shown
    decisions.decide("decide.only=[base,sft]")
    assert decisions.result["winner"] == "sft" and page.read_text() != shown


def test_a_killed_decision_continues(decided: tuple[Decisions, Outcome], tmp_path: Path) -> None:
    decisions = Decisions(tmp_path)
    (tmp_path / "kill").touch()
    command = [sys.executable, "-m", "rlhf", *SETTINGS, *DECIDE]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == -signal.SIGKILL
    (tmp_path / "interrupt").touch()
    stopped = decisions.decide(code=130)
    assert "Interrupted. The same command continues" in stopped.err
    page = (tmp_path / "runs" / "choice" / "report.html").read_text()
    assert "It was interrupted. With run_name=choice, the same command continues" in page
    line = listed(decisions)
    assert "not decided" in line and "It was interrupted" in line
    decisions.decide()
    assert decisions.result["sentences"][0] == decided[0].result["sentences"][0]
    pilots = decisions.result["pilots"]
    assert sorted(each["ended"] for each in pilots) == [*["done"] * 7, "stopped", "stopped"]
    killed, interrupted = (place for place, each in enumerate(pilots) if each["ended"] == "stopped")
    assert [pilots[place]["why"] for place in (killed, interrupted)] == ["its process ended", "interrupted"]
    assert pilots[killed]["seconds"] > 0
    assert pilots[interrupted]["start"] > pilots[killed]["start"] + pilots[killed]["seconds"]


def test_a_pilot_that_is_slower_than_expected_lets_the_others_go_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.cli.pilots.OVERSHOOT", 0.002)  # else a minute of the budget
    decisions = Decisions(tmp_path)
    rows = [{"prompt": f"Say {n}", "completion": "b" * 8} for n in range(24)]
    Chain(tmp_path).write("b.jsonl", rows)  # fewer, so that it is the first one
    (tmp_path / "slow").touch()
    told = decisions.decide("decide.only=[base,sft,wrong]", "sft.epochs=12")
    assert "it is slower than expected, and others wait" in told.out
    ran = [
        (each["candidate"], each["ended"])
        for each in decisions.result["pilots"]
        if (each["share"] == 0.5 and each["ended"] == "done") or each["candidate"] == "wrong"
    ]
    assert ran == [("wrong", "stopped"), ("sft", "done"), ("wrong", "done")]
    assert state_of(decisions.result) == {"base": "compared", "sft": "winner", "wrong": "worse"}


def test_training_rows_that_ask_the_questions_are_told(tmp_path: Path) -> None:
    decisions = Decisions(tmp_path)
    rows = [{"prompt": f"Say {n}", "completion": "b" * 8} for n in range(48)]
    hidden = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What is 7?"}]
    Chain(tmp_path).write("a.jsonl", [*rows, {"prompt": hidden, "completion": "a"}])
    told = decisions.decide("decide.only=[base,sft]")
    counted = "prepare/leaks; a row of two roles counts twice"
    line = f"Training rows that ask what the evaluation asks were left out: 2 ({counted})."
    assert told.out.count(line) == 2 and decisions.result["sentences"][-1] == line


def test_without_time_nothing_is_decided(tmp_path: Path) -> None:
    told = Decisions(tmp_path).decide("budget=1s", code=2)
    assert re.search(
        r"no candidate could be trained in it\. 0:\d\d are spent, "
        r"50% of (SFT, all parameters|SFT on wrong rows) takes about "
        r"0:\d\d, and the sealed questions about 0:\d\d\. Raise it above their sum",
        told.err,
    )
    assert "SFT, all parameters is dropped: 50% would take about" in told.out
    page = (Path(told.directory) / "report.html").read_text()
    assert "Not decided." in page and "It ended with an error: budget=0:01: no candidate" in page
    assert "Load this page again" not in page


def test_an_error_is_told_also_if_the_page_cannot_be_written(tmp_path: Path) -> None:
    """As on a full disk."""
    decisions = Decisions(tmp_path)
    (tmp_path / "runs" / "choice" / "decision.json").mkdir(parents=True)
    told = decisions.decide("evaluate.gold=null", code=2)
    assert "there is no judge that no candidate learned from" in told.err


def test_candidates_without_an_untrained_one_are_refused_before_anything_runs(tmp_path: Path) -> None:
    decisions = Decisions(tmp_path)
    told = decisions.decide("decide.only=[sft]", code=2)
    assert told.err.startswith("Error: decide.only: none is without training, which is what training must")
    assert not (tmp_path / "runs").exists()


def test_what_cannot_run_is_listed_with_its_reason(tmp_path: Path) -> None:
    decisions = Decisions(tmp_path)
    told = decisions.decide("decide.only=[base,grpo,dpo]", "budget=1s")
    assert "GRPO cannot run: " in told.out and "DPO cannot run: No data for reward.pairs" in told.out
    states = {each["name"]: (each["state"], each["why"]) for each in decisions.result["candidates"]}
    assert "Nothing was trained: no candidate that trains can run. base model is the best one" in told.out
    assert "DPO cannot run: No data for reward.pairs (for dpo)." in decisions.result["sentences"]
    assert states["dpo"][0] == states["grpo"][0] == "cannot run" and "reward.pairs" in states["dpo"][1]


def test_how_to_install_what_a_candidate_lacks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.compare.stage.find_spec", lambda name: None)
    told = Decisions(tmp_path).decide("decide.only=[base,few_shot]", "budget=1s")
    assert "few-shot cannot run: stage=evaluate: it needs bm25s (pip install -e '.[compare]').\n" in told.out


def test_a_judge_that_is_the_reward_is_refused(tmp_path: Path) -> None:
    """Without a gold score or references nothing judges."""
    told = Decisions(tmp_path).decide("evaluate.gold=null", code=2)
    assert "there is no judge that no candidate learned from" in told.err
    assert not [*tmp_path.glob("runs/*/summary.json")]  # before any pilot


def test_a_second_reward_model_that_ranks_by_chance_is_no_judge(tmp_path: Path) -> None:
    """And the reason is told: pairs there are enough of."""
    decisions, words = Decisions(tmp_path), ("red", "blue", "green")
    rows = [
        {
            "prompt": f"Name {n}",
            "chosen": f"{words[n % 3]} {n}",
            "rejected": f"{words[n // 3 % 3]} {n + 1}",
        }
        for n in range(1200)
    ]
    Chain(tmp_path).write("pairs.jsonl", rows)
    given = ("evaluate.gold=null", "reward.pairs=pairs.jsonl", "reward.epochs=1", "decide.only=[base]")
    told = decisions.decide(*given, code=2)
    assert "evaluate.judge: reward@judge is not shown to rank better than a rule" in told.err


def test_an_instance_that_all_candidates_read_can_be_given_keys(tmp_path: Path) -> None:
    decisions = Decisions(tmp_path)
    Chain(tmp_path).write(
        "pairs.jsonl", [{"prompt": f"N {n}", "chosen": "a a a", "rejected": "b"} for n in range(64)]
    )
    judge = ("evaluate.gold=learned@2", "reward@2.epochs=1", "reward.pairs=pairs.jsonl")
    told = decisions.decide(*judge, "decide.only=[base]", "run_name=choice")
    assert "base model is the best" in told.out


def test_a_judge_that_raises_on_a_candidate_is_no_judge_of_one_score(tmp_path: Path) -> None:
    """The others go on. Without others, it is no lack of budget."""
    decisions = Decisions(tmp_path)
    (tmp_path / "quota.py").write_text(QUOTA)
    given = ("evaluate.gold=python:quota:share", "decide.shares=[1]")
    decisions.decide("decide.only=[base,sft,wrong]", *given)
    first, *others = decisions.result["sentences"]
    assert state_of(decisions.result) == {"base": "compared", "sft": "failed", "wrong": "finalist"}
    assert first == (
        "It cannot be told: SFT, all parameters could not be judged, and the gold score is the same for all "
        "other answers."
    )
    (failed,) = others
    assert (
        failed.startswith("SFT, all parameters could not be judged: ") and "the quota is exceeded" in failed
    )
    told = decisions.decide("decide.only=[base,sft]", *given, "run_name=other", code=2)
    assert "SFT, all parameters: " in told.err and "the quota is exceeded" in told.err
    assert "budget" not in told.err


ON_TOP = """
# @package _global_
decide:
  candidates:
    same:
      title: SFT, twice
      asks: sft@same
      set: [sft@same.init=sft, sft@same.data=a.jsonl, sft@same.epochs=2, sft@same.optim.lr=1e-12]
      length: sft@same.epochs
"""


def test_a_model_that_others_start_from_is_compared_at_its_full_length(tmp_path: Path) -> None:
    """The pilot of `same` trains the full SFT first. Half of SFT would be clearly worse than that. In the end
    both give the same answers, and only the one that took less training is judged. Nothing changes the next
    time."""
    decisions = Decisions(tmp_path)
    (tmp_path / "candidates.yaml").write_text(ON_TOP)
    told = decisions.decide("decide.only=[base,sft,same]", "sft.epochs=2")
    ran = [(each["candidate"], each["share"], each["part"]) for each in decisions.result["pilots"]]
    choosing = [("sft", 0.5), ("same", 0.5), ("same", 1.0), ("sft", 1.0)]
    assert ran[1:5] == [(*each, "choosing") for each in choosing]
    assert "SFT, all parameters is dropped: clearly worse than the best at 50%" in told.out
    assert "SFT, all parameters is back: its model of the full length is in the store" in told.out
    assert state_of(decisions.result) == {"base": "compared", "sft": "winner", "same": "no finalist"}
    same = next(each for each in decisions.result["candidates"] if each["name"] == "same")
    assert same["why"] == "it answers as SFT, all parameters does, whose training took less"
    before, told = decisions.result, decisions.decide("decide.only=[base,sft,same]", "sft.epochs=2")
    assert decisions.result["pilots"] == before["pilots"]
    assert decisions.result["sentences"] == before["sentences"]
