"""Which prompts ask the same, though they differ in characters."""

from __future__ import annotations

import random

import pytest

from rlhf.data.formats import prompt_row
from rlhf.data.near import MAX_TEXTS_PER_RUN, near_duplicates
from rlhf.data.schema import plain_words, prompt_identity
from rlhf.data.sources import SourceConfig

STORY = (
    "Mara has lived in the old house by the river since her father left for the north. Every morning she "
    "walks to the mill, buys two loaves of bread and feeds the smaller one to the swans below the bridge. "
    "One day in October of 1890 a stranger sits there, wrapped in a grey coat, and tells her that the swans "
    "are not hers. Write the next page of the story."
)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Write a tweet about the tram.", "write a tweet  about the tram"),
        ("Write a tweet about the tram.", "Write a tweet about the tram please, thanks"),
        ("Write a tweet about the tram.", "Please, write a tweet about the tram!"),
        ("Who was born in 1890?", "Who was born in 1890."),
        ("Please kindly write a tweet about the tram.", "Write a tweet about the tram, please."),
        ('What are "its" and "theirs"?', "What are its and theirs?"),
        ("Explain: why, or why not, trams?", "Explain why or why not trams\u2026"),
        ("\u4ecb\u7ecd\u4e00\u4e0b\u6cd5\u56fd\u3002", "\u4ecb\u7ecd\u4e00\u4e0b\u6cd5\u56fd"),
        ("\u00bfD\u00f3nde est\u00e1 el tranv\u00eda?", "D\u00f3nde esta\u0301 el tranv\u00eda"),
        ("Erkl\u00e4re die Stra\u00dfenbahn.", "erkla\u0308re die STRASSENBAHN"),
    ],
)  # fmt: skip
def test_marks_case_spaces_and_politeness_do_not_change_what_is_asked(one: str, other: str) -> None:
    assert plain_words(one) == plain_words(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 3+4?", "What is 5+4?"),
        ("What is 3 - 4?", "What is 3 4?"),
        ("What is 3.5?", "What is 35?"),
        ("What is .5?", "What is 5?"),
        ("What is 5!?", "What is 5?"),
        ("What is (3 + 4) * 2?", "What is 3 + (4 * 2)?"),
        ("What is the capital of France?", "What is the capital of Spain?"),
        ("Is C# fast?", "Is C fast?"),
        ("???", "!!!"),
    ],
)  # fmt: skip
def test_a_number_a_sign_or_a_word_makes_another_question(one: str, other: str) -> None:
    assert plain_words(one) != plain_words(other)


def found(asked: list[str], trained: list[str]) -> dict[str, str]:
    return dict(near_duplicates(asked, trained, str))


def changed(text: str, *words: tuple[str, str]) -> str:
    for old, new in words:
        assert old in text
        text = text.replace(old, new, 1)
    return text


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (changed(STORY, (" and feeds", " and gives")), True),
        (changed(STORY, ("a stranger", "the stranger"), ("loaves of bread", "bread rolls")), True),
        (f"Hello. {STORY} Take your time.", True),
        (changed(STORY, ("1890", "1891")), False),
        (changed(STORY, ("next page of", "last line of")), False),  # the task
        (changed(STORY, ("Mara", "Paul")), False),
        (f"{STORY} Use no more than fifty words.", False),  # Jaccard index 0.92, but asks for more
        (changed(STORY, ("swans", "geese"), ("smaller", "larger"), ("mill", "inn"), ("grey", "red")), False),
        (" ".join(STORY.split()[:40]), False),
    ],
)  # fmt: skip
def test_long_texts_may_differ_in_a_few_words(other: str, same: bool) -> None:
    assert found([STORY], [other]) == ({STORY: other} if same else {})
    assert found([other], [STORY]) == ({other: STORY} if same else {})


def long_texts(frame: str = "{}", count: int = 300, words: int = 60) -> list[str]:
    draw = random.Random(0)
    vocabulary = ["".join(draw.choices("abcdefghijklmnoprstuvwy", k=6)) for _ in range(2000)]
    return [frame.format(" ".join(draw.choices(vocabulary, k=words))) for _ in range(count)]


def test_long_texts_with_few_other_words_are_found_among_many() -> None:
    trained = long_texts()
    asked = [" ".join(["new", *text.split()[1:30], "word", *text.split()[31:]]) for text in trained[:50]]
    assert found(asked, trained) == dict(zip(asked, trained, strict=False))
    assert found(asked, trained[50:]) == {}


def test_texts_of_a_template_ask_different_things() -> None:
    (frame,) = long_texts(count=1)
    asked, *trained = long_texts(
        f"{frame} Tell me about {{}} and nothing else.", MAX_TEXTS_PER_RUN + 10, words=1
    )
    assert found([asked], trained[:1]) == {asked: trained[0]}  # nobody knows that it is a template
    assert found([asked], trained[:MAX_TEXTS_PER_RUN]) == {}
    again = changed(asked, ("nothing", "little"))
    assert found([asked], [*trained, again]) == {}  # too little is left of it to tell


def test_a_templates_texts_are_compared_by_what_is_their_own() -> None:
    (frame,) = long_texts(count=1, words=200)
    trained = [f"{frame} {text}" for text in long_texts(count=MAX_TEXTS_PER_RUN + 11)[1:]]
    asked = changed(trained[7], (trained[7].split()[230], "word"))
    assert found([asked], trained) == {asked: trained[7]}


@pytest.mark.parametrize(
    "name", ["instructions", "pairs", "prompts", "arithmetic", "station_practice", "retention_questions"]
)
def test_no_two_prompts_of_the_packaged_data_are_near(name: str) -> None:
    source = SourceConfig(samples=name)
    raws = [raw for _, content in source.unread("sft.data") if isinstance(raw := source.read(content), dict)]
    if name == "retention_questions":
        raws = [{"prompt": raw["question"]} for raw in raws]
    rows = {prompt_identity(row): plain_words(row.asked()) for row in map(prompt_row, raws)}
    assert len({*rows.values()}) == len(rows) > 20
