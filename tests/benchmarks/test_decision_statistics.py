"""The simulation of decisions runs, and its figures are those that selection.py promises."""

from __future__ import annotations

import sys

import decision_statistics
import pytest
import torch


def test_it_prints_its_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["decision_statistics.py", "--quick"])
    assert decision_statistics.main() == 0
    shown = capsys.readouterr().out
    assert shown.count("\n**") == 5 and "Beyond nominal: nothing." in shown


def test_judging_on_the_questions_that_chose_claims_more() -> None:
    torch.manual_seed(0)
    total = decision_statistics.simulate("none", 16, 200, correlation=0.3, spread=0.0, draws=1000)
    assert total["sealed false claim"] <= 25 + 3 * 5
    assert total["same alone false claim"] > 2 * total["sealed false claim"]
    assert total["same alone covered"] < 950 <= total["sealed all covered"]
