"""`status`, `ls` and `gc`: what they say of runs in every state, and what they remove."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.chains import Chain, Outcome, RealChain, run_main, wait_until
from helpers.warm import Command
from rlhf.cli.gc import size
from rlhf.cli.runs import state_of

SHORT = ("stage=sft", "sft.epochs=1")


def say(directory: Path, *words: str) -> Outcome:
    return run_main(directory, words, directory)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    made = Chain(tmp_path_factory.mktemp("commands"))
    assert made.run(*SHORT).code == 0
    assert (
        made.run(*SHORT, "sft.optim.lr=1e-4", "gates=enforce", "sft.gates.held_out_loss_change.max=-9").code
        == 3
    )
    assert made.run(*SHORT, "reward.pairs=missing.jsonl").code == 2
    return made


def test_the_newest_run_is_told_or_one_by_its_name(chain: Chain) -> None:
    assert "runs/run2: failed" in say(chain.directory, "status", "run_name=run2").out
    said = say(chain.directory, "status", "run_name=run1").out
    assert said.startswith("runs/run1: done\n  prepare ran")
    assert "\n  Whether it worked cannot be told.\n  Your data and settings work; a random model" in said
    by_gate = say(chain.directory, "status", "run_name=run2").out
    assert "gate failed: sft/held_out_loss_change = " in by_gate and "same command" not in by_gate
    assert "Fix the cause first. Finished stages" in by_gate and "error:" not in by_gate
    newest = say(chain.directory, "status").out
    assert newest == say(chain.directory, "status", "run_name=run2").out or "run3" in newest


def test_all_runs_are_listed_the_newest_first(chain: Chain) -> None:
    lines = say(chain.directory, "ls").out.splitlines()
    names = [line.split()[0] for line in lines[1:]]
    assert names.index("run2") < names.index("run1")
    assert "done" in lines[-1] and "prepare, sft" in lines[-1]


def test_a_run_that_is_stopped_before_its_first_stage_is_not_dead(tmp_path: Path) -> None:
    """Its process is gone, but it said so; the next attempt says anew how it ends."""
    chain, keys = Chain(tmp_path), ("run_name=mine", "stage=generate")
    for name, line in (
        ("stops", "raise KeyboardInterrupt"),
        ("goes", "return [float(len(t)) for t in texts]"),
    ):
        (tmp_path / f"{name}.py").write_text(f"def score(prompts, texts):\n    {line}\n")
    assert chain.run(*keys, "ppo.reward=python:stops:score").code == 130
    assert say(tmp_path, "status").out.startswith("runs/mine: stopped")
    assert chain.run(*keys, "ppo.reward=python:goes:score").code == 0
    assert say(tmp_path, "status").out.startswith("runs/mine: done")


@pytest.mark.parametrize(
    ("name", "line", "code", "headline"),
    [
        ("halts", "if len(texts) == 8: raise KeyboardInterrupt", 130, "It was stopped in generate."),
        ("breaks", "if len(texts) == 8: raise SystemError('no')", 2, "It failed in generate."),
        ("short", "return []", 2, "It failed after prepare."),
    ],
)
def test_a_run_that_ends_early_leaves_its_page(
    tmp_path: Path, name: str, line: str, code: int, headline: str
) -> None:
    chain = Chain(tmp_path)
    (tmp_path / f"{name}.py").write_text(
        f"def score(prompts, texts):\n    {line}\n    return [1.0 for _ in texts]\n"
    )
    found = chain.run("stage=generate", f"ppo.reward=python:{name}:score")
    assert found.code == code, found.err
    status = say(tmp_path, "status").out
    assert ("The same command continues" in status) == (code == 130)
    errors = [line for line in status.splitlines() if line.startswith("  error: ")]
    assert [f"python:{name}:score" in error for error in errors] == [True] * (code == 2)
    assert headline in (found.directory / "report.html").read_text(encoding="utf-8")
    assert f"Page: {found.directory.relative_to(tmp_path)}/report.html" in found.out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("status", "run_name=run9"), "run_name=run9: there is no such run in runs. Did you mean run"),
        (("status", "run=run1"), "status run=run1: it takes run_name=VALUE runs_dir=VALUE. Did you mean run"),
        (("ls", "runs_dir=nowhere"), "runs_dir=nowhere: there is no such directory"),
        (("gc", "store_dir=nowhere"), "store_dir=nowhere: there is no such directory"),
        (("gc", "yes=perhaps"), "gc yes=perhaps: true or false"),
        (("gcc",), "gcc: there is no such command. Did you mean gc?"),
    ],
)  # fmt: skip
def test_a_slip_is_said(chain: Chain, words: tuple[str, ...], complaint: str) -> None:
    found = say(chain.directory, *words)
    assert (found.code, complaint in found.err) == (2, True), found.err


@pytest.mark.parametrize("command", ["status", "ls", "gc", "verify", "export", "chat", "init", "watch"])
def test_each_command_has_a_help_that_needs_no_torch(command: str) -> None:
    code = f"import sys; sys.argv[1:] = ['{command}', '--help']; from rlhf.__main__ import main; main()"
    loaded = "import sys; print(sorted({'torch', 'transformers', 'hydra'} & {*sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{loaded}"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"python -m rlhf {command} ") and done.stdout.endswith("[]\n")


def test_what_no_run_uses_is_removed_only_when_that_is_wanted(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    first, second = chain.run(*SHORT), chain.run(*SHORT, "sft.optim.lr=1e-4")
    directory, kept = tmp_path / "runs" / "run2", {first.artifact("sft"), first.artifact("prepare")}
    lost = second.artifact("sft")
    assert "runs in runs use everything in it" in say(tmp_path, "gc").out
    for path in directory.glob("*.json"):
        path.unlink()

    said = say(tmp_path, "gc")
    assert f"store/sft/{lost.name}  (no run names it)" in said.out and "Nothing was removed" in said.out
    assert str(first.artifact("sft").name) not in said.out
    assert lost.is_dir()

    assert "Removed 1 of 1." in say(tmp_path, "gc", "yes=true").out
    assert not lost.exists() and all(path.is_dir() for path in kept)
    assert chain.run(*SHORT).statuses == {"prepare": "reused", "sft": "reused"}


def test_what_a_run_begins_to_use_while_gc_asks_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run begins and ends before the user, who has no terminal here, says yes."""
    chain = Chain(tmp_path)
    made = chain.run(*SHORT).artifact("sft")
    for path in (tmp_path / "runs" / "run1").glob("*.json"):
        path.unlink()
    ends: list[Outcome] = []

    def ask(question: str) -> bool:
        ends.append(chain.run(*SHORT))
        return True

    monkeypatch.setattr("rlhf.cli.gc.ask", ask)
    said = say(tmp_path, "gc").out
    assert ends[0].statuses == {"prepare": "reused", "sft": "reused"}
    assert "stays: a run uses it now" in said and "Removed 0 of 2." in said
    assert made.is_dir() and (ends[0].directory / "artifacts" / "sft").is_dir()


def test_what_was_moved_is_used_as_before(tmp_path: Path) -> None:
    """A run's summary names its artifacts where they were made."""
    (tmp_path / "a").mkdir()
    assert Chain(tmp_path / "a").run(*SHORT).code == 0
    (tmp_path / "a").rename(tmp_path / "b")
    assert "runs in runs use everything in it" in say(tmp_path / "b", "gc", "yes=true").out


def test_a_summary_of_another_form_breaks_no_list(tmp_path: Path) -> None:
    (tmp_path / "runs" / "odd").mkdir(parents=True)
    (tmp_path / "runs" / "odd" / "summary.json").write_text("[]")
    listed = say(tmp_path, "ls")
    assert (listed.code, "odd" in listed.out) == (0, True)
    (tmp_path / "store").mkdir()
    collected = say(tmp_path, "gc")
    assert collected.code == 2 and "it is not known what that run uses" in collected.err


def test_a_file_under_two_names_counts_once(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"x" * 1000)
    os.link(tmp_path / "one", tmp_path / "two")
    assert size(tmp_path) == 1000


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[RealChain, Command]]:
    chain = RealChain(tmp_path)
    process = chain.start("long", "stage=sft", "sft.epochs=500", "checkpoint.every_steps=1")
    yield chain, process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_a_run_is_running_then_dead_and_what_it_left_is_told(
    running: tuple[RealChain, Command],
) -> None:
    chain, process = running
    directory = chain.directory / "runs" / "long"
    wait_until(lambda: "sft: training" in (_said(directory).get("task") or ""), process)
    state = state_of(directory)
    assert (state.status, state.unfinished) == ("running", ["sft"])
    assert state.seconds_left is not None and state.seconds_left > 0
    said = say(chain.directory, "status").out
    assert (
        f"pid {process.pid} on {socket.gethostname()}, sft (sft: training " in said and "to go, until" in said
    )
    assert ".part-" not in say(chain.directory, "gc", "store_dir=store-long").out, "a run works there"

    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    dead = say(chain.directory, "status").out
    assert "runs/long: dead" in dead and "The same command continues" in dead
    left = say(chain.directory, "gc", "store_dir=store-long").out
    assert "checkpoints" not in left and "(left by a run that was killed)" in left, "the run continues there"
    shutil.rmtree(directory)
    assert (
        "(checkpoints of a stage that did not end" in say(chain.directory, "gc", "store_dir=store-long").out
    )


def test_a_run_on_another_host_is_believed_while_it_speaks(tmp_path: Path) -> None:
    said: dict[str, Any] = {"host": "elsewhere", "pid": 1, "started": 0.0, "needed": ["sft"], "stage": "sft"}
    for age, word in ((5.0, "running"), (900.0, "silent")):
        (tmp_path / "summary.json").write_text(json.dumps({"stages": {}, "gates": [], "verdict": None}))
        (tmp_path / "position.json").write_text(json.dumps(said | {"time": time.time() - age}))
        assert state_of(tmp_path).status == word


def test_a_run_and_its_store_can_move_together(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    Chain(tmp_path / "here").run(*SHORT)
    (tmp_path / "here").rename(tmp_path / "there")
    assert (tmp_path / "there" / "runs" / "run1" / "artifacts" / "sft" / "config.json").is_file()


def _said(directory: Path) -> dict[str, Any]:
    path = directory / "position.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found
