"""The material of prompts stays in its file until it is asked for."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from helpers.jobs import user
from rlhf.compare.dataset import find_library, find_questions
from rlhf.data.prepared import PreparedData
from rlhf.data.roles import training_roles
from rlhf.data.schema import Message, SftRow
from rlhf.data.sources import SourceConfig

NUM_ROWS, WORDS = 3000, "many words " * 300
TALK: list[Message] = [*user("Hi"), Message(role="assistant", content="Hello."), *user("Bye?")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """10 MB in each split."""
    data = PreparedData(tmp_path_factory.mktemp("prepared"))
    rows = [SftRow(user(f"Question {n}?"), f"{WORDS}{n}") for n in range(NUM_ROWS)]
    rows[5], rows[7] = SftRow(TALK, "Bye."), SftRow([], "A text.")
    data.write("sft", "train", rows)
    data.write("sft", "held_out", rows)
    for role in {*training_roles()} - {"sft"}:
        data.write(role, "train", [])
    return data


def test_examples_and_passages_are_read_where_they_are_asked_for(data: PreparedData) -> None:
    tracemalloc.start()
    library = find_library(None, data, "compare.corpus")
    questions = find_questions(None, data, max_questions=20).questions
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5_000_000  # a piece of the file is 3 MB
    assert len(library.passages) == NUM_ROWS and len(library.examples) == NUM_ROWS - 2
    assert library.passages[5] == "Hi\nHello.\nBye?\nBye." and library.passages[7] == "A text."
    assert [*library.passages[4:8:3]] == [library.passages[4], "A text."]
    assert [row.prompt for row in library.examples[4:7]] == [user(f"Question {n}?") for n in (4, 6, 8)]
    assert library.examples[-1].completion == f"{WORDS}{NUM_ROWS - 1}"
    assert [question.prompt for question in questions[4:7]] == [
        user("Question 4?"),
        TALK,
        user("Question 6?"),
    ]
    assert len(questions) == 20


def test_a_question_that_training_rows_ask_is_a_leak(data: PreparedData, tmp_path: Path) -> None:
    asked = ["question 17?", "Is this new?", "Question 2999?"]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in asked))
    found = find_questions(SourceConfig(path=str(tmp_path / "asked.jsonl")), data, max_questions=None)
    assert ([question.text for question in found.questions], found.num_leaks) == (["Is this new?"], 2)
