"""A budget in seconds, and what pilots take."""

from __future__ import annotations

import pytest

from rlhf.config import ConfigError
from rlhf.decide.pace import Pace, budget_seconds


@pytest.mark.parametrize(
    ("budget", "seconds"),
    [
        ("90s", 90.0),
        ("30m", 1800.0),
        ("30 min", 1800.0),
        ("2h", 7200.0),
        (" 1.5H ", 5400.0),
        (".5d", 43200.0),
        ("16gpuh", 14400.0),  # over 4 ranks: 4 hours
        ("20", 36000.0),  # at 2 per hour: 10 hours
        (20.0, 36000.0),
    ],
)
def test_a_budget_by_hand(budget: str | float, seconds: float) -> None:
    assert budget_seconds(budget, price_per_hour=2.0, ranks=4) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "budget", ["soon", "", "2 weeks", "30m later", "1h30m", "1e3", "nan", "inf", "-5m", "0", "0s", 0.0, -1.0]
)
def test_no_budget_is_told_in_the_users_key(budget: str | float) -> None:
    with pytest.raises(
        ConfigError, match=rf"^budget={budget}: give a time such as 90s, 30m or 2h, GPU hours"
    ):
        budget_seconds(budget, price_per_hour=2.0, ranks=4)


def test_the_pace_by_hand() -> None:
    """5 seconds count as predicted correctly, so (5 + taken) / (5 + predicted) corrects a prediction."""
    pace = Pace()
    assert pace.seconds({"sft": 7.0, "evaluate": 3.0}) == 10.0 and pace.overhead == 0.0
    pace.add({"sft": 10.0, "evaluate": 20.0}, {"sft": 25.0, "evaluate": 15.0}, seconds=46.0)
    assert pace.factor("sft") == pytest.approx(30 / 15)
    assert pace.factor("evaluate") == pytest.approx(20 / 25)
    assert pace.factor("ppo") == pytest.approx(45 / 35)  # unseen: all stages together
    assert pace.overhead == 6.0
    assert pace.seconds({"sft": 4.0, "ppo": 7.0}) == pytest.approx(6 + 8 + 9)


def test_short_answers_do_not_make_training_faster() -> None:
    """A model that ends its answers early is asked in less time, and trains no faster."""
    pace = Pace()
    pace.add({"evaluate": 125.0}, {"evaluate": 37.0}, seconds=38.0)
    assert pace.factor("evaluate") < 0.35
    assert pace.factor("sft") == 1.0


def test_named_instances_are_of_their_kind_and_overheads_are_averaged() -> None:
    pace = Pace()
    pace.add({"sft": 5.0}, {"sft": 15.0}, seconds=17.0)
    pace.add({"sft@2": 10.0}, {"sft@2": 5.0}, seconds=11.0)
    assert pace.factor("sft") == pytest.approx(25 / 20)
    assert pace.seconds({"sft@3": 8.0}) == pytest.approx(4 + 10)


def test_a_stage_that_was_in_the_store_corrects_nothing() -> None:
    pace = Pace()
    pace.add({"sft": 100.0, "evaluate": 5.0}, {"evaluate": 5.0}, seconds=4.0)
    assert pace.factor("sft") == pace.factor("evaluate") == 1.0
    assert pace.overhead == 0.0  # never below 0, whatever the clocks say
