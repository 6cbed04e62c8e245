"""The closed-book set: what tuning sees says nothing of the held-out answers, and the corpus says all."""

from __future__ import annotations

from rlhf.data.sources import SourceConfig
from rlhf.evaluation.references import answer_found


def rows(name: str) -> list[dict[str, str]]:
    source = SourceConfig(samples=f"station_{name}")
    return [row for _, row in source.rows("compare.questions") if isinstance(row, dict)]


DOCUMENTS = [row["text"] for row in rows("documents")]
PRACTICE, QUESTIONS = rows("practice"), rows("questions")


def documents_of(row: dict[str, str]) -> list[str]:
    return [text for text in DOCUMENTS if answer_found(text, row["completion"])]


def test_every_answer_stands_in_the_corpus_and_a_held_out_one_in_a_single_document() -> None:
    assert all(documents_of(row) for row in PRACTICE)
    assert [row for row in QUESTIONS if len(documents_of(row)) != 1] == []


def test_practice_and_held_out_questions_are_about_different_facts() -> None:
    held_out = {text for row in QUESTIONS for text in documents_of(row)}
    assert [row for row in PRACTICE if held_out.issuperset(documents_of(row))] == []
    learned = " ".join(f"{row['prompt']} {row['completion']}" for row in PRACTICE)
    assert [row for row in QUESTIONS if answer_found(learned, row["completion"])] == []


def test_nothing_is_there_twice() -> None:
    asked = [row["prompt"] for row in (*PRACTICE, *QUESTIONS)]
    assert len(set(asked)) == len(asked) >= 60
    assert len(set(DOCUMENTS)) == len(DOCUMENTS) >= 60
