"""What a prompt's lot depends on, and that prepared rows come back as they were written."""

from __future__ import annotations

from pathlib import Path

import pytest

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
    assert data.rows("sft", "train") == [SftRow(HI, "a"), SftRow([], "b")]
    assert data.rows("pairs", "held_out") == pairs
    assert data.rows("evaluate", "evaluation") == [PromptRow(HI)]
    assert data.rows("retention", "evaluation") == [TextRow("x\ny", "speeches"), *question]


def test_the_digest_is_of_both_splits_and_of_no_other_role(tmp_path: Path) -> None:
    data = PreparedData(tmp_path)
    data.write("sft", "train", [SftRow(HI, "a")])
    data.write("sft", "held_out", [SftRow(HI, "b")])
    before = data.digest("sft")
    data.write("ppo", "train", [PromptRow(HI)])
    assert data.digest("sft") == before
    data.write("sft", "held_out", [SftRow(HI, "c")])
    assert data.digest("sft") != before
