"""report.html: one file with everything, that loads nothing and runs nothing that a model wrote."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from helpers.html import Page
from helpers.pages import make_run
from rlhf.report.page.collect import (
    COMPARED_METRICS,
    cleaned,
    compared_table,
    over_kl,
    policy_table,
    read_run,
    stage_charts,
)
from rlhf.report.page.curves import Curve
from rlhf.report.page.size import embedded
from rlhf.report.page.write import DOCS, NAME, linked, run_page, write_page

HOSTILE = (
    "</script><script>document.title='owned'</script>", "<img src=x onerror=alert(1)>", "\u2028\u2029",
    "]]><!--", "{{ 7*7 }}{% raw %}", "\x1b[31m\u202e", "'\"><svg onload=alert(1)>",
)  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def page_of(run: Path) -> Page:
    return Page(write_page(run).read_text(encoding="utf-8"))


def test_every_panel_has_its_place(run: Path) -> None:
    page = page_of(run)
    for part in (
        "verdict", "lineage", "policies", "answers", "optimization", "calibration", "forgetting", "curves",
        "gates", "cost", "changed", "figures",
    ):  # fmt: skip
        assert part in page.ids
    assert len(page.ids) == len(set(page.ids))
    anchors = {str(each["href"])[1:] for each in page.of("a")}
    assert anchors <= {*page.ids}
    assert "It did not work. Improved: all of it." in page.said
    assert "ppo/kl is 30 (25 to 35, 9 rows), wanted <= 20. Try: raise ppo.kl.coef." in page.said
    assert "base sft I love it. gold score" in page.said  # ppo's title; of sft there is none
    assert "reads sft, reward" in page.said and "0123456789abcdef" in page.said
    assert page.data["answers"]["titles"] == {"base": "base", "ppo": "I love it."}
    charts = page.data["charts"]
    titles = {each["y"]: each for each in charts.values()}
    assert titles["kl"]["high"] == 20.0 and titles["kl"]["low"] is None
    assert titles["score"]["curves"][-1]["name"].startswith("gold score")
    assert titles["score"]["curves"][-1]["x"] == [0.0, 0.5, 3.0]  # the start first: nobody measures its KL
    assert len([*page.of("figure")]) == len(charts)


def test_what_is_not_there_is_left_out(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    for name in ("reward", "ppo", "evaluate"):
        del summary["stages"][name], summary["reads"][name]
        (run / "artifacts" / name).unlink()
    (run / "summary.json").write_text(json.dumps(summary | {"gates": [], "verdict": None, "outcome": None}))
    (run / "metrics.jsonl").unlink()
    page = page_of(run)
    left = {"policies", "answers", "optimization", "calibration", "forgetting", "curves", "gates"}
    assert not left & {*page.ids}
    assert "This run has not ended." in page.said


def test_gold_is_shown_over_the_kl_of_each_step_that_has_both(run: Path) -> None:
    steps = [(0, 0.0, 0.2), (4, 6.0, 0.9), (8, 4.0, 0.8), (12, None, 0.7), (16, 9.0, None)]
    rows = [json.dumps({"policy": "ppo", "step": step, "kl": kl, "gold": gold}) for step, kl, gold in steps]
    (run / "artifacts" / "evaluate" / "gold_over_steps.jsonl").write_text("\n".join(rows))
    chart = over_kl(read_run(run))
    assert chart is not None
    curves = {curve.name: (curve.x, curve.y) for curve in chart.curves if not curve.marks}
    assert list(curves) == ["learned score, ppo's steps", "gold score, ppo's steps"]
    assert curves["gold score, ppo's steps"] == ([0.0, 4.0, 6.0], [0.2, 0.8, 0.9])


def test_each_of_several_rewards_has_a_row(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    path = run / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8"))
    told = {
        f"evaluate/score_mean/{name}/ppo": value for name, value in (("learned", 1.28), ("length", -25.0))
    }
    summary["stages"]["evaluate"]["metrics"] |= told
    path.write_text(json.dumps(summary), encoding="utf-8")
    table = policy_table(read_run(run), COMPARED_METRICS)
    assert table is not None
    rows = {row[0]: row[1:] for row in table.rows}
    assert "learned score, all together" in rows and "learned score" not in rows
    assert rows["learned alone"][-1] == "1.28" and rows["length alone"][-1] == "-25"


def test_the_advice_of_gates_is_no_setting_that_the_reader_changed(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    path = run / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8"))
    keys = ("evaluate.gates.win_rate.advice", "evaluate.gates.win_rate.min", "sft.epochs")
    summary["changed"] = [{"key": key, "default": "a", "value": "b"} for key in keys]
    path.write_text(json.dumps(summary), encoding="utf-8")
    changed = read_run(run).changed
    assert changed is not None and [each["key"] for each in changed] == [*keys[1:]]


def test_the_page_shows_what_evaluate_shares_with_compare(tmp_path: Path) -> None:
    """As the terminal does: scores by a reference, several answers per question, time and cost, and the gain
    over the best option without training."""
    run = make_run(tmp_path)
    path = run / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8"))
    told = {
        "rouge_l": 0.25, "pass_at_4": 0.5, "pass_at_4_low": 0.375, "pass_at_4_high": 0.625,
        "seconds_p50": 0.75, "cost_per_thousand": 0.0625, "gain": 0.125, "gain_low": 0.0625,
        "gain_high": 0.1875, "break_even": 1234.5, "break_even_low": 900.0, "break_even_high": None,
    }  # fmt: skip
    summary["stages"]["evaluate"]["metrics"] |= {f"evaluate/{name}/ppo": each for name, each in told.items()}
    path.write_text(json.dumps(summary), encoding="utf-8")
    table = compared_table(read_run(run))
    assert table is not None
    shown = {row[0]: row[-1] for row in table.rows}
    assert shown["ROUGE-L"] == "0.250" and shown["pass@4"] == "0.500 (0.38 to 0.62)"
    assert shown["latency p50, s"] == "0.75" and shown["cost of 1000"] == "0.0625"
    assert shown["gain over the best untrained"] == "+0.125 (0.06 to 0.19)"
    assert shown["pays off: best untrained"] == "1,235 (900 to never)"  # JSON has no infinity
    assert len(shown) == len(table.rows)  # none twice


@pytest.mark.parametrize(
    ("metric", "unit", "extremes"),
    [
        ("train_accuracy", "share", (0.0, 1.0)),
        ("stop_rate", "share", (0.0, 1.0)),
        ("explained_variance", "share of the variance", (None, 1.0)),
        ("held_out_kl", "nats", (None, None)),
        ("loss", "nats", (None, None)),
        ("policy_loss", "policy loss", (None, None)),
        ("held_out_length", "tokens", (None, None)),
        ("seconds_update", "seconds", (None, None)),
        ("held_out_score", "score", (None, None)),
        ("kl_coef", "kl coef", (None, None)),
    ],
)
def test_an_axis_has_a_unit_and_ends_where_its_figure_does(
    metric: str, unit: str, extremes: tuple[float | None, float | None], run: Path
) -> None:
    line = json.dumps({"stage": "ppo", "step": 1, "time": 1.0, f"ppo/{metric}": 0.5})
    (run / "metrics.jsonl").write_text(f"{line}\n")
    (chart,) = stage_charts(read_run(run), "ppo")
    drawn = chart.as_json(10)
    assert (drawn["unit"], (drawn["least"], drawn["most"])) == (unit, extremes)


def test_a_run_that_was_stopped_shows_what_it_sampled_last(run: Path) -> None:
    (run / "artifacts" / "evaluate").unlink()
    prompt = [{"role": "user", "content": "Say <b>it</b>"}]
    rows = [
        {"stage": "ppo", "step": step, "prompt": prompt, "response": f"answer {step}.{number}"}
        for step in (1, 2) for number in range(7)
    ]  # fmt: skip
    first = {
        "stage": "generate",
        "prompt": prompt,
        "response": "mine",
        "stopped": False,
        "tokens": 3,
        "score": 0.5,
    }
    lines = [json.dumps(row) for row in (first, *rows)]
    (run / "samples.jsonl").write_text("\n".join(lines) + '\n{"stage": "ppo", "st')
    page = run_page(read_run(run))
    assert "What was sampled last" in page and "Say &lt;b&gt;it" in page
    assert "generate · 3 tokens · cut off · score 0.5" in page and "mine" in page
    assert re.findall(r"answer [\d.]+", page) == [f"answer 2.{number}" for number in (6, 5, 4, 3, 2)]
    assert "What was sampled last" not in run_page(read_run(make_run(run.parent / "whole")))


def test_a_page_of_the_documentation_is_a_link_where_it_is_on_this_disk(run: Path) -> None:
    advice = "change <it> (docs/problems/loss-is-nan.md, docs/none.md)"
    found = linked(advice, run)
    address = os.path.relpath(DOCS / "problems" / "loss-is-nan.md", run)
    link = f'<a href="{address}">docs/problems/loss-is-nan.md</a>'
    assert found == f"change &lt;it&gt; ({link}, docs/none.md)"
    assert linked(advice, None) == "change &lt;it&gt; (docs/problems/loss-is-nan.md, docs/none.md)"


def test_a_chart_is_also_text(run: Path) -> None:
    page = page_of(run)
    said = [str(each["aria-label"]) for each in page.of("div") if each.get("role") == "img"]
    assert len(said) == len([*page.of("figure")])
    assert any(each.startswith("ppo/kl. kl: 5 points, from 0 to 0.4") for each in said)


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_model_wrote_is_text(tmp_path: Path, text: str) -> None:
    clean = Page(run_page(read_run(make_run(tmp_path / "clean", "plain"))))
    page = page_of(make_run(tmp_path, text))
    assert [name for name, _ in page.elements] == [name for name, _ in clean.elements]
    assert page.data["answers"]["rows"][0]["answers"]["sft"]["text"] == f"{cleaned(text)} sft"
    assert not any(attribute.startswith("on") for _, each in page.elements for attribute in each)
    assert not re.search("[\x1b\u202e\u2028]", (tmp_path / "runs" / "demo" / NAME).read_text())


def test_embedded_data_come_back_as_they_were() -> None:
    data = {"text": "</script><!--\u2028&'\"\\ \u00e9"}
    assert json.loads(embedded(data)) == data
    assert not re.search("[<>&\u2028\u2029]", embedded(data))


def test_a_secret_is_taken_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "tok-1234567890")
    text = write_page(make_run(tmp_path, "say tok-1234567890 aloud")).read_text()
    assert "tok-1234567890" not in text and "say \\u003credacted\\u003e aloud" in text


def test_the_page_loads_nothing_and_runs_only_its_own(run: Path) -> None:
    text = write_page(run).read_text()
    page = Page(text)
    (policy,) = (str(each["content"]) for each in page.of("meta") if "http-equiv" in each)
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    assert not [*page.of("link"), *page.of("img"), *page.of("iframe")]
    assert not any({"src", "style", "srcset", "action"} & {*each} for _, each in page.elements)
    assert "url(" not in text and "@import" not in text
    assert re.findall(r"https?://[^\s\"')]*", text) == [
        "https://github.com/leeoniya/uPlot",
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/2000/svg",
    ]


def test_it_stays_small(tmp_path: Path) -> None:
    run = make_run(tmp_path, "word " * 700, num_prompts=2000, num_steps=2)
    lines = [
        {"stage": "ppo", "step": step} | {f"ppo/metric_{number}": step * 1.2345678 for number in range(60)}
        for step in range(3000)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = write_page(run)
    assert path.stat().st_size < 3_000_000
    assert "more prompts are in artifacts/evaluate/comparison.jsonl" in Page(path.read_text()).said


def test_thinning_keeps_every_spike() -> None:
    values: list[float | None] = [0.0] * 5000
    values[1234], values[4001], values[77] = 9.0, -9.0, None
    thin = Curve("kl", [float(step) for step in range(5000)], values).thinned(100)
    assert len(thin.x) <= 100 and {1234.0, 4001.0} <= {*thin.x}
    assert {9.0, -9.0} <= {*thin.y} and thin.x == sorted(thin.x)
