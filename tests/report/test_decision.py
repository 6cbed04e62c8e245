"""The page of a decision: what it shows, what it leaves out, and that no text of it becomes HTML."""

from __future__ import annotations

import copy
import math
import re
from itertools import pairwise
from typing import Any

import pytest

from helpers.decisions import FIGURES, begun, candidate, decided, estimated, pilot
from helpers.html import Page
from rlhf.report.decision import decision_markdown, decision_page
from rlhf.report.decision_facts import decision_cells, ranking
from rlhf.report.decision_pictures import picture_of, strips_of, timeline_of
from rlhf.report.page.drawings import Box, Span, plain, shortened, text_width, time_ticks, timeline
from rlhf.report.page.size import MAX_PAGE_BYTES

HOSTILE = "</script><img src=x onerror=alert(1)>'\"<svg onload=alert(1)>{{ 7*7 }}"


def page_of(decision: dict[str, Any]) -> Page:
    return Page(decision_page(decision))


def with_text(value: Any, text: str, key: str = "") -> Any:
    """The decision with a text behind each of its texts, but for the words whose values are fixed."""
    if isinstance(value, dict):
        return {key: with_text(item, text, key) for key, item in value.items()}
    if isinstance(value, list):
        return [with_text(item, text, key) for item in value]
    is_fixed = not value or key in ("outcome", "state", "part", "ended")
    return value if is_fixed or not isinstance(value, str) else value + text


def table(decision: dict[str, Any]) -> dict[str, dict[str, str]]:
    cells = decision_cells(decision)
    return {row[0]: dict(zip(cells.headings, row, strict=True)) for row in cells.rows}


def test_the_result_comes_first_then_the_command() -> None:
    page = page_of(decided())
    words = page.said
    order = [
        "Ship SFT, LoRA: it gains", "It forgets little", "python -m rlhf recipe=sft", "runs/decision-sft",
        "64 choose, 32 sealed", "at least 0.1", "28.3 min of 30 min spent", "7 candidates: 1 winner",
        "Better is higher", "Each bar is a pilot", "GRPO was cut at 25%", "Each is a run",
    ]  # fmt: skip
    assert sorted(order, key=words.index) == order
    assert page.ids.count("command") == 1 and len(page.ids) == len(set(page.ids))


def test_nothing_is_loaded_and_no_style_needs_a_looser_policy() -> None:
    page = page_of(decided())
    assert not [each for _, each in page.elements if "src" in each or "style" in each]
    links = [str(each["href"]) for each in page.of("a") if not str(each["href"]).startswith("#")]
    assert links[:2] == ["../decision-sft_lora-25/report.html", "../decision-sft-25/report.html"]
    assert len(links) == 9


def test_the_winner_is_first_and_each_state_says_why() -> None:
    decision = decided()
    assert [each["name"] for each in ranking(decision)] == [
        "sft_lora", "sft", "few_shot", "base", "dpo", "grpo", "ppo",
    ]  # fmt: skip
    rows = table(decision)
    assert rows["SFT, all weights"]["state"] == (
        "finalist: its gain may be too small; over its limit: retention perplexity ratio"
    )
    assert rows["base, few-shot"]["state"] == "untrained: the best without training"
    assert rows["PPO"]["state"] == "refused: it needs a reward model: set reward.path"


def test_figures_have_the_digits_that_matter() -> None:
    rows = table(decided())
    assert rows["SFT, LoRA"] | {"state": ""} == {
        "candidate": "SFT, LoRA", "state": "", "trained": "100%", "quality": "0.71 (0.62 to 0.80)",
        "gain": "+0.24 (+0.12 to +0.36)", "forgets": "perplexity +1.2% (accuracy -0.4%)",
        "latency": "820 ms (p95 1.31 s)", "cost of 1000": "0.013", "training": "5.02 min",
    }  # fmt: skip
    assert set(rows["PPO"].values()) == {"PPO", rows["PPO"]["state"], "-"}
    assert table({**decided(), "smallest_gain": 0.01})["GRPO"]["quality"] == "0.550 (0.450 to 0.650)"
    assert "12,346 (9,000 to never)" in page_of(decided()).said


def test_a_quality_from_few_of_the_questions_says_so() -> None:
    few = decided()
    next(each for each in few["candidates"] if each["name"] == "grpo")["quality"]["rows"] = 7
    assert table(few)["GRPO"]["quality"] == "0.55 (0.45 to 0.65, 7 of 64 questions)"


def test_columns_without_a_value_are_left_out() -> None:
    assert decision_cells(begun()).headings == ["candidate", "state", "trained", "quality", "training"]
    headings = [each for each in page_of(begun()).of("th") if each.get("role") == "columnheader"]
    assert len(headings) == 4


def test_an_unfinished_decision_shows_its_progress() -> None:
    page = page_of(begun())
    assert (
        "Not decided yet. 4 candidates: 2 running, 1 untrained, 1 waiting. 3.17 min of 30 min spent."
        in page.said
    )
    assert not page.ids.count("command") and not page.ids.count("more")
    drawn = timeline_of(begun())
    assert drawn is not None and "running" in drawn.looks
    (_, wide), _ = drawn.drawings
    running = wide.rows[1].bars[0]
    assert wide.now == pytest.approx(running.x + running.width + 1, abs=0.2)  # it reaches to the present


def test_a_decision_that_has_just_begun_has_a_page() -> None:
    empty = {
        **begun(), "candidates": [], "pilots": [], "judge": None, "smallest_gain": None, "seeds": None,
        "questions": {"choosing": None, "sealed": None}, "budget": {"seconds": None, "spent": None},
    }  # fmt: skip
    page = page_of(empty)
    assert "Not decided yet." in page.said and "None yet." in page.said
    assert not set(page.ids) & {"picture", "budget", "pilots", "more"}
    assert decision_markdown(empty) == "**Not decided yet.**\n"


@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
def test_a_figure_that_is_not_known_is_a_dash(missing: float | None) -> None:
    decision = decided()
    estimates = ("gain", "gain_over_base", "quality")
    none = {"value": missing, "low": missing, "high": missing, "rows": 0}
    for each in decision["candidates"]:
        each |= {key: none if key in estimates and missing is not None else missing for key in FIGURES}
        each["break_even"] = None
    for each in decision["pilots"]:
        each |= {"seconds": missing, "predicted": missing, "share": missing}
    page = page_of(decision)
    assert not re.search(r"\b(nan|inf|None)\b", page.said)
    assert "picture" not in page.ids and "budget" in page.ids


def test_far_costs_are_drawn_on_a_logarithmic_axis() -> None:
    decision = decided()
    decision["candidates"][1]["cost_per_thousand"] = 1.2
    picture = picture_of(decision)
    assert picture is not None
    wide = picture.drawings[0][1]
    assert wide.is_log and [tick.text for tick in wide.x_ticks] == [
        "0.01",
        "0.02",
        "0.05",
        "0.1",
        "0.2",
        "0.5",
        "1",
    ]
    gaps = [second.at - first.at for first, second in pairwise(wide.x_ticks)]
    assert gaps[0] == pytest.approx(gaps[2], abs=0.2)  # twice as much is as far everywhere
    assert "cost of 1000 answers, logarithmic" in page_of(decision).said


def test_training_that_never_pays_off() -> None:
    decision = decided()
    decision["candidates"][3]["break_even"] = dict.fromkeys(("value", "low", "high"), "never")
    assert " never " in page_of(decision).said


def test_no_text_becomes_html() -> None:
    usual, hostile = page_of(decided()), page_of(with_text(decided(), HOSTILE))
    drawn = ("path", "text")  # a long label has a line to its point, or no room
    tags = [[tag for tag, _ in page.elements if tag not in drawn] for page in (usual, hostile)]
    assert tags[0] == tags[1]
    assert not [each for _, each in hostile.elements if any(key.startswith("on") for key in each)]
    assert f"SFT, LoRA{HOSTILE}" in hostile.said and "49" not in hostile.said
    for each in hostile.of("a"):
        assert re.match(r"#[a-z]+$|\.\./decision-[\w.%/-]+/report\.html$", str(each["href"])), each
    assert page_of(with_text(begun(), HOSTILE))


def test_control_characters_and_secrets_are_not_shown() -> None:
    page = decision_page(
        with_text(decided(), "\x1b[31m\u202e api_key=sk-abcdefghijklmnopqrstuvwxyz0123456789")
    )
    assert "\x1b" not in page and "\u202e" not in page and "abcdefghijklmnopqrstuvwxyz0123456789" not in page


def test_the_largest_decision_fits() -> None:
    decision = decided()
    decision["candidates"] = [
        {**copy.deepcopy(decision["candidates"][number % 7]), "name": str(number), "title": "<" * 9000}
        for number in range(200)
    ]
    decision["pilots"] = [
        pilot(str(number % 200), 0.5, 3.0 * number, 3.0, run="&" * 900) for number in range(1000)
    ]
    page = decision_page(decision)
    assert len(page.encode()) <= MAX_PAGE_BYTES
    assert "200 candidates" in page and "more pilots have no room" in page


def test_cost_is_drawn_if_most_have_one_else_training_time() -> None:
    decision = decided()
    picture = picture_of(decision)
    assert picture is not None and picture.x == "cost of 1000 answers" and picture.missing == ["PPO"]
    assert picture.looks == {"trained", "untrained", "winner", "dropped"}
    for each in decision["candidates"][:4]:
        each["cost_per_thousand"] = None
    picture = picture_of(decision)
    assert picture is not None and picture.heading == "Quality over training time"
    wide = picture.drawings[0][1]
    at = {each.point.title: each.x for each in wide.points}
    assert at["base"] == at["base, few-shot"] < at["DPO"] < at["SFT, all weights"]
    assert [tick.text for tick in wide.x_ticks] == ["0", "2 min", "4 min", "6 min"]


def test_the_green_begins_where_a_gain_is_worth_having() -> None:
    picture = picture_of(decided())
    assert picture is not None
    wide = picture.drawings[0][1]
    by_title = {each.point.title: each for each in wide.points}
    per_unit = (by_title["base"].y - by_title["base, few-shot"].y) / (0.46 - 0.3)
    assert wide.threshold == pytest.approx(by_title["base, few-shot"].y - 0.1 * per_unit, abs=0.3)
    strip = strips_of(decided())["sft"]
    assert strip.interval is not None and strip.worth is not None
    assert strip.zero < strip.interval[0] < strip.worth < strip.value < strip.interval[1]


def test_labels_of_points_side_by_side_do_not_cover_each_other() -> None:
    decision = decided()
    decision["candidates"] = [
        candidate(f"c{number}", "finalist", title=f"SFT, LoRA of rank {number}",
                  quality=estimated(0.5 + 0.01 * (number % 3), 0.05), cost_per_thousand=1.0 + 0.01 * number)
        for number in range(12)
    ]  # fmt: skip
    picture = picture_of(decision)
    assert picture is not None
    wide = picture.drawings[0][1]
    boxes = []
    for each in wide.points:
        width = text_width(each.text)
        left = each.text_x - {"start": 0, "middle": width / 2, "end": width}[each.anchor]
        boxes.append(Box(left, each.text_y - 12, left + width, each.text_y + 4))
        assert boxes[-1].outside(wide.area) == 0
    assert not [1 for at, box in enumerate(boxes) for other in boxes[:at] if box.overlap(other) > 0]


def test_pilots_at_the_same_time_get_lanes_of_their_own() -> None:
    spans = [Span(start, 10.0, "choosing", ["25%"], "") for start in (0.0, 5.0, 10.0)]
    drawn = timeline([("one", spans)], width=860, budget=40.0, now=None)
    first, third, second = drawn.rows[0].bars
    assert first.y == third.y < second.y
    assert first.x + first.width <= third.x
    assert drawn.budget is not None and drawn.budget > third.x + third.width


def test_a_text_that_has_no_room_is_left_out() -> None:
    spans = [Span(0.0, 1.0, "sealed", ["sealed #0", "sealed"], ""), Span(6.0, 30.0, "sealed", ["sealed"], "")]
    first, second = timeline([("one", spans)], width=860, budget=60.0, now=None).rows[0].bars
    assert (first.text, second.text) == ("sealed", "sealed") and first.is_beside and not second.is_beside
    first, _ = timeline([("one", spans)], width=350, budget=60.0, now=None).rows[0].bars
    assert first.text == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.0131, "0.0131"), (0.012, "0.012"), (12.0, "12"), (1234.6, "1,235"), (1e-5, "1e-05"),
     (0.00012, "0.00012"), (2.5e7, "2.5e+07")],
)  # fmt: skip
def test_a_cost_has_three_digits(value: float, text: str) -> None:
    assert plain(value) == text


def test_times_on_an_axis_share_their_unit() -> None:
    assert [tick.text for tick in time_ticks(1800.0, 4)] == ["0", "10 min", "20 min", "30 min"]
    assert [tick.text for tick in time_ticks(75.0, 3)] == ["0", "30 s", "60 s"]
    assert [tick.text for tick in time_ticks(200_000.0, 4)] == ["0", "1 day", "2 days"]


def test_the_end_of_a_long_title_stays() -> None:
    text = shortened("SFT, LoRA of rank 16, learning rate 2e-4", 150.0)
    assert text.startswith("SFT, LoRA") and text.endswith("2e-4") and text_width(text) <= 150.0


def test_markdown_has_the_result_the_command_and_the_table() -> None:
    text = decision_markdown(decided())
    assert text.startswith("**Ship SFT, LoRA: it gains 0.24")
    assert "```\npython -m rlhf recipe=sft peft=lora" in text
    assert "| SFT, LoRA | winner | 100% | 0.71 (0.62 to 0.80) | +0.24" in text
    assert text.endswith("- GRPO was cut at 25% of its length: 12 more minutes would train it to the end.\n")
    assert "\n````\n" in decision_markdown({**decided(), "command": "echo ```"})
