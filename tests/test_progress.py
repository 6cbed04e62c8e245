"""What is said of the time that is left, where nobody watches a terminal."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

import rlhf.progress
from rlhf.progress import Progress


def test_what_an_earlier_attempt_did_says_nothing_about_the_time_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr(rlhf.progress, "time", SimpleNamespace(monotonic=lambda: now))
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


def test_a_live_bar_starts_where_the_earlier_attempt_ended() -> None:
    progress = Progress(Console(file=io.StringIO(), force_terminal=True, width=80))
    with progress.shown(), progress.task("sft: training", 8) as task:
        task.skip(5)
        task.advance()
        assert progress.live is not None
        (bar,) = progress.live.tasks
        assert (bar.completed, bar.total) == (6, 8)
