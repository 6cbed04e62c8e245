"""A data role of the user's own, with nothing in the package changed: toy_labels.py and its YAML."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from helpers.chains import Chain, Outcome, RealChain, kill, newest_step
from rlhf.data.prepared import PreparedData
from rlhf.data.roles import ROLES

HERE = Path(__file__).parent
MOUNTED = (f"--config-dir={HERE / 'conf'}", "+stages@labels=labels", "stage=labels", "gates=warn")
ROWS = [{"prompt": f"Which is {n}?", "label": "odd" if n % 2 else "even"} for n in range(40)]


def data_in(outcome: Outcome) -> PreparedData:
    from toy_labels import LabelsStage

    return PreparedData(outcome.artifact("prepare"), roles={**ROLES, **LabelsStage.roles})


def run(chain: Chain, *overrides: str) -> Outcome:
    return chain.run(*MOUNTED, "labels.data=labels.jsonl", *overrides)


@pytest.fixture(scope="module")
def finished(finished_chain: tuple[Chain, Outcome]) -> tuple[Chain, Outcome]:
    """One row twice, one that the evaluation asks too, and a stage that trains on the others."""
    chain, _ = finished_chain
    asked = {"prompt": "What is 3?", "label": "odd"}  # as evaluation.jsonl has it
    chain.write("labels.jsonl", [*ROWS, ROWS[7], asked])
    outcome = run(chain, "why=true")
    assert outcome.code == 0, outcome.err
    return chain, outcome


def test_prepare_reads_checks_splits_and_counts_it(finished: tuple[Chain, Outcome]) -> None:
    _, outcome = finished
    assert outcome.statuses == {"prepare": "ran", "sft": "reused", "labels": "ran"}
    metrics = outcome.summary["stages"]["prepare"]["metrics"]
    assert metrics["prepare/labelled_prompts"] == len(ROWS)
    assert (metrics["prepare/dropped"], metrics["prepare/leaks"]) == (1, 1)
    report = json.loads((outcome.artifact("prepare") / "report.json").read_text())["labels"]
    assert (report["source"], report["read"]) == ("labels.jsonl", len(ROWS) + 2)
    assert report["removed"]["duplicate"] == {"count": 1, "examples": ["labels.jsonl line 41"]}
    assert report["removed"]["leak"] == {"count": 1, "examples": ["labels.jsonl line 42"]}
    assert report["tokens"]["max"] > len("Which is 10?")  # a byte is a token of the tiny model
    assert (
        "labels.data: labels.jsonl has prompt, label; read as {prompt: prompt, label: label}" in outcome.out
    )


def test_the_stage_gets_its_own_rows(finished: tuple[Chain, Outcome]) -> None:
    data = data_in(finished[1])
    found = {split: data.rows("labels", split) for split in ("train", "held_out")}
    rows = [*found["train"], *found["held_out"]]
    assert {type(row).__name__ for row in rows} == {"LabelledRow"}
    assert {(row.prompt[0]["content"], row.label) for row in rows} == {
        (row["prompt"], row["label"]) for row in ROWS
    }
    assert len(rows) == len(ROWS) and min(map(len, found.values())) > 0
    assert finished[1].summary["stages"]["labels"]["metrics"]["labels/accuracy"] >= 0


def test_its_prompts_can_be_lent(finished: tuple[Chain, Outcome]) -> None:
    chain, _ = finished
    outcome = chain.run(*MOUNTED[:2], "stage=prepare", "labels.data=labels.jsonl", "ppo.prompts=labels.data")
    assert outcome.code == 0, outcome.err
    data = data_in(outcome)
    for split in ("train", "held_out"):
        lent = [row.prompt for row in data.rows("labels", split)]
        assert [row.prompt for row in data.rows("ppo", split)] == lent != []


def test_a_changed_row_makes_anew_what_reads_it_and_nothing_else(finished: tuple[Chain, Outcome]) -> None:
    chain, first = finished
    assert set(run(chain).statuses.values()) == {"reused"}
    other = chain.write("other.jsonl", [*ROWS[1:], ROWS[0] | {"label": "odd"}])
    changed = run(chain, f"labels.data={other}", "why=true")
    assert changed.statuses == {"prepare": "ran", "sft": "reused", "labels": "ran"}
    assert changed.key("prepare") != first.key("prepare")
    assert "labels.data: other content" in changed.out
    assert f"labels.data: other rows, {len(ROWS)} -> {len(ROWS)}" in changed.out


def test_its_code_is_in_the_keys_of_what_uses_it(
    finished: tuple[Chain, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain, _ = finished
    code = (HERE / "toy_labels.py").read_text()
    monkeypatch.syspath_prepend(str(tmp_path))

    def run_code(code: str) -> Outcome:
        (tmp_path / "my_labels.py").write_text(code)
        monkeypatch.delitem(sys.modules, "my_labels", raising=False)
        outcome = run(chain, "labels._target_=my_labels.LabelsStage")
        assert outcome.code == 0, outcome.err
        return outcome

    first = run_code(code)
    assert set(run_code(code).statuses.values()) == {"reused"}
    edited = run_code(code.replace('raw.get("label")', '{"odd": "even", "even": "odd"}[raw["label"]]'))
    assert edited.statuses == {"prepare": "ran", "sft": "reused", "labels": "ran"}
    labels = {
        outcome.key("prepare"): data_in(outcome).rows("labels", "train")[0].label
        for outcome in (first, edited)
    }
    assert {*labels.values()} == {"odd", "even"}


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (
            {"prompt": "Which is 3?", "label": "prime"},
            "labels.data: bad.jsonl line 41: \"label\" must be odd or even, found 'prime'. Fix the row, or "
            "set prepare.on_bad_row=drop to leave out such rows.",
        ),
        (
            {"prompt": "Which is 3?", "Label": "odd"},
            'labels.data: bad.jsonl line 41: "label" is missing (found: prompt, Label). Are they in other '
            "columns? labels.data='{path: bad.jsonl, fields: {prompt: prompt, label: Label}}'. Fix the row,",
        ),
        (
            {"label": "odd"},
            'labels.data: bad.jsonl line 41: "prompt" is missing (found: label). A prompt row needs',
        ),
    ],
)
def test_a_bad_row_is_told_by_its_line(
    finished: tuple[Chain, Outcome], row: dict[str, str], complaint: str
) -> None:
    chain, _ = finished
    bad = chain.write("bad.jsonl", [*ROWS, row])
    outcome = run(chain, f"labels.data={bad}")
    assert outcome.code == 2
    assert outcome.err.startswith(f"Error: {complaint}")


def test_a_run_without_its_data_is_refused(finished_chain: tuple[Chain, Outcome]) -> None:
    outcome = finished_chain[0].run(*MOUNTED)
    assert outcome.code == 2
    assert outcome.err.startswith("Error: No data for labels.data (for labels). ")


def test_a_run_without_its_stage_is_as_before(
    finished: tuple[Chain, Outcome], finished_chain: tuple[Chain, Outcome]
) -> None:
    chain, first = finished_chain
    again = chain.run("stage=prepare")
    assert again.code == 0, again.err
    assert again.statuses == {"prepare": "reused"} and again.key("prepare") == first.key("prepare")


@pytest.mark.slow
def test_it_goes_on_after_a_kill_bit_for_bit(tmp_path: Path) -> None:
    chain = RealChain(tmp_path)
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name in ("toy_dpo.py", "toy_labels.py"):
        shutil.copy(HERE / name, tmp_path)
    settings = (*MOUNTED[1:], "labels.data=labels.jsonl", "checkpoint.every_steps=1", MOUNTED[0])
    chain.run("whole", *settings)
    kill(chain.start_until("labels", 2, "killed", *settings))
    assert newest_step(chain.store("killed"), "labels") >= 2
    out, _ = chain.run("killed", *settings)
    assert "prepare reused" in out and "labels runs" in out
    assert chain.weights("killed", "labels") == chain.weights("whole", "labels")
