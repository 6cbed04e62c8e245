"""The time left is printed again when steps take longer or shorter than predicted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import rlhf.pipeline.forecast
from rlhf.pipeline.forecast import Forecast, Prediction


class Watched:
    """A forecast of a run whose clock the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **expected: float | Prediction) -> None:
        self.now = 1000.0
        monkeypatch.setattr(rlhf.pipeline.forecast, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.said: list[str] = []
        self.told: dict[str, Any] = {}
        predicted = {
            name: each if isinstance(each, Prediction) else Prediction(each)
            for name, each in expected.items()
        }
        self.forecast = Forecast(predicted, lambda **said: self.told.update(said), self.said.append)

    def stage(
        self, name: str, steps: int, each: float, *, is_main: bool = True, before: float = 0.0, done: int = 0
    ) -> None:
        """Run a stage with this number of steps, and these seconds for each.

        Args:
            before: how much longer the first step takes.
            done: steps that an earlier attempt did.
        """
        self.forecast.begin(name)
        self.now += before
        for step in range(done + 1, steps + 1):
            self.now += each
            self.forecast.update(task=name, done=step, total=steps, is_main=is_main)
        self.forecast.end()


def test_what_goes_as_predicted_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Watched(monkeypatch, sft=100.0, ppo=400.0)
    run.stage("sft", 10, 12.0)
    run.stage("ppo", 10, 40.0)
    assert run.said == []


def test_a_few_steps_correct_what_was_predicted_of_them_and_of_later_stages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Watched(monkeypatch, sft=100.0, ppo=400.0)
    run.stage("sft", 10, 40.0)
    # after four of ten steps: 30 s count as predicted, so (30 + 400) / (30 + 100) = 3.3 times as long
    assert run.said == ["About 26:03 to go, by what it took so far: sft 4:00, ppo 22:03."]
    assert run.told["expected"]["ppo"] == pytest.approx(400 * 430 / 130)
    run.stage("ppo", 10, 130.0)
    assert len(run.said) == 1, run.said  # as was said then


def test_a_run_that_is_faster_than_predicted_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Watched(monkeypatch, sft=2000.0, ppo=4000.0)
    run.stage("sft", 10, 20.0)
    assert run.said == ["About 9:33 to go, by what it took so far: sft 2:00, ppo 7:33."]


def test_a_first_step_that_also_starts_an_engine_says_nothing_of_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Watched(monkeypatch, ppo=1000.0)
    run.stage("ppo", 100, 9.0, before=150.0)
    assert run.said == []


def test_a_stage_with_tasks_that_say_little_of_it_counts_when_it_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Watched(monkeypatch, generate=100.0, ppo=400.0)
    run.stage("generate", 10, 40.0, is_main=False)
    assert run.said == ["About 22:03 to go, by what it took so far: ppo 22:03."]


def test_seconds_of_loading_say_nothing_of_a_stage_of_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Watched(monkeypatch, sft=1.0, ppo=400.0)
    run.stage("sft", 3, 4.0)
    assert run.said == []


def test_stages_of_which_nothing_is_predicted_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Watched(monkeypatch, label=0.0, ppo=400.0)
    run.stage("prepare", 3, 5.0)
    run.stage("label", 3, 5000.0)  # people take their time
    run.stage("ppo", 10, 40.0)
    assert run.said == []


def test_of_a_resumed_stage_all_attempts_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine takes twice as long as predicted, before and after the stop."""
    run = Watched(monkeypatch, ppo=Prediction(1000.0, 990.0, 0.5), evaluate=500.0)
    assert run.told["expected"] == {"ppo": 500.0, "evaluate": 500.0}
    run.stage("ppo", 100, 20.0, done=50)
    first, *_ = run.said
    assert first.startswith("About 31:41 to go"), first  # 46 steps of 20 s and nearly twice 500 s


def test_what_another_run_makes_meanwhile_is_not_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Watched(monkeypatch, sft=600.0, reward=600.0, ppo=400.0)
    run.forecast.skip("sft")
    run.forecast.skip("reward")
    run.stage("ppo", 10, 40.0)
    assert run.said == []
    run = Watched(monkeypatch, sft=600.0, reward=600.0, ppo=400.0)
    run.forecast.skip("sft")
    run.forecast.skip("reward")
    run.stage("ppo", 10, 80.0)
    assert run.said == ["About 8:00 to go, by what it took so far: ppo 8:00."]
