"""A summary metric against its bound: passed, failed, or undecided because there are too few rows."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.config import Bound
from rlhf.evaluation.reward_model import Ranking, rank_quality
from rlhf.evaluation.sampled import Sampled
from rlhf.pipeline.run import GateResult, rounded_up

AT_LEAST, AT_MOST = Bound(min=0.5, advice="do this"), Bound(max=0.5, advice="do that")
BETWEEN = Bound(min=0.4, max=0.6, advice="do both")


def gate(bound: Bound, low: float, high: float, rows: int = 30, value: float | None = None) -> GateResult:
    value = (low + high) / 2 if value is None else value
    return GateResult("stage", "metric", value, bound, Sampled(value, low, high, rows))


@pytest.mark.parametrize(
    ("bound", "low", "high", "outcome"),
    [
        (AT_LEAST, 0.5, 0.7, "passed"),
        (AT_LEAST, 0.49, 0.7, "cannot tell"),
        (AT_LEAST, 0.3, 0.5, "cannot tell"),
        (AT_LEAST, 0.3, 0.49, "failed"),
        (AT_MOST, 0.3, 0.5, "passed"),
        (AT_MOST, 0.3, 0.51, "cannot tell"),
        (AT_MOST, 0.51, 0.7, "failed"),
        (BETWEEN, 0.4, 0.6, "passed"),
        (BETWEEN, 0.3, 0.7, "cannot tell"),
        (BETWEEN, 0.1, 0.39, "failed"),
        (BETWEEN, 0.61, 0.7, "failed"),
        (AT_LEAST, -math.inf, math.inf, "cannot tell"),
    ],
)
def test_the_whole_interval_decides(bound: Bound, low: float, high: float, outcome: str) -> None:
    assert gate(bound, low, high, value=0.5).outcome == outcome


@pytest.mark.parametrize(("value", "outcome"), [(0.5, "passed"), (0.49, "failed"), (math.nan, "failed")])
def test_a_figure_without_an_interval_is_compared_as_it_is(value: float, outcome: str) -> None:
    result = GateResult("stage", "metric", value, AT_LEAST)
    assert (result.outcome, result.more_rows) == (outcome, None)


def test_a_figure_that_is_not_a_number_fails_however_many_rows_it_has() -> None:
    assert gate(AT_LEAST, math.nan, math.nan).outcome == "failed"
    assert gate(AT_LEAST, -math.inf, math.inf, rows=0, value=math.nan).outcome == "cannot tell"


def test_32_pairs_that_are_right_as_often_as_the_longer_answer_tell_nothing() -> None:
    """20 of 32 each: 0.625."""
    right_B = torch.tensor([1.0] * 20 + [-1.0] * 12)
    zeros_B = torch.zeros(32)
    metrics = rank_quality(Ranking(right_B, zeros_B, right_B.roll(9), zeros_B, zeros_B * math.nan))
    assert metrics["accuracy"] == metrics["longer_wins_accuracy"] == 0.625
    bound = Bound(min=0.02, advice="give more pairs", rows="raise prepare.held_out_fraction")
    name = "accuracy_over_baseline"
    result = GateResult("reward", name, metrics[name], bound, Sampled.found(name, metrics))
    assert result.outcome == "cannot tell"
    assert result.sampled is not None
    half = (result.sampled.high - result.sampled.low) / 2
    assert result.more_rows == math.ceil(32 * (half / 0.02) ** 2 - 32)
    assert str(result).startswith("reward: accuracy_over_baseline = 0 (95%: -0.2")
    assert ", 32 rows), wanted >= 0.02. It is so near the bound that it would take about " in str(result)
    assert str(result).endswith(" more rows (raise prepare.held_out_fraction).")


def test_so_many_more_rows_would_tell() -> None:
    """30 rows reach 0.2 to each side; 0.1 from the bound, 4 times as many would just tell."""
    result = gate(AT_LEAST, 0.4, 0.8)
    assert result.more_rows == 90
    assert result.advice == "About 90 more rows like these would tell."


def test_the_side_towards_the_bound_decides_how_many() -> None:
    """Of a share that is 0 the interval is on one side of it: 0 to 0.194 of 16 rows."""
    result = gate(Bound(max=0.1, advice="do this"), 0.0, 0.1936, 16, 0.0)
    assert result.more_rows == math.ceil(16 * (1.936**2 - 1))


def test_a_figure_near_its_bound_asks_for_no_data() -> None:
    result = gate(AT_LEAST, 0.4, 0.61)
    assert result.advice.startswith("It is so near the bound that it would take about 14,000")
    assert result.advice.endswith(" more rows.") and result.outcome == "cannot tell"


@pytest.mark.parametrize(
    ("result", "advice"),
    [
        (gate(AT_LEAST, 0.4, 0.6), "The figure lies on the bound: no number of rows would tell."),
        (gate(AT_LEAST, -math.inf, math.inf, 1, 0.7), "These rows are too few to tell. Give more."),
        (
            gate(AT_LEAST, -1.0, 0.56, 2, -0.2),
            "These rows are too few to tell. Give more.",
        ),  # "about 3", by its width
        (gate(AT_LEAST, -math.inf, math.inf, 0, math.nan), "No row could be measured, so it has no value."),
        (gate(AT_LEAST, 0.1, 0.2), "Try: do this."),
        (gate(AT_LEAST, 0.6, 0.7), ""),
    ],
)
def test_what_to_do(result: GateResult, advice: str) -> None:
    assert result.advice == advice
    assert result.more_rows is None


def test_a_gate_that_does_not_apply_says_so_and_cannot_fail() -> None:
    result = GateResult("ppo", "first_kl", 3.0, AT_MOST, not_checked="the policy starts elsewhere")
    assert (result.outcome, result.as_json()["passed"]) == ("not checked", False)
    assert str(result) == "ppo: first_kl = 3, wanted <= 0.5. Does not apply: the policy starts elsewhere."
    assert GateResult("ppo", "first_kl", math.nan, AT_MOST, not_checked="so").figure == "-"


def test_summary_json_holds_the_interval() -> None:
    entry = gate(AT_LEAST, 0.4, 0.8).as_json()
    assert (entry["low"], entry["high"], entry["rows"], entry["more_rows"]) == (0.4, 0.8, 30, 90)
    assert (entry["outcome"], entry["passed"]) == ("cannot tell", False)
    assert gate(AT_LEAST, -math.inf, math.inf, 1, 0.7).as_json()["low"] is None
    assert GateResult("stage", "metric", 0.7, AT_LEAST).as_json()["rows"] is None


@pytest.mark.parametrize(("count", "shown"), [(7, 7), (99, 99), (101, 110), (12_345, 13_000)])
def test_an_estimate_shows_no_more_digits_than_it_knows(count: int, shown: int) -> None:
    assert rounded_up(count) == shown
