"""The page of a decision in a real browser: every look, long and hostile titles, and the copied command."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from helpers.browser import complaints, launched, needs_chromium
from helpers.decisions import begun, decided
from rlhf.report.decision import decision_page

HOSTILE = "<img src=x onerror=\"document.title='owned'\"></script><script>document.title='owned'</script>"

OUTSIDE = """
[...document.querySelectorAll("figure.drawing text")].filter((text) => {
  const own = text.getBoundingClientRect(), all = text.ownerSVGElement.getBoundingClientRect();
  return own.left < all.left - 1 || own.right > all.right + 1;
}).map((text) => text.textContent)
"""
"""Texts that reach out of their drawing."""

pytestmark = [pytest.mark.slow, needs_chromium]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with launched() as found:
        yield found


def crowded() -> dict[str, Any]:
    """Twelve candidates with long and hostile titles."""
    decision = decided()
    titles = ["SFT, LoRA of rank 16 with a learning rate of 2e-4 and three epochs", HOSTILE, "W" * 90]
    decision["candidates"] = [
        {**copy.deepcopy(decision["candidates"][number % 7]), "name": f"c{number}",
         "title": f"{titles[number % 3]} {number}", "why": HOSTILE}
        for number in range(12)
    ]  # fmt: skip
    for number, pilot in enumerate(decision["pilots"]):
        pilot["candidate"] = f"c{number}"
    return {**decision, "name": HOSTILE, "winner": "c3", "untrained": "c1", "seeds": 2}


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
@pytest.mark.parametrize("make", [decided, begun, crowded])
def test_it_looks_right(chromium: Browser, tmp_path: Path, make: Any, width: int, scheme: Any) -> None:
    path = tmp_path / "report.html"
    path.write_text(decision_page(make()), encoding="utf-8")
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, wrong = context.new_page(), []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: wrong.append(request.url) if request.url != path.as_uri() else None)
    page.goto(path.as_uri())
    for more in page.locator("summary").all():
        more.click()
    assert page.title().startswith("Decision ")
    for figure in page.locator("figure.drawing").all():
        expect(figure.locator("svg[role=img]:visible")).to_have_count(1)
    assert page.evaluate(OUTSIDE) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert complaints(page) == [] and wrong == []
    context.close()


def test_the_command_is_copied(chromium: Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(decision_page(decided()), encoding="utf-8")
    context = chromium.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.goto(path.as_uri())
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == decided()["command"]
    context.close()
