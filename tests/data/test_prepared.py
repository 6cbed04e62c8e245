"""What a prompt's lot depends on, and that prepared rows come back as they were written."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from datasets import Dataset

from helpers.jobs import user
from rlhf.data.prepared import PreparedData
from rlhf.data.schema import (
    Message,
    PairRow,
    PromptRow,
    QuestionRow,
    Row,
    SftRow,
    TextRow,
    drawn,
    prompt_identity,
)

HI = user("Write about Größe")
IDENTITIES = [prompt_identity(TextRow(f"text {number}")) for number in range(4000)]


def test_a_prompt_has_one_identity_in_every_role() -> None:
    rows: list[Row] = [
        SftRow(HI, "a"),
        SftRow(HI, "b"),
        PairRow(HI, "a", "b"),
        PromptRow(HI),
        TextRow(HI[0]["content"]),
    ]
    assert len({prompt_identity(row) for row in rows}) == 1


@pytest.mark.parametrize("same", [
    "write ABOUT GRÖSSE",  # case
    "  Write\n about\tGröße ",  # spacing
    "Write about Gro\u0308ße",  # decomposed umlaut
    "\uff37rite about Größe",  # full-width letter
])  # fmt: skip
def test_form_does_not_change_the_identity(same: str) -> None:
    assert prompt_identity(PromptRow(user(same))) == prompt_identity(PromptRow(HI))


def test_other_words_and_other_turns_change_it() -> None:
    rows: list[Row] = [
        PromptRow(HI),
        PromptRow(user("Write about a size")),
        PromptRow([*HI, Message(role="assistant", content="Well?"), *user("Go on")]),
        SftRow([], "the completion of plain text"),
        SftRow([], "another text"),
    ]
    assert len({prompt_identity(row) for row in rows}) == len(rows)


def test_a_draw_takes_its_fraction_and_grows_with_it() -> None:
    tenth = {identity for identity in IDENTITIES if drawn(identity, 0.1, "held_out")}
    fifth = {identity for identity in IDENTITIES if drawn(identity, 0.2, "held_out")}
    assert 0.085 < len(tenth) / len(IDENTITIES) < 0.115  # three standard deviations
    assert tenth < fifth


def test_the_two_draws_are_independent() -> None:
    evaluation = [identity for identity in IDENTITIES if drawn(identity, 0.5, "evaluation")]
    held_out = [identity for identity in evaluation if drawn(identity, 0.5, "held_out")]
    assert 0.46 < len(held_out) / len(evaluation) < 0.54


def test_rows_come_back_as_written(tmp_path: Path) -> None:
    data = PreparedData(tmp_path)
    question = [QuestionRow("1+1?", ["1", "2"], 1)]
    pairs = [PairRow(HI, "a\u2028b", "c", 0.5, None)]
    data.write("sft", "train", [SftRow(HI, "a"), SftRow([], "b")])
    data.write("pairs", "held_out", pairs)
    data.write("evaluate", "evaluation", [PromptRow(HI)])
    data.write("retention", "evaluation", [TextRow("x\ny", "speeches"), *question])
    assert [*data.rows("sft", "train")] == [SftRow(HI, "a"), SftRow([], "b")]
    assert [*data.rows("pairs", "held_out")] == pairs
    assert [*data.rows("evaluate", "evaluation")] == [PromptRow(HI)]
    assert [*data.rows("retention", "evaluation")] == [TextRow("x\ny", "speeches"), *question]


def test_the_digest_is_of_both_splits_and_of_no_other_role(tmp_path: Path) -> None:
    data = PreparedData(tmp_path)
    data.write("sft", "train", [SftRow(HI, "a")])
    data.write("sft", "held_out", [SftRow(HI, "b")])
    before = data.digest("sft")
    data.write("ppo", "train", [PromptRow(HI)])
    assert data.digest("sft") == before
    data.write("sft", "held_out", [SftRow(HI, "c")])
    assert data.digest("sft") != before


def test_rows_are_a_sequence_read_where_they_are_asked_for(tmp_path: Path) -> None:
    data = PreparedData(tmp_path)
    rows = [SftRow(user(f"Größe {n} 🙂"), "x" * (n % 7)) for n in range(2500)]  # more than two pieces
    data.write("sft", "train", rows)
    found = data.rows("sft", "train")
    assert (len(found), found[0], found[2400], found[-1]) == (2500, rows[0], rows[2400], rows[-1])
    assert [*found] == rows
    assert [*found[1990:2010]] == rows[1990:2010]
    assert [*found[::-3][5:]] == rows[::-3][5:]
    assert random.Random(0).sample(found, 5) == random.Random(0).sample(rows, 5)
    with pytest.raises(IndexError):
        found[2500]


def test_one_very_long_row_and_none_at_all(tmp_path: Path) -> None:
    data = PreparedData(tmp_path)
    rows = [SftRow(HI, "y" * 10_000_000), SftRow(HI, "z")]
    data.write("sft", "train", rows)
    data.write("sft", "held_out", [])
    assert [*data.rows("sft", "train")] == rows
    assert [*data.rows("sft", "held_out")] == [*data.rows("sft", "train")[5:]] == []


def test_the_datasets_library_opens_the_file_and_equal_rows_are_equal_bytes(tmp_path: Path) -> None:
    written = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        PreparedData(tmp_path / name).write("sft", "train", [SftRow(HI, str(n)) for n in range(1500)])
        written.append(tmp_path / name / "sft.train.arrow")
    assert written[0].read_bytes() == written[1].read_bytes()
    opened = Dataset.from_file(str(written[0]))
    assert json.loads(opened[1234]["row"]) == {"prompt": HI, "completion": "1234", "turns": 1}
