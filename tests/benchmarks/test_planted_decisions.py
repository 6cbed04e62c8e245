"""How a planted decision is judged, and what it would have cost to train every candidate."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import planted_decisions
import pytest
from planted_decisions import CASES, EMBEDDED, Case, grid_seconds, summary, table


def candidate(name: str, state: str, **more: Any) -> dict[str, Any]:
    return {
        "name": name, "state": state, "why": "", "trained": name not in ("base", "few_shot", "retrieval"),
        "share": None, "train_seconds": None, "quality": None, "gain": None, "limits_over": [],
        "retention_perplexity_ratio": None,
    } | more  # fmt: skip


def pilot(
    name: str, seconds: float, part: str = "choosing", ended: str = "done", **stages: float
) -> dict[str, Any]:
    return {"candidate": name, "part": part, "seconds": seconds, "ended": ended, "stages": stages}


def decision(outcome: str | None, winner: str | None = None, *candidates: dict[str, Any]) -> dict[str, Any]:
    return {
        "outcome": outcome, "winner": winner, "untrained": "base", "candidates": [*candidates],
        "questions": {"choosing": 100, "sealed": 50}, "sentences": [],
        "pilots": [pilot("base", 3.0, evaluate=2.0)],
    }  # fmt: skip


SFT_OVER = candidate("sft", "refused", limits_over=["retention_perplexity_ratio"])


@pytest.mark.parametrize(
    ("case", "outcome", "winner", "is_right"),
    [
        ("nothing", "no training", None, True),
        ("nothing", "cannot be told", None, False),
        ("nothing", "ship", "sft", False),
        ("coin", "cannot be told", None, True),
        ("coin", "ship", "dpo", False),
        ("coin", None, None, False),  # it did not come to an end
        ("form", "ship", "sft_lora", True),
        ("form", "no training", None, False),
        ("task", "ship", "rloo", True),
        ("task", "ship", "sft", False),
        ("equal", "ship", "sft", True),
        ("equal", "ship", "slower", False),
        ("enough", "ship", "sft", True),
        ("enough", "ship", "longer", False),
        ("slow", "ship", "careful", True),
        ("slow", "ship", "sft", False),
        ("hack", "no training", None, True),
        ("hack", "ship", "grpo", False),
        ("contaminated", "ship", "sft", False),
        ("hidden", "no training", None, True),
    ],
)
def test_only_the_right_result_is_right(
    case: str, outcome: str | None, winner: str | None, is_right: bool
) -> None:
    assert CASES[case].is_right(decision(outcome, winner)) is is_right


@pytest.mark.parametrize(
    ("untrained", "outcome", "winner", "is_right"),
    [
        ("retrieval", "no training", None, True),
        ("retrieval", "ship", "sft_retrieval", True),
        ("retrieval", "ship", "sft", False),
        ("base", "no training", None, False),
    ],
)
def test_notes_are_looked_up(untrained: str, outcome: str, winner: str | None, is_right: bool) -> None:
    assert CASES["notes"].is_right(decision(outcome, winner) | {"untrained": untrained}) is is_right


def test_who_forgets_must_be_refused_for_it() -> None:
    is_right = CASES["forgets"].is_right
    assert is_right(decision("no training", None, SFT_OVER))
    assert is_right(decision("ship", "sft_lora", SFT_OVER, candidate("sft_lora", "winner")))
    assert not is_right(decision("no training", None, candidate("sft", "worse")))
    assert not is_right(decision("no training", None, SFT_OVER | {"limits_over": ["stop_rate"]}))


def test_the_grid_trains_and_asks_every_candidate_that_had_a_pilot() -> None:
    made = decision("ship", "sft", candidate("base", "compared"))
    made["candidates"] += [
        candidate("sft", "winner", share=1.0, train_seconds=8.0),
        candidate("sft_lora", "worse", share=0.25, train_seconds=3.0),
        candidate("grpo", "cut"),
        candidate("dpo", "cannot run"),
    ]
    made["pilots"] += [
        pilot("sft", 5.0, sft=2.0, evaluate=2.0),
        pilot("sft", 9.0, sft=4.0, evaluate=4.0),
        pilot("sft", 3.0, "sealed", evaluate=2.0),
        pilot("sft_lora", 6.0, sft=3.0, evaluate=2.0),
        pilot("grpo", 90.0, ended="stopped", grpo=80.0),
    ]
    # asked 150 questions instead of 100, and 1 s outside the stages of each
    base, sft, lora = 2 * 1.5 + 1, 8 + 3 * 1.5 + 1, 3 / 0.25 + 2 * 1.5 + 1
    assert grid_seconds(made) == pytest.approx(base + sft + lora)
    found = summary(CASES["form"], made, 0, 120.0, "")
    assert found["of_grid"] == pytest.approx((3 + 5 + 9 + 3 + 6 + 90) / (base + sft + lora))
    assert (found["right"], found["came"], found["pilots"]) == (True, "ship: sft", 6)


def test_an_error_is_right_only_where_the_data_are_at_fault() -> None:
    unfinished = decision(None)
    error = "Error: evaluate.prompts: 3 of its questions stand in sft.data."
    assert summary(CASES["hidden"], unfinished, 2, 5.0, error)["right"]
    assert not summary(CASES["hidden"], unfinished, 1, 5.0, error)["right"]
    assert not summary(CASES["hidden"], unfinished, 2, 5.0, "sft.data has 3\nError: seed=x: no number")[
        "right"
    ]
    assert not summary(CASES["form"], None, 2, 5.0, error)["right"]


def test_the_table_says_what_was_wrong() -> None:
    right = summary(CASES["form"], decision("ship", "sft", candidate("base", "compared")), 0, 61.2, "")
    wrong = summary(CASES["form"], decision("no training", None, candidate("base", "compared")), 0, 7.0, "")
    line = table({"form": {"0": right, "1": wrong}}).splitlines()[-1]
    assert line.startswith("| form | ship SFT | ship: sft; **wrong:** no training: base | 61, 7 | 1, 1 | ")


@pytest.mark.parametrize("cases", [CASES, EMBEDDED])
def test_every_case_writes_the_same_data_again(cases: Mapping[str, Case], tmp_path: Path) -> None:
    for name, case in cases.items():
        contents = []
        for place in (tmp_path / name / "once", tmp_path / name / "again"):
            place.mkdir(parents=True)
            case.write(place, f"{name} 0")
            contents.append({path.name: path.read_bytes() for path in place.iterdir()})
        assert contents[0] == contents[1] and "asked.jsonl" in contents[0]


@pytest.mark.parametrize("cases", [CASES, EMBEDDED])
def test_who_is_asked_has_not_been_taught(cases: Mapping[str, Case], tmp_path: Path) -> None:
    """Except where that is the planted fault."""
    for name in sorted({*cases} - {"contaminated", "hidden"}):
        place = tmp_path / name
        place.mkdir()
        cases[name].write(place, f"{name} 0")
        asked = (place / "asked.jsonl").read_text()
        prompts = {line.split('"')[3] for line in asked.splitlines()}
        for path in place.glob("*.jsonl"):
            if path.name not in ("asked.jsonl", "corpus.jsonl", "sentences.jsonl"):
                assert not any(prompt in path.read_text() for prompt in prompts), f"{name}: {path.name}"


def test_judging_changes_nothing() -> None:
    made = decision("ship", "sft", candidate("base", "compared"))
    before = copy.deepcopy(made)
    planted_decisions.summary(CASES["form"], made, 0, 1.0, "")
    assert made == before
