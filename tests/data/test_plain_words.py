"""What asks the same, and what does not."""

from __future__ import annotations

import pytest

from rlhf.data.schema import plain_words


@pytest.mark.parametrize(
    "text",
    [
        "what is a polygon", "What is a polygon ?", "Please, what is a polygon!!", "**What is a polygon?**",
        "1. What is a polygon", "- What is a polygon?", "> What is a polygon?", "Q: What is a polygon?",
        "Question: what is a polygon", "What is a polygon, please?", "What is a polygon (please)",
        "What is a polygon? Thanks in advance!", "¿What is a «polygon»?", 'What is a "polygon"?',
        "bitte: What is a polygon, bitte",
    ],
)  # fmt: skip
def test_these_ask_the_same(text: str) -> None:
    assert plain_words(text) == plain_words("What is a polygon?")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("ما هو المضلع؟", "ما هو المضلع"), ("你好。", "你好"), ("बहुभुज क्या है।", "बहुभुज क्या है"),
        ("How are you, Bob?", "how are you Bob"), ("In town 3!!", "In town 3?"), ("It is 2.5.", "It is 2.5"),
    ],
)  # fmt: skip
def test_these_do_too(one: str, other: str) -> None:
    assert plain_words(one) == plain_words(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("f {a,b}", "f {a:b}"), ("x[-1:]", "x[-1]"), ("print('a')", "print(a)"), ('f("a")', "f(a)"),
        ("What does the . operator do in Ruby?", "What does the ; operator do in Ruby?"),
        ("What is 8 : 3?", "What is 8 \u2013 3?"), ("What is 5! now", "What is 5 now"),
        ("What is 3 + 4?", "What is 3 - 4?"), ("What is 2.5?", "What is 25?"), ("- 3 + 4", "3 + 4"),
        ("What is **kwargs", "What is kwargs"), ("Capital of France?", "Capital of Spain?"),
    ],
)  # fmt: skip
def test_these_do_not(one: str, other: str) -> None:
    assert plain_words(one) != plain_words(other)
