"""The pages of a run, of several runs and of a list in a real browser: clicked through, live, every look."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pytest
from playwright.sync_api import Browser, Page, expect

from helpers.browser import complaints, launched, needs_chromium
from helpers.pages import make_run
from rlhf.cli.watch import HOST, make_server
from rlhf.report.page.collect import read_run
from rlhf.report.page.compared import runs_page
from rlhf.report.page.write import DOCS, write_page

HOSTILE = "<img src=x onerror=\"document.title='owned'\"></script><script>document.title='owned'</script>"

pytestmark = [pytest.mark.slow, needs_chromium]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with launched() as found:
        yield found


def opened(
    browser: Browser, address: str, scheme: str = "light", width: int = 1280
) -> tuple[Page, list[str]]:
    """A page, and what goes wrong in it: messages of its console, and requests that leave it."""
    context = browser.new_context(
        viewport={"width": width, "height": 900},
        color_scheme="dark" if scheme == "dark" else "light",
    )
    page, wrong = context.new_page(), []
    page.on("console", lambda message: wrong.append(message.text) if message.type != "log" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(address) else wrong.append(request.url))
    page.goto(address)
    return page, wrong


@contextmanager
def served(root: Path, name: str = "") -> Iterator[str]:
    """The address of a watch."""
    with make_server(root, name, "0") as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://{HOST}:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def in_every_look(test: Any) -> Any:
    """Light and dark, wide and narrow, each once: no rule of the page depends on both."""
    return pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])(test)


def looks_right(page: Page, wrong: list[str]) -> None:
    """Nothing went wrong, nothing is wider than the window, and axe has no complaint."""
    assert wrong == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert complaints(page) == []


@in_every_look
def test_the_page_is_clicked_through(chromium: Browser, tmp_path: Path, scheme: str, width: int) -> None:
    path = write_page(make_run(tmp_path, HOSTILE, num_prompts=25, num_steps=40))
    page, wrong = opened(chromium, path.as_uri(), scheme, width)
    for name in page.locator("nav a").all():
        name.click()
    for more in page.locator("summary").all():
        more.scroll_into_view_if_needed()
        more.click()
    expect(page.locator("figure canvas")).to_have_count(page.locator("figure.chart").count())
    kl = page.locator("figure.chart", has_text="ppo/kl")
    assert kl.locator("tbody tr").count() == 40
    assert kl.locator("tbody tr").last.inner_text().split() == ["39", "3.9"]
    kl.locator(".u-over").hover()
    assert kl.locator(".legend").inner_text().startswith("step ")
    answers = page.locator("#answer-list article")
    assert (
        answers.count() == 10 and answers.first.inner_text().count("<img") == 4
    )  # the prompt, two answers, a title
    page.click("#later")
    page.click("#later")
    assert page.inner_text("#answer-count") == "21 to 25 of 25 prompts"
    page.fill("#search", "no such words")
    assert page.inner_text("#answer-count") == "0 to 0 of 0 prompts"
    page.fill("#search", "ONERROR")
    page.select_option("#filter", "worse")
    assert answers.count() == 0
    page.select_option("#filter", "all")
    page.select_option("#left", "base")
    assert "base · 0 tokens" in answers.first.inner_text()
    page.select_option("#left", "ppo")
    assert f"{HOSTILE} · 1 tokens" in answers.first.inner_text()
    assert page.title() == "Run demo"
    looks_right(page, wrong)
    page.context.close()


@in_every_look
def test_charts_are_drawn_before_anybody_scrolls_and_on_paper(
    chromium: Browser, tmp_path: Path, scheme: str, width: int
) -> None:
    """As a screenshot of the whole page or a print sees it; those of closed lists are left out."""
    path = write_page(make_run(tmp_path, num_steps=40))
    page, wrong = opened(chromium, path.as_uri(), scheme, width)
    shown = "figure.chart:not(details:not([open]) figure)"
    expect(page.locator(f"{shown} canvas")).to_have_count(page.locator(shown).count())
    assert page.locator(shown).count() > 3
    page.emulate_media(media="print")
    widest = "[...document.querySelectorAll('figure .plot')].filter((plot) => plot.querySelector('canvas'))"
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert page.evaluate(
        f"{widest}.every((plot) => plot.querySelector('.uplot').clientWidth <= plot.clientWidth + 1)"
    )
    paper = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(paper) == "rgb(255, 255, 255)"
    assert len(page.pdf(format="A4")) > 50_000
    assert wrong == []
    page.context.close()


def test_a_gates_advice_is_not_cut_and_leads_to_its_page(chromium: Browser, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    summary = json.loads((run / "summary.json").read_text())
    summary["gates"][0]["advice"] = f"{'read this ' * 60}(docs/problems/loss-is-nan.md)"
    (run / "summary.json").write_text(json.dumps(summary))
    page, wrong = opened(chromium, write_page(run).as_uri())
    cell = page.locator("#gates td.advice", has_text="read this")
    box = cell.bounding_box()
    assert box is not None and box["x"] + box["width"] <= 1280
    for link in (cell.locator("a"), page.locator("#verdict a")):
        address = link.evaluate("(link) => link.href")
        assert Path(url2pathname(urlsplit(address).path)) == DOCS / "problems" / "loss-is-nan.md"
    assert complaints(page) == [] and wrong == []
    page.context.close()


@in_every_look
def test_the_page_of_several_runs_is_clicked_through(
    chromium: Browser, tmp_path: Path, scheme: str, width: int
) -> None:
    runs = [
        read_run(make_run(tmp_path / name, answer, num_steps=40, name=name))
        for name, answer in (
            ("first", HOSTILE),
            ("second", "plain"),
            ("a-run-with-quite-a-long-name", "long"),
        )
    ]
    path = tmp_path / "report.html"
    path.write_text(runs_page(runs), encoding="utf-8")
    page, wrong = opened(chromium, path.as_uri(), scheme, width)
    links = page.locator("nav a").all()
    assert [link.inner_text() for link in links][-2:] == ["Curves", "All figures"]
    for link in links:
        link.click()
    for more in page.locator("summary").all():
        more.scroll_into_view_if_needed()
        more.click()
    expect(page.locator("figure canvas")).to_have_count(page.locator("figure.chart").count())
    kl = page.locator("figure.chart", has_text="ppo/kl")
    assert kl.locator("thead th").all_inner_texts() == ["step", *(run.name for run in runs)]
    assert kl.locator("tbody tr").last.inner_text().split() == ["39", "3.9", "3.9", "3.9"]
    assert kl.locator(".healthy").inner_text() == "healthy: at most 20"
    assert page.locator("#verdicts h3").count() == 3
    assert "<img src=x" in page.inner_text("#settings")
    assert page.title() == "3 runs compared"
    looks_right(page, wrong)
    page.context.close()


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_twelve_runs_look_different_in_one_chart(chromium: Browser, tmp_path: Path, scheme: str) -> None:
    names = [f"run-{number}" for number in range(12)]
    path = tmp_path / "report.html"
    runs = [read_run(make_run(tmp_path / name, "plain", num_steps=40, name=name)) for name in names]
    path.write_text(runs_page(runs), encoding="utf-8")
    page, wrong = opened(chromium, path.as_uri(), scheme, 1280)
    kl = page.locator("figure.chart", has_text="ppo/kl")
    kl.scroll_into_view_if_needed()
    expect(kl.locator(".legend rect")).to_have_count(12)
    looks = [(rect.get_attribute("fill"), rect.get_attribute("stroke")) for rect in kl.locator("rect").all()]
    assert len(set(looks)) == 12
    looks_right(page, wrong)
    page.context.close()


@in_every_look
def test_the_list_of_a_sweeps_trials_leads_to_their_pages(
    chromium: Browser, tmp_path: Path, scheme: str, width: int
) -> None:
    for number in range(3):
        trial = make_run(tmp_path, name=f"wide-{number}")
        (trial / "trial.json").write_text("{}")
    make_run(tmp_path, name="other")
    with served(tmp_path / "runs", "wide") as address:
        page, wrong = opened(chromium, address, scheme, width)
        assert page.title() == "Sweep wide"
        names = page.locator("tbody th")
        assert sorted(names.all_inner_texts()) == ["wide-0", "wide-1", "wide-2"]
        looks_right(page, wrong)
        page.locator("a", has_text="wide-1").click()
        expect(page).to_have_title("Run wide-1")
        looks_right(page, wrong)
        page.locator("a", has_text="all runs").click()
        expect(page).to_have_title(re.compile("^Runs in "))
        expect(names).to_have_count(4)
        looks_right(page, wrong)
        page.context.close()


@in_every_look
def test_a_live_page_follows_the_run(chromium: Browser, tmp_path: Path, scheme: str, width: int) -> None:
    run = make_run(tmp_path, num_prompts=3)
    with served(tmp_path / "runs") as address:
        page, wrong = opened(chromium, address, scheme, width)
        page.fill("#search", "love")
        kl = page.locator("figure.chart", has_text="ppo/kl")
        kl.locator("summary").click()
        with (run / "metrics.jsonl").open("w") as file:
            for step in range(9):
                line = {"stage": "ppo", "step": step, "time": 1.0, "ppo/kl": 7.5, "ppo/score": 1.0}
                file.write(json.dumps(line) + "\n")
        kl.locator("tbody tr", has_text="7.5").last.wait_for()
        assert kl.locator("tbody tr").count() == 9  # it stayed open, with the new figures
        assert page.input_value("#search") == "love"
        looks_right(page, wrong)
        page.locator("a", has_text="all runs").click()
        expect(page).to_have_title(re.compile("^Runs in "))
        page.locator("a", has_text="demo").click()
        expect(page).to_have_title("Run demo")
        assert wrong == []
        page.context.close()
