"""What counts as other code, so that what learned from it is made anew."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rlhf.config import ConfigError
from rlhf.rewards.code import code_on_disk, imported_code

CODE = '''"""Scores."""

LEAST = 3  # letters


class Scale:
    """How much a letter counts."""


def score(prompts, responses):
    """Longer is better."""
    return [float(len(each) > LEAST) for each in responses]
'''


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("def score(:\n", r"python:broken:score: .*broken\.py:1: invalid syntax\. Fix that line\."),
        (
            "\n1 / 0\n",
            r"python:broken:score: importing broken raised ZeroDivisionError: .*broken\.py, line 2\)",
        ),
        ("raise SystemExit(0)\n", r"score: importing broken raised SystemExit: 0 \(.*broken\.py, line 1\)"),
        ("import nowhere_at_all\n", r"No module named 'nowhere_at_all'\. The module must be importable"),
    ],
)
def test_a_module_that_cannot_be_imported_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, told: str
) -> None:
    (tmp_path / "broken.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    with pytest.raises(ConfigError, match=told):
        imported_code("python:broken:score")


def digest(folder: Path, code: str) -> dict[str, str]:
    (folder / "own_scores.py").write_text(code)
    return code_on_disk("own_scores")


@pytest.mark.parametrize(
    ("old", "new", "is_same"),
    [
        ("Longer is better.", "Long answers are liked.", True),
        ('"""Scores."""\n', "", True),
        ("  # letters", "", True),
        ("[float(len(each)", "[\n        float(len(each)", True),
        ("How much", "What", True),
        ("LEAST = 3", "LEAST = 4", False),
        ("> LEAST", ">= LEAST", False),
        ("return [", "if not responses:\n        return []\n    return [", False),
    ],
)  # fmt: skip
def test_comments_docstrings_and_blanks_are_no_other_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, is_same: bool
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    before = digest(tmp_path, CODE)
    assert old in CODE
    assert (digest(tmp_path, CODE.replace(old, new)) == before) is is_same


def test_docstrings_that_are_read_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    code = CODE.replace("> LEAST", "> len(score.__doc__)")
    assert digest(tmp_path, code) != digest(tmp_path, code.replace("Longer is better.", "Short is better."))


def test_what_is_no_code_counts_by_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    assert digest(tmp_path, "a = (") != digest(tmp_path, "a = ( # open")
