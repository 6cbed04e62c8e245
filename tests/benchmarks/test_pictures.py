"""The documentation's pictures show what its tables say, in both themes."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pictures
import pytest
from look import THEMES

from rlhf.report.compare import comparison_cells

ROOT = Path(__file__).parent.parent.parent
IMAGES = ROOT / "docs" / "images"
PICTURE = re.compile(
    r'<picture>\s*<source media="\(prefers-color-scheme: dark\)" srcset="(\S+)-dark\.svg">\s*'
    r'<img src="(\S+)-light\.svg"\s+alt="([^"]+)">\s*</picture>'
)


def test_every_picture_is_there_for_both_themes() -> None:
    shown = set()
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        text = page.read_text(encoding="utf-8")
        found = PICTURE.findall(text)
        assert len(found) == text.count("<picture>") + text.count("![")
        for dark, light, _ in found:
            assert dark == light
            shown.add((page.parent / light).resolve())
    files = set(IMAGES.iterdir())
    assert files == {Path(f"{name}-{theme}.svg") for name in shown for theme in THEMES}
    for file in files:
        assert file.stat().st_size < 100_000
        ElementTree.parse(file)


def test_the_themes_differ_in_colours_only() -> None:
    for light in IMAGES.glob("*-light.svg"):
        dark = light.with_name(light.name.replace("-light", "-dark"))
        varies = "#[0-9a-f]{6}|[mp][0-9a-f]{10}"  # colours, and names made from them
        plain = [re.sub(varies, "", path.read_text(encoding="utf-8")) for path in (light, dark)]
        assert plain[0] == plain[1], light.name


@pytest.mark.parametrize("first", ["43 questions", "40 questions"])
def test_a_comparison_is_read_back_from_its_table(first: str) -> None:
    headings, *rows = pictures.table("should-you-fine-tune.md", first)
    written = {words: cells for words, *cells in comparison_cells(pictures.comparison(first)).rows}
    assert headings[1:] == comparison_cells(pictures.comparison(first)).headings[1:]
    assert len(rows) > 15
    for words, *cells in rows:
        if words != "95% interval":
            assert written[words] == cells


def test_the_trials_are_read_back_from_their_table() -> None:
    points = {point.name: (point.gain, point.loss) for point in pictures.forgetting()}
    assert points["half-way"] == (0.321, -0.07)
    assert list(points) == ["full", "lora", "replay", "half-way"]


def test_the_algorithms_are_read_back_from_their_table() -> None:
    points = {point.title: point for point in pictures.algorithms()}
    assert list(points) == [
        "best of 16", "PPO", "GRPO", "DPO", "DPO 2", "GRPO reinforce", "GRPO rloo", "SFT best"
    ]  # fmt: skip
    assert all(point.gain.low <= point.gain.value <= point.gain.high for point in points.values())
    assert all(point.cost is not None and point.cost.seconds > 100 for point in points.values())
    assert [title for title, each in points.items() if each.cost and not each.cost.gib] == ["best of 16"]
