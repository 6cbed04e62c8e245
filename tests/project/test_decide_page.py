"""The example of docs/decide.md, run as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from helpers.chains import run_main
from helpers.experiments import build

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "decide.md").read_text()


def test_the_table_has_every_candidate() -> None:
    section = PAGE.partition("## The candidates")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`.*?`) \|", section, re.MULTILINE)
    named = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(named) == sorted(path.stem for path in (ROOT / "conf" / "decide").glob("*.yaml"))


def test_the_candidate_of_ones_own_builds(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (own,) = yaml.safe_load(text)["decide"]["candidates"].values()
    experiment = build("recipe=decide", f"stage={own['asks']}", *own["set"])
    stage, _, key = own["length"].rpartition(".")
    assert vars(experiment.stages[stage])[key] > 1


@pytest.mark.slow
def test_the_example_decides_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (rows,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(rows, {})
    (shell,) = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    told = run_main(tmp_path, shlex.split(shell.replace("\\\n", ""))[3:], tmp_path)
    assert told.code == 0, told.err
    shown = PAGE.partition("This is what it printed")[2].partition("```\n")[2].partition("```")[0]
    printed = " ".join(told.out.split())
    for line in shown.splitlines():
        assert " ".join(line.removesuffix("...").split()) in printed
