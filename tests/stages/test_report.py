"""Several runs in one page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.chains import Outcome, run_main
from helpers.pages import make_run
from rlhf.config import ConfigError
from rlhf.report.page.collect import read_run
from rlhf.report.page.compared import results, runs_page, settings
from rlhf.stages.report import run_directories


@pytest.fixture
def runs_dir(tmp_path: Path) -> Path:
    """Two runs that differ in one key, and two trials of a sweep."""
    for name, value in (("first", "0.1"), ("second", "0.2"), ("wide-0", "0.3"), ("wide-10", "0.4")):
        run = make_run(tmp_path / name, value, name=name)
        if name.startswith("wide"):
            (run / "trial.json").write_text("{}")
        (tmp_path / "runs").mkdir(exist_ok=True)
        run.rename(tmp_path / "runs" / name)
    return tmp_path / "runs"


def test_what_differs_and_what_came_out_stand_side_by_side(runs_dir: Path) -> None:
    second = json.loads((runs_dir / "second" / "summary.json").read_text())
    second["stages"]["ppo"]["metrics"]["ppo/kl"] = 5.0
    second["changed"].append({"key": "seed", "default": "0", "value": "7"})
    (runs_dir / "second" / "summary.json").write_text(json.dumps(second))
    runs = [read_run(runs_dir / name) for name in ("first", "second")]
    names = ["first", "second"]
    differing, gated = settings(runs, names), results(runs, names, gated=True)
    assert differing is not None and gated is not None
    assert differing.rows == [["ppo.kl.coef", "0.1", "0.2"], ["seed", "0", "7"]]
    assert ["ppo/kl", "3", "5"] in gated.rows


def test_curves_lie_over_each_other(runs_dir: Path) -> None:
    page = runs_page([read_run(runs_dir / name) for name in ("first", "second")])
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    (kl,) = (each for each in data["charts"].values() if each["y"] == "kl")
    assert [curve["name"] for curve in kl["curves"]] == ["first", "second"] and kl["high"] == 20.0
    (score,) = (each for each in data["charts"].values() if each["x"].startswith("KL from"))
    assert "second: gold score, new prompts" in [curve["name"] for curve in score["curves"]]
    assert "connect-src" not in page and "<title>2 runs compared</title>" in page


def test_a_run_of_the_page_is_never_replaced_by_the_pages_own(runs_dir: Path) -> None:
    kept = (runs_dir / "first" / "summary.json").read_bytes()
    words = ("model=tiny", "device=cpu", "stage=report")

    def report(run: str, name: str) -> Outcome:
        asked = (*words, f"report.runs=[{run}]", f"run_name={name}")
        return run_main(runs_dir.parent, asked, runs_dir / name)

    for run in ("first", str(runs_dir / "first")):
        refused = report(run, "first")
        assert refused.code == 2 and "Use another run_name." in refused.err
    assert (runs_dir / "first" / "summary.json").read_bytes() == kept
    gone = report("frist", "new")
    assert gone.code == 2 and "Did you mean first" in gone.err and not (runs_dir / "new").exists()


def test_names_of_runs_sweeps_and_directories(runs_dir: Path) -> None:
    assert run_directories("wide", runs_dir) == [runs_dir / "wide-0", runs_dir / "wide-10"]
    assert run_directories("first", runs_dir) == [runs_dir / "first"]
    assert run_directories(str(runs_dir / "second"), runs_dir / "elsewhere") == [runs_dir / "second"]
    with pytest.raises(ConfigError, match=r"report.runs=frist: .* Did you mean first"):
        run_directories("frist", runs_dir)


def test_the_stage_makes_the_page_of_its_run(runs_dir: Path) -> None:
    words = ["stage=report", "model=tiny", "device=cpu", "run_name=both"]
    done = run_main(runs_dir.parent, [*words, "report.runs=[second,first]"], runs_dir / "both")
    assert done.code == 0, done.err
    assert done.statuses == {"report": "ran"}
    page = (runs_dir / "both" / "report.html").read_text()
    assert page == (done.artifact("report") / "report.html").read_text()
    assert page.index("<h3>second</h3>") < page.index("<h3>first</h3>")
    refused = run_main(runs_dir.parent, words, runs_dir / "both")
    assert refused.code == 2 and "report.runs=[]: nothing to show" in refused.err
