"""The labelling page in a real browser: by keyboard alone, wide and narrow, light and dark, before axe.

It needs Debian's Chromium, and is skipped without.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

from helpers.browser import complaints, launched, needs_chromium
from helpers.labelling import LINK, answers_at, kill, many, output_of, pair, served, start
from rlhf.label.votes import votes_in

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.slow, needs_chromium]
OTHER = "#vote [name=shown]:not([value='{shown}']), h1:text('Done')"
"""Another pair than the one shown, or none."""
LONG = "A sentence that goes on for a while, so that lines must break. " * 6


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as found:
        yield found


def enter(page: Page, link: str) -> None:
    page.goto(link)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#vote")


def press(page: Page, key: str) -> None:
    """Press a key, and wait for the next pair."""
    shown = page.input_value("#vote [name=shown]")
    page.keyboard.press(key)
    page.wait_for_selector(OTHER.format(shown=shown), state="attached")


def test_votes_by_keyboard_alone(browser: Browser, tmp_path: Path) -> None:
    """A notice has the focus, and so is read aloud: a status that is there when the page loads is not."""
    path = tmp_path / "votes.sqlite"
    with served(path, many(12), "ada", wanted=6) as (_, links):
        page = browser.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
        enter(page, links["ada"])
        left = page.inner_text("section[aria-labelledby=left-title] .text")
        press(page, "ArrowLeft")
        press(page, "2")
        press(page, "t")
        press(page, "s")
        press(page, "u")
        page.wait_for_selector("[role=status]:focus >> text=taken back")
        assert complaints(page) == []
        page.keyboard.press("c")
        page.keyboard.type("1 2 t: no votes here")
        page.keyboard.press("Escape")
        press(page, "x")
        page.uncheck("#use-keys")
        page.keyboard.press("ArrowLeft")
        page.reload()
        assert not page.is_checked("#use-keys"), "the choice is kept"
        page.check("#use-keys")
        page.focus("button[value=left]")
        press(page, "Enter")
        press(page, "ArrowRight")
        assert "enough votes" in page.inner_text("main")
        style = "getComputedStyle(document.querySelector('main')).getPropertyValue('--main')"
        assert page.evaluate(style), "the last page has its style, though the server has ended"
        page.close()
        assert [text for text in errors if "404" not in text] == [], "but that there is no favicon"
    votes = votes_in(path, "label")
    first = votes[0]
    assert left == getattr(first.pair, first.choice)
    assert votes[1].choice != votes[1].left
    assert [vote.choice for vote in votes[2:4]] == ["tie", "both_bad"]
    assert votes[3].comment == "1 2 t: no votes here"
    assert votes[4].choice == votes[4].left and votes[5].choice != votes[5].left


def test_a_vote_waits_for_a_server_that_is_down(browser: Browser, tmp_path: Path, port: int) -> None:
    path = tmp_path / "votes.sqlite"
    server = start(path, port, "ada")
    (link,) = dict(LINK.findall(output_of(server).readline() + output_of(server).readline())).values()
    answers_at(f"http://127.0.0.1:{port}/")
    page = browser.new_page()
    enter(page, link)
    press(page, "1")
    kill(server)
    page.keyboard.press("c")
    page.keyboard.type("typed while it was down")
    page.keyboard.press("Escape")
    shown = page.input_value("#vote [name=shown]")
    page.keyboard.press("t")
    page.wait_for_selector("[role=status]:focus >> text=The server does not answer. What you did is kept")
    page.keyboard.press("x")  # is no second vote
    assert complaints(page) == []
    server = start(path, port, "ada")
    page.wait_for_selector(OTHER.format(shown=shown), state="attached")
    page.close()
    kill(server)
    assert [(vote.choice, vote.comment) for vote in votes_in(path, "label")[1:]] == [
        ("tie", "typed while it was down")
    ]


def test_without_javascript(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "votes.sqlite"
    with served(path, many(4), "ada") as (_, links):
        context = browser.new_context(java_script_enabled=False)
        page = context.new_page()
        enter(page, links["ada"])
        assert not page.is_visible("#keys"), "without the script there are no keys to speak of"
        page.click("text=B is better")
        page.click("text=Undo")
        page.wait_for_selector("[role=status]:focus")
        page.click("text=Tie")
        page.wait_for_selector("text=1 of 4 votes")
        context.close()
    assert [vote.choice for vote in votes_in(path, "label")] == ["tie"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_and_is_accessible(
    browser: Browser, tmp_path: Path, width: int, scheme: Literal["light", "dark"]
) -> None:
    hostile = pair("<b>Which?</b> \u202eabc", f"ف {LONG}\n\n    code()", "x" * 400)
    with served(tmp_path / "votes.sqlite", [hostile, *many(1)], "ada", wanted=2) as (_, links):
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page = context.new_page()
        page.goto(links["ada"])
        assert complaints(page) == []
        enter(page, links["ada"])
        for number in range(2):
            assert complaints(page) == []
            assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing is cut off"
            bar = page.locator(".bar").bounding_box()
            assert bar is not None and bar["y"] + bar["height"] <= 801, "the buttons are in sight"
            page.screenshot(path=tmp_path / f"{width}-{scheme}-{number}.png")
            page.screenshot(path=tmp_path / f"{width}-{scheme}-{number}-whole.png", full_page=True)
            press(page, "1")
        assert "enough votes" in page.inner_text("main") and complaints(page) == []
        context.close()
