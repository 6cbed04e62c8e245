"""The healthy ranges of curves: from what a stage says of them and its gates to the shade on the page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from helpers.chains import Chain, Outcome
from helpers.experiments import build, build_stage
from rlhf.pipeline.key import knobs
from rlhf.pipeline.metrics import Healthy, Metric, healthy_curves
from rlhf.report.page.collect import read_run, stage_charts
from rlhf.report.page.curves import Chart, Curve, healthy_range
from rlhf.stages.dpo import DpoStage
from rlhf.stages.reward import RewardStage

SHADED = {
    "sft": {"held_out_loss"},
    "reward": {"train_accuracy"},
    "ppo": {"held_out_score", "held_out_kl", "kl", "kl_k3", "explained_variance", "engine_mismatch"},
    "grpo": {"held_out_score", "held_out_kl", "kl", "kl_k3", "groups_without_spread", "engine_mismatch"},
    "dpo": {"held_out_loss", "held_out_accuracy", "held_out_margin", "train_accuracy", "train_margin"},
}
"""Stage -> curves of it that must have a shade."""
BARE = {"loss", "lr", "grad_norm", "tokens", "score", "entropy", "policy_loss", "value_loss"}
"""Curves of which the documentation names no range."""


@pytest.fixture(scope="module")
def charts(finished_chain: tuple[Chain, Outcome]) -> dict[str, dict[str, Chart]]:
    """Stage -> curve -> its chart, on the pages of small runs."""
    chain, first = finished_chain
    beside = chain.run(
        "stage=[grpo,dpo]", "grpo.steps=1", "grpo.batch_episodes=8", "grpo.minibatch_episodes=8",
        "dpo.beta=0.2", "dpo.gates.held_out_loss_change.max=-0.2", "gates=warn", "grpo.kl.coef=0.02",
    )  # fmt: skip
    assert beside.code == 0, beside.err
    runs = [read_run(outcome.directory) for outcome in (first, beside)]
    return {stage: {chart.y: chart for run in runs for chart in stage_charts(run, stage)} for stage in SHADED}


@pytest.mark.parametrize("stage", SHADED)
def test_each_training_stage_shades_curves_that_it_logs(
    stage: str, charts: dict[str, dict[str, Chart]]
) -> None:
    shaded = {name for name, chart in charts[stage].items() if chart.healthy}
    assert shaded >= SHADED[stage] and not shaded & BARE


def test_what_a_stage_says_of_its_curves_is_of_curves_that_it_logs(
    charts: dict[str, dict[str, Chart]],
) -> None:
    for name, stage in build().stages.items():
        if name in charts:
            healthy = {curve: each.healthy for curve, each in stage.metrics.items() if each.healthy}
            assert {*healthy} <= {*charts[name]}
            assert {each.gate for each in healthy.values() if each.gate} <= {*stage.gates}


def test_a_range_counts_from_the_start_or_is_that_of_a_gate_as_the_user_set_it(
    charts: dict[str, dict[str, Chart]],
) -> None:
    loss = charts["sft"]["held_out_loss"]
    (curve,) = loss.curves
    assert len(curve.x) == 2 and curve.x[0] == 0 and curve.y[0] is not None
    assert loss.bounds == (None, curve.y[0] - 0.001)
    (of_dpo,) = charts["dpo"]["held_out_loss"].curves
    assert of_dpo.x[0] == 0 and of_dpo.y[0] is not None
    assert charts["dpo"]["held_out_loss"].bounds == (None, of_dpo.y[0] - 0.2)


def test_a_gate_that_is_turned_off_shades_nothing() -> None:
    said = healthy_curves(build_stage(DpoStage, "dpo.gates.held_out_loss_change=null"))
    assert "held_out_loss" not in said and said["train_accuracy"] == Healthy(min=0.5)


def test_a_range_from_a_start_that_was_not_logged_is_none() -> None:
    late, lost = Curve("loss", [5.0, 9.0], [2.0, 1.0]), Curve("loss", [0.0, 9.0], [None, 1.0])
    assert healthy_range(late, None, -0.1, True) == healthy_range(lost, None, -0.1, True) == (None, None)
    assert healthy_range(late, 0.5, None, False) == (0.5, None)
    assert healthy_range(Curve("score", [0.0], [2.0]), 0.5, None, True) == (2.5, None)


def test_ranges_decide_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    known, shaded = knobs(build_stage(RewardStage)), Metric(healthy=Healthy(min=0.9), is_curve=True)
    monkeypatch.setattr(RewardStage, "metrics", {**RewardStage.metrics, "train_accuracy": shaded})
    assert knobs(build_stage(RewardStage)) == known and "0.9" not in json.dumps(known)


def test_an_older_run_has_only_the_shades_of_its_gates(as_finished: Path) -> None:
    (directory,) = (as_finished / "runs").iterdir()
    run = read_run(directory)
    run.healthy = {}
    assert [chart.y for chart in stage_charts(run, "sft") if chart.healthy] == []
    assert "kl" in [chart.y for chart in stage_charts(run, "ppo") if chart.healthy]


def test_a_page_of_the_documentation_says_each_range() -> None:
    docs = Path(__file__).parents[2] / "docs"
    stages = build().stages
    for name in (*SHADED, "trl"):
        pages = [docs / "stages" / f"{name}.md", docs / "algorithms" / f"{name}.md"]
        pages += [docs / "algorithms" / "ppo.md"] if name == "grpo" else []
        text = "\n".join(page.read_text() for page in pages if page.is_file())
        healthy = {curve: each.healthy for curve, each in stages[name].metrics.items() if each.healthy}
        for curve, each in healthy.items():
            lines = [line for line in text.splitlines() if f"`{curve}`" in line]
            ends = [f"{abs(end):g}" for end in (each.min, each.max) if end is not None]
            assert lines and all(re.search(rf"\b{re.escape(end)}\b", " ".join(lines)) for end in ends), curve
