"""The front by hand, and the picture of a sweep."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from rlhf.pipeline.settings import SweepConfig
from rlhf.report.pareto import BASE, Point, pareto_front
from rlhf.report.sweep_table import SweepTable
from rlhf.report.trial import Outcome, Trial

FULL, LORA, REPLAY, HALF = (
    Point("full", 0.5, 0.3), Point("lora", 0.4, 0.1), Point("replay", 0.4, 0.2), Point("half", 0.3, 0.05),
)  # fmt: skip
KNOBS = SweepConfig.model_validate({
    "metric": None, "direction": "maximize", "trials": 1, "parallel": 1, "seed": 0,
    "pareto": {"gain": "evaluate/task_gain", "loss": "evaluate/retention_loss"},
})  # fmt: skip


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([FULL, LORA, REPLAY, HALF], [HALF, LORA, FULL]),  # replay loses more than lora for the same gain
        ([BASE, FULL], [BASE, FULL]),
        ([BASE, Point("worse", -0.1, 0.2), Point("lucky", 0.1, -0.1)], [Point("lucky", 0.1, -0.1)]),
        ([LORA, Point("twin", 0.4, 0.1)], [LORA, Point("twin", 0.4, 0.1)]),
    ],
)
def test_no_other_point_gains_more_and_loses_less(points: list[Point], front: list[Point]) -> None:
    assert pareto_front(points) == front
    assert pareto_front(points[::-1]) == front if len(front) > 2 else True


def trial(number: int, remedy: str, metrics: dict[str, float | None] | None) -> Trial:
    outcome = None if metrics is None else Outcome(0, "done", metrics, ("sft/held_out_loss_change",))
    return Trial(number, Path(f"runs/f-{number}"), {"+remedy": remedy, "seed": "0"}, outcome)


def test_a_sweep_draws_the_trials_that_have_both_figures(tmp_path: Path) -> None:
    gain, loss, gate = "evaluate/task_gain", "evaluate/retention_loss", "sft/held_out_loss_change"
    table = SweepTable(tmp_path, KNOBS, [
        trial(0, "full", {gain: 0.5, loss: 0.3, gate: -0.5}), trial(1, "lora", {gain: 0.4, loss: None}),
        trial(2, "replay", {gain: 0.4, loss: 0.2}), trial(3, "half", None),
    ])  # fmt: skip
    assert table.points == [FULL, REPLAY]
    headings, rows = table.cells()
    assert headings == ["trial", "run", "remedy", "status", gain, loss, gate]
    assert rows[0][2:] == ["full", "done", "0.5", "0.3", "-0.5"]
    table.write()
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert (
        "![evaluate/task_gain against evaluate/retention_loss](pareto.png)"
        in (tmp_path / "sweep.md").read_text()
    )


def test_few_trials_with_many_figures_are_columns(tmp_path: Path) -> None:
    gain, loss, gate = "evaluate/task_gain", "evaluate/retention_loss", "sft/held_out_loss_change"
    table = SweepTable(tmp_path, KNOBS, [
        trial(0, "full", {gain: 0.5, loss: 0.3, gate: -0.5}), trial(1, "lora", {gain: 0.4, loss: None}),
    ])  # fmt: skip
    headings, rows = table.cells()
    assert headings == ["trial", "0", "1"]
    assert rows[0][0] == "run" and rows[1] == ["remedy", "full", "lora"] and rows[2][0] == "status"
    assert rows[3:] == [[gain, "0.5", "0.4"], [loss, "0.3", "-"], [gate, "-0.5", "-"]]
    stream = io.StringIO()
    table.show(Console(file=stream, width=80))
    assert [line.split() for line in stream.getvalue().splitlines() if gate in line] == [[gate, "-0.5", "-"]]


def test_nothing_measured_is_no_picture(tmp_path: Path) -> None:
    SweepTable(tmp_path, KNOBS, [trial(0, "full", None)]).write()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep.json", "sweep.md"]
