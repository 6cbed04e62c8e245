"""The documentation site, built, and searched in a browser."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import expect

from helpers.browser import launched, needs_chromium

ROOT = Path(__file__).parents[2]
FIRST = {
    "own data csv": "Your model and data",
    "system prompt": "Your model and data",
    "out of memory": "Out of memory",
    "exploding kl": "KL explodes",
}
"""What somebody looks for, and the page that must come first."""


@pytest.mark.slow
@needs_chromium
def test_the_search_finds_guides_first(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    site = tmp_path / "html"
    subprocess.run([sys.executable, "-m", "sphinx", "-q", ROOT / "docs", site], check=True)
    with launched() as browser:
        for words, title in FIRST.items():
            page = browser.new_page()
            page.goto(f"{(site / 'search.html').as_uri()}?q={words.replace(' ', '+')}")
            expect(page.locator("ul.search > li > a").first).to_have_text(title)
            page.close()
