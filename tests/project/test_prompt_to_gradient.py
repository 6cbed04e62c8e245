"""docs/prompt-to-gradient.md is the code's: what it names exists, and its table is what a step crosses."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from helpers.chains import Chain, Outcome

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "prompt-to-gradient.md").read_text(encoding="utf-8")
MOST = 25
FILE = r"(?:rlhf|stages)/[\w/]+\.py"
BEGINS = {"PrepareStage.run", "PolicyTrainer.step"}
ENDS = {"PrepareStage.run", "PlainEngine.backward"}


def files_of_the_table() -> list[str]:
    table = PAGE.partition("## The files")[2].partition("A file counts")[0]
    return re.findall(rf"^\| `({FILE})` \| ", table, re.MULTILINE)


def beside_the_way() -> list[str]:
    """Files, and folders, which end with a slash."""
    rows = PAGE.partition("| not counted | why |")[2].partition("##")[0]
    return re.findall(r"`(rlhf/[\w/.]+)`", rows)


def names_in(path: str) -> set[str]:
    """Classes and functions, a method as CLASS.NAME."""
    found = set()
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
            found |= {
                f"{node.name}.{each.name}"
                for each in ast.walk(node)
                if isinstance(each, ast.FunctionDef) and each is not node
            }
    return found


def test_what_the_walk_names_exists() -> None:
    """`NAME` in `FILE`, or several names."""
    text = " ".join(PAGE.split())
    places = re.findall(rf"((?:`[\w.]+`(?:, )?)+) in `({FILE})`", text)
    named = [(name, path) for names, path in places for name in re.findall(r"`([\w.]+)`", names)]
    assert len(named) > 50
    assert [each for each in named if each[0] not in names_in(each[1])] == []


def test_the_walk_and_its_table_name_the_same_files() -> None:
    table, walk = files_of_the_table(), PAGE.partition("## The files")[0]
    assert len(table) == len(set(table))
    assert set(re.findall(rf"in `({FILE})`", " ".join(walk.split()))) - {*beside_the_way()} == {*table}
    assert re.findall(r"crosses (\d+) files", " ".join(PAGE.split())) == [str(len(table))]
    assert len(table) <= MOST


class Way:
    """The files whose functions run while `prepare` reads rows, and in PPO's first step up to the policy
    loss's gradient; with those of the stage and the loop that called it."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self._codes: set[CodeType] = set()
        self._is_on, self._walked = False, set[str]()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """As `sys.setprofile` wants it."""
        name = frame.f_code.co_qualname
        if event == "call" and name in BEGINS - self._walked:
            self._is_on = True
            self._walked.add(name)
            caller = frame
            while not caller.f_code.co_qualname.endswith("Stage.run"):
                assert caller.f_back is not None, "a stage's run calls it"
                caller = caller.f_back
                self._add(caller.f_code)
        if event == "call" and self._is_on:
            self._add(frame.f_code)
        if event == "return" and name in ENDS:
            self._is_on = False

    def _add(self, code: CodeType) -> None:
        if code not in self._codes:
            self._codes.add(code)
            path = Path(code.co_filename).resolve()
            if path.is_relative_to(ROOT):
                self.files.add(path.relative_to(ROOT).as_posix())


def test_a_step_crosses_the_files_of_the_table(finished_chain: tuple[Chain, Outcome]) -> None:
    chain, way = finished_chain[0], Way()
    sys.setprofile(way)
    try:
        prepare = chain.run("stage=prepare", "prepare.held_out_fraction=0.31")
        ppo = chain.run("stage=ppo", "ppo.steps=1")
    finally:
        sys.setprofile(None)
    assert prepare.statuses["prepare"] == ppo.statuses["ppo"] == "ran", prepare.err + ppo.err
    crossed = {file for file in way.files if file.startswith(("rlhf/", "stages/"))}
    beside = {file for file in crossed if file.startswith(tuple(beside_the_way()))}
    assert sorted(crossed - beside) == sorted(files_of_the_table())
    unused = [each for each in beside_the_way() if not any(file.startswith(each) for file in beside)]
    assert unused == [], "the page says that they run on the way"
