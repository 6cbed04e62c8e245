"""No page has more than 3 MB, whatever a run wrote; what has no room is said to be left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.pages import make_run
from rlhf.report.page.collect import RunFacts, Table, read_run
from rlhf.report.page.compared import runs_page
from rlhf.report.page.curves import Curve
from rlhf.report.page.size import (
    MAX_PAGE_BYTES,
    Limits,
    clipped,
    embedded,
    first_of,
    fitting,
    html_bytes,
    json_bytes,
)
from rlhf.report.page.write import Live, RunLine, list_page, run_page

LONG = {"less than": "<", "ampersand": "&", "Chinese": "\u6f22", "emoji": "\U0001f600", "quotes": "\"'"}


def data_of(page: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    return found


def checked(page: str) -> dict[str, Any]:
    """The data of a page that is small enough."""
    assert len(page.encode()) <= MAX_PAGE_BYTES == 3_000_000
    return data_of(page)


@pytest.mark.parametrize("text", LONG.values(), ids=[*LONG])
def test_answers_are_counted_as_they_stand_in_the_page(tmp_path: Path, text: str) -> None:
    page = run_page(read_run(make_run(tmp_path, text * 5000, num_prompts=400, num_steps=2)))
    rows = checked(page)["answers"]["rows"]
    assert 5 < len(rows) < 300 and rows[0]["answers"]["ppo"]["text"].startswith(text)
    assert f"{400 - len(rows)} more prompts are in artifacts/evaluate/comparison.jsonl" in page
    room = Limits().answers - sum(map(json_bytes, rows))
    assert 0 <= room < json_bytes(rows[0])  # not one more


def with_curves(run: RunFacts, curves: int, steps: int) -> RunFacts:
    x = [float(step) for step in range(steps)]
    made = {
        f"metric_{number}": Curve(f"metric_{number}", x, [1.2345678 * (step % 17) for step in range(steps)])
        for number in range(curves)
    }
    return replace(run, curves={"ppo": made | {"kl": Curve("kl", x, [*x])}})


@pytest.mark.slow
def test_300_runs_fit_and_the_page_says_what_is_left_out(tmp_path: Path) -> None:
    one = with_curves(read_run(make_run(tmp_path)), 40, 90)
    figures = {f"figure_{number}": 0.123 * number for number in range(200)}
    stages = [replace(stage, metrics={**stage.metrics, **figures}) for stage in one.stages]
    runs = [
        replace(one, name=f"trial-{number}", verdict=f"{number} <is> " + "what improved & what not, " * 40,
                stages=stages, changed=[{"key": "seed", "default": "0", "value": str(number)}])
        for number in range(300)
    ]  # fmt: skip
    page = runs_page(runs)
    charts = checked(page)["charts"]
    kl = next(each for each in charts.values() if each["y"] == "kl")
    assert len(kl["curves"]) == 300 and len(kl["curves"][0]["x"]) == 20
    assert all(f'<figure class="chart" id="{name}">' in page for name in charts)
    assert page.count('<figure class="chart"') == len(charts)
    left_out = 41 - sum(each["y"].startswith(("metric", "kl")) for each in charts.values())
    assert left_out > 0 and f"{left_out} more charts have no room on this page" in page
    assert "20 points are shown" in page and "more rows have no room on this page" in page
    shown = page.count('<div class="verdict')
    assert 100 < shown < 300 and f"{300 - shown} more verdicts have no room on this page" in page


def test_a_few_runs_lose_nothing(tmp_path: Path) -> None:
    one = with_curves(read_run(make_run(tmp_path)), 20, 90)
    for page in (runs_page([one, replace(one, name="other")]), run_page(one)):
        kl = next(each for each in checked(page)["charts"].values() if each["y"] == "kl")
        assert len(kl["curves"][0]["x"]) == 90
        assert "no room" not in page and "points are shown" not in page


def grown(text: str, number: int) -> Callable[[RunFacts], RunFacts]:
    """All that a run may have too much of."""

    def change(run: RunFacts) -> RunFacts:
        gate = {**run.gates[0], "advice": text, "name": text[:200], "outcome": "failed"}
        figures: dict[str, float | None] = {f"{text[:90]} {each}": 1.0 for each in range(number)}
        return with_curves(
            replace(
                run, verdict=text, gates=[gate] * number, stages=[
                    replace(stage, metrics={**stage.metrics, **figures}) for stage in run.stages
                ],
                changed=[{"key": f"key.{each}", "default": text, "value": text} for each in range(number)],
            ),
            number, 40,
        )  # fmt: skip

    return change


@pytest.mark.parametrize("text", ["<" * 90_000, "\u6f22" * 90_000], ids=["less than", "Chinese"])
def test_a_run_with_too_much_of_everything_fits(tmp_path: Path, text: str) -> None:
    run = grown(text, 1000)(read_run(make_run(tmp_path, text[:5000], num_prompts=60)))
    for page in (run_page(run), runs_page([run, replace(run, name="other")])):
        assert checked(page)["charts"]
        assert "rows have no room on this page" in page and "charts have no room on this page" in page
    assert "more gates have no room" in run_page(run) and "more keys have no room" in run_page(run)


def test_a_list_of_very_many_runs_fits() -> None:
    names = [f"run-{number}" for number in range(20_000)]
    rows = [RunLine(name, f"/run/{name}", "done", "now", "", "<" * 90) for name in names]
    page = list_page("Runs", rows, Live("", [], "stamp"))
    checked(page)
    shown = page.count('href="/run/')
    assert shown > 1000 and f"{20_000 - shown} more runs have no room on this page" in page


@pytest.mark.slow
def test_what_never_fits_has_a_page_that_says_so(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path))
    more = [replace(run.stages[0], name=f"stage-{number}", metrics={}) for number in range(12_000)]
    page = run_page(replace(run, stages=[*run.stages, *more]))
    assert "This has no room on a page of 3 MB" in page and checked(page)["charts"] == {}
    assert "<h1>Run demo</h1>" in page


def test_limits_shrink_until_the_page_fits() -> None:
    asked = []

    def make(limits: Limits) -> str:
        asked.append(limits.rows)
        return "\u6f22" * limits.rows * 10

    assert len(fitting(make, lambda: "none").encode()) <= MAX_PAGE_BYTES
    assert asked == [250_000, 125_000, 62_500]
    assert fitting(lambda limits: "x" * (MAX_PAGE_BYTES + 1), lambda: "none") == "none"


def test_sizes_are_those_of_the_page() -> None:
    assert json_bytes("<\u6f22") == len('"\\u003c\u6f22",'.encode()) == 12
    assert embedded(["<"]) == '["\\u003c"]'
    assert html_bytes(["<a>", "b"], 5) == len("&lt;a&gt;") + 1 + 10
    assert first_of([3, 4, 1], 7, lambda item: item) == [3, 4]
    assert first_of([9, 1], 7, lambda item: item) == []
    assert clipped("abcdef", 4) == "abcd ... (2 more characters)" and clipped("abcd", 4) == "abcd"
    table = Table(["a"], [["x" * 20], ["y"]]).within(replace(Limits(), characters=5, rows=40))
    assert (table.rows, table.left_out) == ([["xxxxx ... (15 more characters)"]], 1)
