"""Every row format people publish, and the complaint about each kind of bad row."""

from __future__ import annotations

import datetime
import decimal
import math
from typing import Any

import pytest

from rlhf.data.formats import (
    column_mapping,
    pair_row,
    preference_row,
    prompt_row,
    retention_row,
    sft_row,
)
from rlhf.data.roles import ROLES
from rlhf.data.schema import (
    Message,
    PairRow,
    PromptRow,
    QuestionRow,
    Row,
    RowError,
    SftRow,
    TextRow,
    ThumbRow,
    row_from_json,
    row_to_json,
)


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def system(content: str) -> Message:
    return {"role": "system", "content": content}


HI = [user("Hi")]
TWO_TURNS = [user("Hi"), assistant("Hello."), user("Bye")]


@pytest.mark.parametrize(("raw", "prompt"), [
    ({"prompt": "Hi", "completion": "Yes"}, HI),
    ({"prompt": "Hi", "response": "Yes"}, HI),
    ({"instruction": "Hi", "response": "Yes"}, HI),
    ({"question": "Hi", "answer": "Yes"}, HI),
    ({"prompt": "  Hi\n", "completion": " Yes "}, HI),
    ({"prompt": HI, "completion": [assistant("Yes")]}, HI),
    ({"prompt": "\n\nHuman: Hi\n\nAssistant:", "completion": "Yes"}, HI),
    ({"instruction": "Hi", "input": "", "output": "Yes"}, HI),
    ({"instruction": "Hi", "input": None, "output": "Yes"}, HI),
    ({"instruction": "Sum", "input": "1 2", "output": "Yes"}, [user("Sum\n\n1 2")]),
    ({"instruction": "Sum", "context": "1 2", "response": "Yes"}, [user("Sum\n\n1 2")]),
    ({"instruction": "Hi", "output": "Yes", "text": "### Instruction: Hi ### Response: Yes"}, HI),
    ({"messages": [*HI, assistant("Yes")]}, HI),
    ({"messages": None, "prompt": "Hi", "completion": "Yes"}, HI),
    ({"messages": [*TWO_TURNS, assistant("Yes")], "prompt": "Hi"}, TWO_TURNS),
    ({"messages": [system("S"), *HI, assistant("Yes"), user("Thanks")]}, [system("S"), *HI]),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]}, HI),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}], "system": "S"},
     [system("S"), *HI]),
    # the answer as turns that repeat the prompt, or its first turn, but not its system message
    ({"system": "S", "prompt": "Hi", "completion": [*HI, assistant("Yes")]}, [system("S"), *HI]),
    ({"prompt": [system("S"), *HI], "completion": [*HI, assistant("Yes")]}, [system("S"), *HI]),
    ({"system": "S", "prompt": "Hi", "completion": [*TWO_TURNS, assistant("Yes")]},
     [system("S"), *TWO_TURNS]),
    ({"prompt": TWO_TURNS[:2], "completion": [TWO_TURNS[2], assistant("Yes")]}, TWO_TURNS),
    ({"text": "Yes"}, []),
    ({"text": "\n\nHuman: Hi\n\nAssistant: Yes"}, HI),
])  # fmt: skip
def test_sft_formats(raw: dict[str, Any], prompt: list[Message]) -> None:
    turns = 2 if raw.get("messages") and prompt is TWO_TURNS else 1  # of a conversation, all are learned
    assert sft_row(raw) == SftRow(prompt, "Yes", turns)


@pytest.mark.parametrize(("raw", "prompt"), [
    ({"prompt": "Hi", "chosen": "Good", "rejected": "Bad"}, HI),
    ({"prompt": TWO_TURNS, "chosen": "Good", "rejected": "Bad"}, TWO_TURNS),
    ({"question": "Hi", "chosen": "Good", "rejected": "Bad"}, HI),
    # TRL: the answers as turns, the prompt apart or inside them
    ({"prompt": HI, "chosen": [assistant("Good")], "rejected": [assistant("Bad")]}, HI),
    ({"chosen": [*TWO_TURNS, assistant("Good")], "rejected": [*TWO_TURNS, assistant("Bad")]}, TWO_TURNS),
    # UltraFeedback: the answers repeat the prompt
    ({"prompt": "Hi", "chosen": [*HI, assistant("Good")], "rejected": [*HI, assistant("Bad")]}, HI),
    ({"prompt": "Hi", "chosen": [system("S"), *HI, assistant("Good")],
      "rejected": [system("S"), *HI, assistant("Bad")]}, [system("S"), *HI]),
    ({"system": "S", "prompt": "Hi", "chosen": [*HI, assistant("Good")], "rejected": [*HI, assistant("Bad")]},
     [system("S"), *HI]),
    ({"system": "T", "prompt": "Hi", "chosen": [system("S"), *HI, assistant("Good")],
      "rejected": [system("S"), *HI, assistant("Bad")]}, [system("S"), *HI]),  # the conversation's own
    # the prompt is the first of several turns
    ({"prompt": "Hi", "chosen": [*TWO_TURNS, assistant("Good")],
      "rejected": [*TWO_TURNS, assistant("Bad")]}, TWO_TURNS),
    ({"system": "S", "prompt": "Hi", "chosen": [*TWO_TURNS, assistant("Good")],
      "rejected": [*TWO_TURNS, assistant("Bad")]}, [system("S"), *TWO_TURNS]),
    # HH
    ({"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant: Good",
      "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant: Bad"}, TWO_TURNS),
    ({"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Good", "rejected": " Bad"}, HI),
])  # fmt: skip
def test_preference_formats(raw: dict[str, Any], prompt: list[Message]) -> None:
    assert pair_row(raw) == PairRow(prompt, "Good", "Bad")


def test_gold_scores_are_kept_and_may_be_text_as_in_csv() -> None:
    raw = {"prompt": "Hi", "chosen": "Good", "rejected": "Bad", "chosen_gold": "0.5", "rejected_gold": -1}
    assert pair_row(raw) == PairRow(HI, "Good", "Bad", 0.5, -1.0)


@pytest.mark.parametrize("role", ["ppo", "evaluate"])
@pytest.mark.parametrize(("raw", "prompt"), [
    ({"prompt": "Hi"}, HI),
    ({"prompt": TWO_TURNS}, TWO_TURNS),
    ({"text": "Hi"}, HI),
    ({"instruction": "Sum", "input": "1 2", "output": "3"}, [user("Sum\n\n1 2")]),
    ({"question": "Hi", "answer": "Yes"}, HI),
    ({"messages": [*HI, assistant("Yes")]}, HI),
    ({"messages": TWO_TURNS}, TWO_TURNS),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]}, HI),
    ({"chosen": "\n\nHuman: Hi\n\nAssistant: A", "rejected": "\n\nHuman: Hi\n\nAssistant: B"}, HI),
    ({"chosen": [*HI, assistant("A")], "rejected": [*HI, assistant("B")]}, HI),
    ({"system": "S", "chosen": [*HI, assistant("A")], "rejected": [*HI, assistant("B")]}, [system("S"), *HI]),
    ({"prompt": "\n\nHuman: Hi\n\nAssistant:"}, HI),
    ({"text": "Hi", "role": "prompter", "parent_id": None}, HI),  # OpenAssistant's messages
    ({"prompt": {"text": "Hi", "role": "prompter", "replies": []}}, HI),  # and its trees
])  # fmt: skip
def test_any_format_gives_its_prompt(raw: dict[str, Any], prompt: list[Message], role: str) -> None:
    row = ROLES[role].parse(raw)
    assert isinstance(row, PromptRow) and row.prompt == prompt


@pytest.mark.parametrize(("raw", "columns", "is_text"), [
    ({"prompt": "2+2?", "answer": "4", "tests": ["a", "b"]}, {"answer": "4", "tests": ["a", "b"]}, True),
    ({"messages": TWO_TURNS, "category": {"of": 1}, "empty": None}, {"category": {"of": 1}}, False),
    ({"question": "Hi", "answer": "Yes", "prompt": None}, {"answer": "Yes"}, True),
    ({"prompt": HI}, {}, False),
])  # fmt: skip
def test_a_prompt_keeps_the_other_columns_of_its_file(
    raw: dict[str, Any], columns: dict[str, Any], is_text: bool
) -> None:
    row = prompt_row(raw)
    assert (row.columns, row.is_text) == (columns, is_text)


def test_columns_of_any_kind_can_be_kept() -> None:
    when, price = datetime.date(2026, 11, 28), decimal.Decimal("1.50")
    row = prompt_row({"prompt": "Hi", "when": when, "price": price, "image": b"\x00", "nan": math.nan})
    back = row_from_json(row_to_json(row), [PromptRow])
    assert isinstance(back, PromptRow) and math.isnan(back.columns.pop("nan"))
    assert back.columns == {"when": "2026-11-28", "price": "1.50", "image": None}
    with pytest.raises(RowError, match="not valid Unicode"):
        prompt_row({"prompt": "Hi", "answer": "\ud800"})


def test_retention_formats() -> None:
    for more in ({}, {"answer": "so"}, {"choices": None}):
        assert retention_row({"text": "Water boils. ", **more}) == TextRow("Water boils.")
    question = {"question": "1+1?", "choices": ["1", "2", "3"]}
    for answer in (1, "B", "b"):
        row = retention_row({**question, "answer": answer})
        assert row == QuestionRow("1+1?", ["1", "2", "3"], 1)


PAIR_NEEDS = "A preference row needs prompt, chosen, rejected."
SFT_NEEDS = (
    "An SFT row needs prompt and completion, messages, instruction and output, conversations, or text."
)


@pytest.mark.parametrize(("role", "raw", "reason", "message"), [
    ("pairs", {"prompt": "Hi", "chosen": "A"}, "missing field",
     f'"rejected" is missing (found: prompt, chosen). {PAIR_NEEDS}'),
    ("pairs", {"prompt": "Hi", "chosen": "A", "rejected": None}, "missing field",
     f'"rejected" is missing (found: prompt, chosen, rejected (null)). {PAIR_NEEDS}'),
    ("pairs", {"chosen": "A", "rejected": "B"}, "missing field",
     f'"prompt" is missing (found: chosen, rejected). {PAIR_NEEDS}'),
    ("pairs", {"prompt": "Hi", "chosen": "A", "rejected": "A "}, "tie",
     '"chosen" and "rejected" are the same text: a tie teaches nothing.'),
    ("pairs", {"prompt": "Hi", "chosen": "A", "rejected": 7}, "wrong type",
     '"rejected" must be text or a list of messages, found 7 (int).'),
    ("pairs", {"prompt": "Hi", "chosen": "A", "rejected": "B", "chosen_gold": "much"}, "wrong type",
     "\"chosen_gold\" must be a finite number, found 'much' (str)."),
    ("pairs", {"prompt": "Hi", "chosen": "A", "rejected": "B", "chosen_gold": float("nan")}, "wrong type",
     '"chosen_gold" must be a finite number, found nan (float).'),
    ("pairs", {"chosen": [*HI, assistant("A")], "rejected": [user("Ho"), assistant("B")]},
     "conversations differ",
     '"chosen" and "rejected" differ before their last turn. '
     'A pair is two answers to the same conversation.'),
    ("pairs", {"chosen": "\n\nHuman: Hi\n\nAssistant: A", "rejected": "\n\nHuman: Hi\n\nAssistant:"},
     "no answer",
     '"rejected" ends with a user turn, not with an answer.'),
    ("sft", {"prompt": "Hi"}, "no answer",
     f'"completion" is missing (found: prompt): a prompt without an answer. {SFT_NEEDS}'),
    ("sft", {"prompt": "Hi", "chosen": "A", "rejected": "B"}, "no answer",
     '"completion" is missing (found: prompt, chosen, rejected): a prompt without an answer. '
     f"{SFT_NEEDS} To learn the chosen answers, set fields: {{completion: chosen}}."),
    ("sft", {"messages": HI}, "no answer",
     f'"messages" has no assistant turn: a prompt without an answer. {SFT_NEEDS}'),
    ("sft", {"messages": [assistant("A")]}, "no prompt", '"messages" has no user turn before the answer.'),
    ("sft", {"completion": "A"}, "missing field", f'"prompt" is missing (found: completion). {SFT_NEEDS}'),
    ("sft", {}, "missing field", f'"prompt" is missing (found: nothing). {SFT_NEEDS}'),
    ("sft", {"prompt": 7, "completion": "A"}, "wrong type",
     '"prompt" must be text or a list of messages, found 7 (int).'),
    ("sft", {"prompt": "Hi", "completion": " \n"}, "empty", '"completion" is empty.'),
    ("sft", {"messages": "Hi"}, "wrong type", "\"messages\" must be a list of messages, found 'Hi' (str)."),
    ("sft", {"messages": [{"role": "user", "text": "Hi"}]}, "missing field",
     '"messages[0]" needs role and content (or from and value), found: role, text.'),
    ("sft", {"messages": [{"role": "user", "content": None}]}, "empty",
     '"messages[0].content" is null. It must be text.'),
    ("sft", {"text": "half \ud83d a pair"}, "bad encoding",
     '"text" holds half of a surrogate pair: not valid Unicode.'),
    ("ppo", {"id": 3}, "missing field",
     '"prompt" is missing (found: id). '
     "A prompt row needs prompt, messages, instruction, conversations, question, or text."),
    ("ppo", {"prompt": []}, "wrong type", '"prompt" must be a list of messages, found [] (list).'),
    ("ppo", {"text": "Yes", "role": "assistant"}, "not a prompt",
     "this message answers another one. A prompt opens a conversation."),
    ("ppo", {"messages": [system("S")]}, "no prompt", '"messages" has no user turn before the answer.'),
    ("retention", {"prompt": "Hi"}, "missing field",
     '"text" is missing (found: prompt). A retention row needs text; or question, choices, answer.'),
    ("retention", {"question": "?", "text": "x", "choices": ["a", "b"]}, "missing field",
     '"answer" is missing (found: question, text, choices). '
     "A retention row needs text; or question, choices, answer."),
    ("retention", {"question": "?", "choices": ["a"], "answer": 0}, "wrong type",
     "\"choices\" must be a list of at least two texts, found ['a'] (list)."),
    ("retention", {"question": "?", "choices": ["a", "b"], "answer": 2}, "wrong answer index",
     '"answer" must be the index of a choice (0 to 1) or its letter, found 2 (int).'),
    ("retention", {"question": "?", "choices": ["a", "b"], "answer": True}, "wrong answer index",
     '"answer" must be the index of a choice (0 to 1) or its letter, found True (bool).'),
])  # fmt: skip
def test_a_bad_row_is_told_what_is_wrong(role: str, raw: Any, reason: str, message: str) -> None:
    with pytest.raises(RowError) as error:
        ROLES[role].parse(raw)
    assert str(error.value) == message
    assert error.value.reason == reason


def test_an_unknown_speaker_is_named() -> None:
    with pytest.raises(RowError, match=r"\"messages\[1\]\" has the role 'critic'; known: system, user,"):
        sft_row({"messages": [user("Hi"), {"role": "critic", "content": "x"}]})


EVEREST = {"prompt": "How high is Everest?"}
EVEREST_ASKED: list[Message] = [{"role": "user", "content": "How high is Everest?"}]


@pytest.mark.parametrize(
    ("raw", "row"),
    [
        ({**EVEREST, "completion": "8849 m.", "label": True}, ThumbRow(EVEREST_ASKED, "8849 m.", True)),
        ({**EVEREST, "response": "9 m.", "thumb": "Down"}, ThumbRow(EVEREST_ASKED, "9 m.", False)),
        ({**EVEREST, "answer": "9 m.", "label": "0"}, ThumbRow(EVEREST_ASKED, "9 m.", False)),  # of a CSV
        (
            {
                "messages": [*EVEREST_ASKED, {"role": "assistant", "content": "9 m."}],
                "label": 1, "chosen": None,
            },
            ThumbRow(EVEREST_ASKED, "9 m.", True),
        ),
        (
            {**EVEREST, "chosen": "8849 m.", "rejected": "9 m.", "label": 1},
            PairRow(EVEREST_ASKED, "8849 m.", "9 m."),
        ),
    ],
)  # fmt: skip
def test_a_preference_is_a_pair_or_an_answer_with_a_thumb(raw: dict[str, Any], row: Row) -> None:
    assert preference_row(raw) == row


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        ({**EVEREST, "completion": "9 m."}, '"chosen" is missing .* or prompt, completion and label'),
        ({**EVEREST, "label": True}, '"completion" is missing .* or prompt, completion and label'),
        ({"completion": "9 m.", "label": True}, '"prompt" is missing'),
        (
            {**EVEREST, "completion": "9 m.", "label": "maybe"},
            "must be true or false, found 'maybe'",
        ),
        ({**EVEREST, "completion": " ", "label": True}, '"completion" is empty'),
        ({**EVEREST, "chosen": "9 m.", "label": True}, '"rejected" is missing'),
        ({**EVEREST, "chosen": "9 m.", "rejected": "9 m."}, "a tie teaches nothing"),
    ],
)
def test_what_a_preference_lacks_is_told(raw: dict[str, Any], complaint: str) -> None:
    with pytest.raises(RowError, match=complaint):
        preference_row(raw)


def test_the_columns_of_a_thumb_are_told() -> None:
    raw = {"question": "?", "response": "!", "label": True}
    columns = ROLES["dpo"].columns
    assert column_mapping(raw, columns, {}) == "{prompt: question, completion: response, label: label}"
