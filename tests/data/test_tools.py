"""Conversations with tools: what is learned of them, and templates that cannot show them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.chains import Chain
from helpers.encoded import answers_of
from helpers.jobs import TINY
from rlhf.data.chat_template import CHATML, PLAIN, encode
from rlhf.data.formats import preference_row, prompt_row, sft_row
from rlhf.data.prepared import PreparedData
from rlhf.data.schema import RowError, each_turn
from rlhf.models.base import load_tokenizer

WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\nTools: {% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "<|im_end|>\n{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function.name }} "
    "{{ call.function.arguments | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""In the manner of Qwen and Hermes."""
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather", "description": "Of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]  # fmt: skip
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How is the weather in Bern?", "tool_calls": None},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "tool_call_id": "1", "content": "sunny, 21 degrees"},
    {"role": "assistant", "content": "Sunny."},
    {"role": "user", "content": "And in Basel?"},
    {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL]},
]
ROW = {"messages": MESSAGES, "tools": TOOLS}
LEARNED = [
    '<tool_call>weather {"city": "Bern"}</tool_call><|im_end|>',
    "Sunny.<|im_end|>",
    'Let me look.<tool_call>weather {"city": "Bern"}</tool_call><|im_end|>',
]


def tokenizer(directory: Path, template: str) -> Any:
    found = load_tokenizer(directory, TINY)
    found.chat_template = template
    return found


def test_calls_and_texts_of_the_assistant_are_learned_and_nothing_else(tiny_model: Path) -> None:
    words, row = tokenizer(tiny_model, WITH_TOOLS), sft_row(ROW)
    (encoded,) = encode(words, row)
    assert [words.decode(encoded.ids[start:end]) for start, end in encoded.spans] == LEARNED
    whole = words.decode(encoded.ids)
    assert '"description": "Of a city."' in whole and "sunny, 21 degrees<|im_end|>" in whole
    (answer,) = answers_of(words, [row])
    assert words.decode(answer.answer[answer.mask]) == "".join(LEARNED)
    # what transformers itself makes of the conversation
    turns: list[Any] = [{**each, "content": each["content"] or ""} for each in MESSAGES]
    for turn in turns:
        if turn.get("tool_calls"):
            turn["tool_calls"] = [{"function": {"name": "weather", "arguments": {"city": "Bern"}}}]
    assert words.apply_chat_template(turns, tools=TOOLS, tokenize=False) == f"{whole}\n"


def test_each_turn_alone_stands_behind_what_it_is_sampled_after(tiny_model: Path) -> None:
    words, row = tokenizer(tiny_model, WITH_TOOLS), sft_row(ROW)
    (whole,) = encode(words, row)
    for turn, learned in zip(each_turn(row), LEARNED, strict=True):
        (alone,) = encode(words, turn)
        assert whole.ids[: len(alone.ids)] == alone.ids
        assert words.decode(alone.ids[alone.num_prompt :]) == learned


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (CHATML, "it does not show the assistant's calls (tool_calls)"),
        (PLAIN, "it does not show the assistant's calls (tool_calls)"),
        (WITH_TOOLS.replace("if tools", "if false"), "it does not show the tools that may be called"),
        (
            WITH_TOOLS.replace("{{ message.content }}", "{{ message.content if message.role != 'tool' }}"),
            "it does not show what a tool answers (role tool)",
        ),
    ],
)  # fmt: skip
def test_a_template_that_leaves_tools_out_is_refused_by_row(
    tmp_path: Path, template: str, complaint: str
) -> None:
    chain = Chain(tmp_path)
    (tmp_path / "mine.jinja").write_text(template)
    rows: list[dict[str, Any]] = [{"prompt": f"Say {n}", "completion": f"It is {n}."} for n in range(24)]
    chain.write("sft.jsonl", [*rows, ROW])
    found = chain.run("stage=prepare", "model.chat_template=mine.jinja")
    assert found.code == 2 and complaint in found.err, found.err
    assert "sft.jsonl line 25" in found.err
    assert "or name one (model.chat_template=FILE)" in found.err and "Fix the row" not in found.err


def test_it_is_trained_on_and_its_prompts_are_not_lent(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    (tmp_path / "mine.jinja").write_text(WITH_TOOLS)
    rows: list[dict[str, Any]] = [{"prompt": f"Say {n}", "completion": f"It is {n}."} for n in range(24)]
    called = [{**ROW, "messages": [*MESSAGES[:2], {"role": "assistant", "tool_calls": [CALL]}]}]
    talks = [{"messages": [{**MESSAGES[1], "content": f"Weather {n}?"}, *MESSAGES[2:]]} for n in range(8)]
    chain.write("sft.jsonl", [*rows, *called, *talks])
    found = chain.run(
        "stage=[sft,evaluate]", "evaluate.policies=[base,sft]", "evaluate.subject=sft", "evaluate.init=base",
        "evaluate.reward=null", "evaluate.prompts=sft.data", "ppo.prompts=sft.data", "gates=warn",
        "model.chat_template=mine.jinja", "sft.epochs=1",
    )  # fmt: skip
    assert found.code == 0, found.err
    data = PreparedData(found.artifact("prepare"))
    rows_read = [row for split in ("train", "held_out") for row in data.rows("sft", split)]
    assert sum(row.uses_tools for row in rows_read) == 9
    lent = "".join(path.read_text() for path in found.artifact("evaluate").glob("*.jsonl"))
    assert "Say" in lent and "eather" not in lent


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"tools": "no JSON"}, '"tools" is no JSON'),
        ({"tools": [1]}, '"tools" must be a list of mappings'),
        ({"tools": [{"type": "function"}]}, '"tools[0]" needs a function with a name'),
        (
            {"messages": [*MESSAGES[:2], {"role": "assistant", "tool_calls": [{}]}]},
            "needs a function with a name",
        ),
        (
            {"messages": [*MESSAGES[:2], {"role": "assistant", "tool_calls": [
                {"function": {"name": "weather", "arguments": "Bern"}}]}]},
            '"messages[2].tool_calls[0].arguments" must be a mapping, or JSON of one',
        ),
        (
            {"messages": [*MESSAGES[:3], {"role": "tool", "content": None}, MESSAGES[4]]},
            '"messages[3].content" is null',
        ),
        ({"messages": [{**MESSAGES[1], "tool_calls": [CALL]}, MESSAGES[4]]}, "has tool_calls, and its role"),
    ],
)  # fmt: skip
def test_a_malformed_row_is_said(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(RowError) as error:
        sft_row({**ROW, **change})
    assert complaint in str(error.value)


def test_tools_may_be_json_and_belong_to_messages_alone() -> None:
    assert sft_row({**ROW, "tools": json.dumps(TOOLS)}) == sft_row(ROW)
    assert sft_row({**ROW, "tools": None}).prompt[0] == {"role": "system", "content": "Be brief."}
    with pytest.raises(RowError, match="needs the conversation in the column messages"):
        sft_row({"prompt": "a", "completion": "b", "tools": TOOLS})
    for parse, row in ((prompt_row, ROW), (preference_row, {**ROW, "label": True})):
        with pytest.raises(RowError):
            parse(row)
