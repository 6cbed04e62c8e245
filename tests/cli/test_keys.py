"""`python -m rlhf keys`: what each key means."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.cli.keys import keys, markdown_page, sections
from rlhf.config import ConfigError


def test_every_key_says_what_it_means() -> None:
    found = [key for section in sections({}) for key in section.keys]
    assert len({key.name for key in found}) == len(found) > 500
    assert [key.name for key in found if not key.meaning] == []


@pytest.mark.parametrize("word", ["ppo.kl", "ppo@2.kl"])
def test_a_word_shows_what_is_below_it(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert keys([word], {}) == 0
    lines = capsys.readouterr().out.splitlines()
    if word.startswith("ppo@2"):
        assert lines.pop(0) == "ppo@2 has the keys of ppo, with the same defaults."
    names = [line.partition("=")[0] for line in lines if not line.startswith(" ")]
    assert names == ["ppo.kl", "ppo.kl.coef", "ppo.kl.controller", "ppo.kl.target", "ppo.kl.horizon"]
    assert "ppo.kl.coef=0.05" in lines and max(map(len, lines)) <= 100


def test_shared_sections_are_shown_where_they_stand(capsys: pytest.CaptureFixture[str]) -> None:
    keys(["sft.optim.lr", "evaluate.prompts.limit"], {})
    out = capsys.readouterr().out
    assert "sft.optim.lr=3.0e-05" in out and "evaluate.prompts.limit=null" in out


def test_without_a_word_the_sections_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    keys([], {})
    out = capsys.readouterr().out
    assert "\nseed=0\n" in out and "\nppo.* (" in out and "ppo.kl.coef" not in out


def test_a_wrong_word_is_told_with_a_near_one() -> None:
    with pytest.raises(ConfigError, match=r"keys ppo\.kls: there is no such key\. Did you mean ppo\.kl\?"):
        keys(["ppo.kls"], {})


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["model=hub"], "keys model=hub: `keys` takes names of keys, such as `keys model`, and schema=FILE."),
        (["schema="], "keys schema=: the value is missing."),
        (["schema=a.json", "schema=b.json"], "keys schema=b.json: schema= is given twice."),
        (["kl"], "keys kl: there is no such key. Did you mean ppo.kl"),
        (["optim.lr"], "Did you mean sft.optim.lr or reward.optim.lr or"),
    ],
)
def test_a_slip_is_told_with_what_to_write(words: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        keys(words, {})
    assert complaint in str(caught.value) and "...." not in str(caught.value)


def test_a_part_of_a_gate_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert keys(["ppo.gates.kl.max", "ppo@2.gates.kl.min"], {}) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert [line.partition("=")[0] for line in lines] == [
        "ppo.gates.kl.max",
        "ppo@2 has the keys of ppo, with the same defaults.",
        "ppo.gates.kl.min",
    ]


def test_the_schema_is_written_for_editors(tmp_path: Path) -> None:
    assert keys([f"schema={tmp_path / 'rlhf.json'}"], {}) == 0
    assert "ppo" in json.loads((tmp_path / "rlhf.json").read_text())["properties"]


def test_a_schema_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"it cannot be written \(No such file or directory\)"):
        keys([f"schema={tmp_path / 'missing' / 'rlhf.json'}"], {})


def test_the_page_of_keys_shows_shared_sections_once() -> None:
    page = markdown_page()
    assert page.count("The highest learning rate") == 1 and "[optim](#optim)" in page
    assert "([more](problems/" in page and "docs/problems" not in page
