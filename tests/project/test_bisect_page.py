"""The example of docs/bisect.md, run as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from helpers.chains import run_main

PAGE = (Path(__file__).parents[2] / "docs" / "bisect.md").read_text()


@pytest.mark.slow
def test_the_example_finds_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (rows,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(rows, {})
    (shell,) = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    common, *commands = shell.replace("\\\n", "").splitlines()
    shared = shlex.split(common)[5:-2]
    assert shared[0] == "model=tiny" and shared[-1].startswith("evaluate.gold=")
    for command in commands[:-1]:
        words = shlex.split(command)
        assert words[0] == "run"
        outcome = run_main(tmp_path, [*shared, *words[1:]], tmp_path)
        assert outcome.code == 0, outcome.err
    told = run_main(tmp_path, shlex.split(commands[-1])[3:], tmp_path)
    assert told.code == 0, told.err
    shown = PAGE.partition("This is what it printed")[2].partition("```\n")[2].partition("```")[0]
    printed = " ".join(told.out.split())
    for line in shown.splitlines():
        assert " ".join(line.removesuffix("...").split()) in printed
