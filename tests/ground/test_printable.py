"""Control characters in names, templates, data and answers are shown, not obeyed."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest

from helpers.chains import Chain
from rlhf.config import ConfigError
from rlhf.printable import printable
from rlhf.tracking.redaction import RedactingConsole

TITLE = "\x1b]0;owned\x07\x1b[2J"


def test_what_is_shown_and_what_is_left() -> None:
    assert printable("a\tb\n\x1b[31mred\x07\r\x9b\u202e") == "a\tb\n\\x1b[31mred\\x07\\r\\x9b\\u202e"
    assert printable("Grüße, 日本 😀 e\u0301 \\x1b") == "Grüße, 日本 😀 e\u0301 \\x1b"
    assert str(ConfigError(f"sft.data: {TITLE}")) == "sft.data: \\x1b]0;owned\\x07\\x1b[2J"
    out = io.StringIO()
    RedactingConsole(file=out, width=80, force_terminal=True).print(f"[bold]{TITLE}[/]", highlight=False)
    assert "\\x1b]0;owned" in out.getvalue() and "\x1b]" not in out.getvalue()


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return Chain(tmp_path_factory.mktemp("control"))


@pytest.mark.parametrize("place", ["column", "file", "template", "model"])
def test_an_error_shows_what_would_move_the_cursor(chain: Chain, tiny_model: Path, place: str) -> None:
    data, settings = "sft.jsonl", []
    if place == "column":
        data = chain.write("columns.jsonl", [{TITLE: "a", "b": "c"}])
    if place == "file":
        data = f"no{TITLE}.jsonl"
    if place == "template":
        (chain.directory / "broken.jinja").write_text("{% raise_it '" + TITLE + "' %}")
        settings = ["model.chat_template=broken.jinja"]
    if place == "model":
        shutil.copytree(tiny_model, chain.directory / "spoilt")
        config = chain.directory / "spoilt" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": TITLE}))
        settings = ["model=local", "model.path=spoilt"]
    outcome = chain.run("stage=sft", f"sft.data='{data}'", *settings)
    assert outcome.code == 2
    assert "\x1b" not in outcome.err + outcome.out and "\x07" not in outcome.err + outcome.out
    assert outcome.err.startswith("Error: ")


def test_an_answer_in_the_report_cannot_move_the_cursor(
    tmp_path: Path, finished_chain: tuple[Chain, object]
) -> None:
    chain, _ = finished_chain
    prompts = chain.write("controls.jsonl", [{"prompt": f"Say {n} {TITLE}"} for n in range(6)])
    outcome = chain.run(f"evaluate.prompts={prompts}")
    assert outcome.code == 0, outcome.err
    report = (outcome.directory / "report.md").read_text()
    assert "owned" in report and "\x1b" not in report + outcome.out
