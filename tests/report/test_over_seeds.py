"""A sweep over seeds: its policies side by side."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rlhf.pipeline.settings import SweepConfig
from rlhf.report.sweep_table import SEEDS_NOTE, SweepTable
from rlhf.report.trial import Outcome, Trial

GOLD, GAINS, KL = {"base": 0.0, "sft": 0.25, "ppo": 0.5}, (0.125, 0.25, 0.75), (1.0, 2.0, 6.0)


def summary(place: int, **costs: Any) -> dict[str, Any]:
    """Of a run that compared base, SFT and PPO."""
    metrics = {f"evaluate/gold_mean/{name}": value + place for name, value in GOLD.items()}
    metrics |= {
        "evaluate/gold_gain/ppo": GAINS[place],
        "evaluate/kl/ppo": KL[place],
        "evaluate/stop_rate/ppo": 1.0,
    }
    policies: dict[str, Any] = {
        "base": {"title": "base"},
        "sft": {"title": "SFT", "seconds": 10.0, "gib": 1.0},
    }
    policies["ppo"] = {"title": "PPO", "seconds": 100.0 + place, "gib": 2.0} | costs
    return {"stages": {"evaluate": {"metrics": metrics}}, "policies": policies}


def sweep(directory: Path, summaries: list[dict[str, Any]], key: str = "seed") -> SweepTable:
    """A table of trials that are done."""
    (directory / "mine").mkdir()
    trials = []
    for number, content in enumerate(summaries):
        run = directory / f"mine-{number}"
        run.mkdir()
        (run / "summary.json").write_text(json.dumps(content), encoding="utf-8")
        trials.append(Trial(number, run, {key: str(number)}, Outcome(0, "done")))
    knobs = SweepConfig(metric=None, direction="maximize", trials=20, parallel=4, seed=0, pareto=None)
    return SweepTable(directory / "mine", knobs, trials)


def test_each_figure_is_the_mean_of_the_seeds(tmp_path: Path) -> None:
    table = sweep(tmp_path, [summary(place) for place in range(3)])
    headings, rows = table.over_seeds.cells()
    assert headings == [
        "3 seeds",
        "gold score",
        "gold gain over the start",
        "KL",
        "ends by itself",
        "seconds",
        "peak GiB of its stage",
    ]
    assert rows[0] == ["base", "+1.00 (+0.00 to +2.00)", "-", "-", "-", "-", "-"]
    assert rows[2] == [
        "PPO", "+1.50 (+0.50 to +2.50)", "+0.38 (+0.12 to +0.75)", "3.0 (1.0 to 6.0)", "100% (100% to 100%)",
        "101 (100 to 102)", "2.00 (2.00 to 2.00)",
    ]  # fmt: skip


def test_it_is_written_and_shown(tmp_path: Path) -> None:
    table = sweep(tmp_path, [summary(place) for place in range(2)])
    table.write()
    text = (tmp_path / "mine" / "sweep.md").read_text(encoding="utf-8")
    assert "## Policies" in text and SEEDS_NOTE in text and "| PPO |" in text
    out = io.StringIO()
    table.show(Console(file=out, width=200))
    assert "PPO" in out.getvalue() and SEEDS_NOTE in out.getvalue()


def test_a_picture_shows_the_means(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    both = [summary(place) for place in range(2)]
    for each in both:
        each["policies"]["dpo"] = {"title": "DPO", "seconds": 50.0, "gib": 1.5}
        each["stages"]["evaluate"]["metrics"] |= {"evaluate/gold_gain/dpo": 0.1, "evaluate/kl/dpo": 3.0}
    table = sweep(tmp_path, both)
    (ppo, dpo), _ = table.over_seeds.points()
    assert ppo.gain.value == 0.1875 and (ppo.gain.low, ppo.gain.high) == (0.125, 0.25)
    assert ppo.kl == 1.5 and ppo.cost == (100.5, 2.0) and dpo.title == "DPO"
    table.write()
    assert (tmp_path / "mine" / "policies.png").stat().st_size > 1000


def test_a_figure_that_one_seed_lacks_is_left_out(tmp_path: Path) -> None:
    _, rows = sweep(tmp_path, [summary(0), summary(1, gib=None)]).over_seeds.cells()
    assert rows[2][-1] == "-" and rows[1][-1] != "-"


@pytest.mark.parametrize("why", ["another key", "one trial", "no policies"])
def test_nothing_is_set_side_by_side_elsewhere(tmp_path: Path, why: str) -> None:
    summaries = [summary(place) for place in range(1 if why == "one trial" else 2)]
    if why == "no policies":
        for each in summaries:
            each["policies"] = {}
    table = sweep(tmp_path, summaries, "ppo.optim.lr" if why == "another key" else "seed")
    table.write()
    assert "## Policies" not in (tmp_path / "mine" / "sweep.md").read_text(encoding="utf-8")
