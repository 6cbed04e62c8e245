"""What is said of the time that is left, where nobody watches a terminal."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.table import Table

import rlhf.tracking.progress
from rlhf.tracking.progress import Progress
from rlhf.tracking.redaction import RedactingConsole


def test_what_an_earlier_attempt_did_says_nothing_about_the_time_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr(rlhf.tracking.progress, "time", SimpleNamespace(monotonic=lambda: now))
    said = io.StringIO()
    progress = Progress(Console(file=said, width=80))
    with progress.task("ppo: steps", 200) as task:
        task.skip(100)
        now += 30.0
        task.advance(1, "score +1.00")
        now += 5.0
        task.advance()  # too soon for another line
        now += 25.0
        task.advance()
    assert [line.rstrip() for line in said.getvalue().splitlines()] == [
        "  ppo: steps 101/200, 49:30 left  score +1.00",  # 99 steps of 30 s
        "  ppo: steps 103/200, 32:20 left",  # 97 steps of 20 s
    ]


def test_off_a_terminal_lines_carry_the_time_and_tables_take_the_width_they_need(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    said = io.StringIO()
    console = RedactingConsole(file=said)
    long = " ".join(["because"] * 60)
    table = Table("strategy", "because", box=None)
    table.add_row("lora", long)
    console.print(f"sft runs {long}", style="yellow")
    console.print(table)
    line, _, row = said.getvalue().splitlines()
    assert re.fullmatch(rf"\d\d:\d\d:\d\d sft runs {long}", line)
    assert row.split(maxsplit=1) == ["lora", long] or row.split() == ["lora", *long.split()]
    console.has_times = False
    console.print("Report: here")
    assert said.getvalue().splitlines()[-1] == "Report: here"


def test_on_a_terminal_lines_fold_and_carry_no_time() -> None:
    said = io.StringIO()
    RedactingConsole(file=said, force_terminal=True, width=30).print("sft runs " * 6)
    assert len(said.getvalue().splitlines()) == 2
    assert said.getvalue().startswith("sft runs")


def test_a_live_bar_starts_where_the_earlier_attempt_ended() -> None:
    progress = Progress(Console(file=io.StringIO(), force_terminal=True, width=80))
    with progress.shown(), progress.task("sft: training", 8) as task:
        task.skip(5)
        task.advance()
        assert progress.live is not None
        (bar,) = progress.live.tasks
        assert (bar.completed, bar.total) == (6, 8)


@pytest.mark.parametrize("width", [80, 40])
def test_the_panel_has_step_time_left_three_figures_and_memory(width: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width)
    progress = Progress(console, memory=lambda: 1.5 * 2**30)
    with progress.shown("ppo"), progress.task("ppo: steps", 8) as task:
        progress.figures({"lr": 0.1, "loss": 1.0, "kl": 0.25, "score": -0.5, "length": 7.0})
        progress.figures({"held_out_score": 3.0})  # nothing to watch: what was there stays
        task.advance(3)
        assert progress.live is not None
        drawn = Console(file=io.StringIO(), width=width)
        drawn.print(progress.live.get_renderable())
    assert isinstance(drawn.file, io.StringIO)
    lines = drawn.file.getvalue().splitlines()
    assert lines[0].startswith("╭─ ppo ") and {len(line) for line in lines} == {width}
    words = " ".join(" ".join(line.strip("│╭╮╰╯").split()) for line in lines[1:-1])
    assert ("━" in words) == (width == 80)
    assert re.fullmatch(r"steps (━\S* )?3/8 \S+ left score -0.5 kl 0.25 loss 1 memory 1.50 GiB", words), words


def test_figures_are_for_terminals_alone() -> None:
    said = io.StringIO()
    progress = Progress(Console(file=said, width=80))
    with progress.shown("ppo"), progress.task("ppo: steps", 8) as task:
        progress.figures({"score": 1.0})
        task.advance()
    assert said.getvalue() == ""


def test_bars_of_libraries_are_off_whichever_imports_tqdm_first(tmp_path: Path) -> None:
    """A model that is converted drew one into the log."""
    code = "from rlhf.cli.execute import execute\nexecute({}, 'x')\nimport tqdm\nlist(tqdm.tqdm(range(3)))\n"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "3/3" not in done.stderr
