"""Parsers: from a row of a published data set to the row that a stage reads, or an error that says what is
wrong.

Formats: prompt/completion and similar columns, messages, Alpaca, ShareGPT, plain text, preference rows
(answers as text or as message lists, the prompt in its own column or inside them) and HH transcripts.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal

from rlhf.data.schema import (
    Message,
    PairRow,
    PromptRow,
    QuestionRow,
    RowError,
    SftRow,
    TextRow,
    ThumbRow,
    answer_of,
    row_to_json,
    text_of,
)

Raw = Mapping[str, Any]

CONVERSATION_COLUMNS = ("messages", "conversations", "conversation")
PROMPT_COLUMNS = ("prompt", "instruction", "question")
ANSWER_COLUMNS = ("completion", "response", "output", "answer")
THUMB_COLUMNS = ("label", "thumb")
QUESTION_COLUMNS = ("question", "choices", "answer")
CONTEXT_COLUMNS = ("input", "context")
"""The text that an instruction or question is about (Alpaca, Dolly). It follows after a blank line."""

SPEAKERS: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "model": "assistant",
}  # fmt: skip

SFT_NEEDS = (
    "An SFT row needs prompt and completion, messages, instruction and output, conversations, or text."
)
PAIR_NEEDS = "A preference row needs prompt, chosen, rejected."
PREFERENCE_NEEDS = (
    "A row of preferences needs prompt, chosen, rejected; or prompt, completion and label (true or false)."
)
PROMPT_NEEDS = "A prompt row needs prompt, messages, instruction, conversations, question, or text."
RETENTION_NEEDS = "A retention row needs text; or question, choices, answer."

HH_START, HH_TURN = "\n\nHuman:", re.compile(r"\n\n(Human|Assistant):")


def sft_row(raw: Raw) -> SftRow:
    """A row to learn an answer from.

    Raises:
        RowError: the row cannot be used. The text says what is wrong, what was found, and what is needed.
    """
    column = _first_column(raw, CONVERSATION_COLUMNS)
    if column is not None:
        messages = _with_system(raw, _messages(raw[column], column, tools=True))
        return _last_exchange(_with_tools(raw, messages), column)
    offered = raw["tools"] if isinstance(raw.get("tools"), list) else []
    if any(isinstance(tool, Mapping) and "function" in tool for tool in offered):
        raise RowError("tools", '"tools" needs the conversation in the column messages.')
    prompt_column, answer_column = _first_column(raw, PROMPT_COLUMNS), _first_column(raw, ANSWER_COLUMNS)
    if prompt_column is not None and answer_column is not None:
        before, completion = _answer(raw[answer_column], answer_column)
        prompt = _join_turns(_prompt(raw, prompt_column), before)
        return SftRow(_require_user_turn(prompt, prompt_column), completion)
    if prompt_column is not None:
        hint = (
            " To learn the chosen answers, set fields: {completion: chosen}." if _has(raw, "chosen") else ""
        )
        raise RowError(
            "no answer",
            f'"completion" is missing (found: {_column_names(raw)}): a prompt without an answer. '
            f"{SFT_NEEDS}{hint}",
        )
    if answer_column is not None or not _has(raw, "text"):
        raise _missing("prompt", raw, SFT_NEEDS)
    if _is_transcript(raw["text"]):
        return _last_exchange(_messages(raw["text"], "text"), "text")
    return SftRow([], _text(raw["text"], "text"))


def pair_row(raw: Raw) -> PairRow:
    """Two answers to one prompt.

    Raises:
        RowError: the row cannot be used. The text says what is wrong, what was found, and what is needed.
    """
    for needed in ("chosen", "rejected"):
        if not _has(raw, needed):
            raise _missing(needed, raw, PAIR_NEEDS)
    column = _first_column(raw, PROMPT_COLUMNS)
    prompt = [] if column is None else _prompt(raw, column)
    before, chosen = _answer(raw["chosen"], "chosen")
    before_rejected, rejected = _answer(raw["rejected"], "rejected")
    if before != before_rejected:
        raise RowError(
            "conversations differ",
            '"chosen" and "rejected" differ before their last turn. '
            "A pair is two answers to the same conversation.",
        )
    prompt = _with_system(raw, _join_turns(prompt, before))
    if not prompt:
        raise _missing("prompt", raw, PAIR_NEEDS)
    if chosen == rejected:
        raise RowError("tie", '"chosen" and "rejected" are the same text: a tie teaches nothing.')
    return PairRow(
        _require_user_turn(prompt, column or "chosen"),
        chosen,
        rejected,
        _gold(raw, "chosen_gold"),
        _gold(raw, "rejected_gold"),
    )


def preference_row(raw: Raw) -> PairRow | ThumbRow:
    """Two answers to one prompt; or one answer with a thumb up or down, in `label` or `thumb`.

    Raises:
        RowError: the row cannot be used. The text says what is wrong, what was found, and what is needed.
    """
    column = _first_column(raw, THUMB_COLUMNS)
    if column is None or _has(raw, "chosen") or _has(raw, "rejected"):
        if not _has(raw, "chosen") and not _has(raw, "rejected"):
            raise _missing("chosen", raw, PREFERENCE_NEEDS)
        return pair_row(raw)
    if _first_column(raw, CONVERSATION_COLUMNS) is None:
        for ours, columns in (("prompt", PROMPT_COLUMNS), ("completion", ANSWER_COLUMNS)):
            if _first_column(raw, columns) is None:
                raise _missing(ours, raw, PREFERENCE_NEEDS)
    exchange = sft_row(raw)
    if exchange.uses_tools:
        raise RowError("tools", "it uses tools, which only sft.data can. Leave it out.")
    return ThumbRow(exchange.prompt, text_of(exchange.completion), _thumb(raw[column], column))


THUMBS = {"true": True, "1": True, "up": True, "false": False, "0": False, "down": False}


def _thumb(value: Any, column: str) -> bool:
    """Accepts true, 1 and "true", because CSV cells are texts."""
    thumb = THUMBS.get(str(value).strip().lower())
    if thumb is None:
        raise RowError("wrong type", f'"{column}" must be true or false, found {_short_repr(value)}.')
    return thumb


def prompt_row(raw: Raw) -> PromptRow:
    """The prompt of any row, with its other columns.

    Raises:
        RowError: the row cannot be used. The text says what is wrong, what was found, and what is needed.
    """
    column = _prompt_column(raw)
    if column is None:
        raise _missing("prompt", raw, PROMPT_NEEDS)
    if column in CONVERSATION_COLUMNS:
        prompt = _with_system(raw, _messages(raw[column], column))
    elif column == "chosen":
        before, _ = _answer(raw[column], column)
        if not before:
            raise _missing("prompt", raw, PROMPT_NEEDS)
        prompt = _with_system(raw, before)
    else:
        prompt = _prompt(raw, column)
    while prompt and prompt[-1]["role"] == "assistant":
        prompt = prompt[:-1]
    row = with_columns(_require_user_turn(prompt, column), raw)
    checked_json(row)
    return row


def with_columns(prompt: list[Message], raw: Raw) -> PromptRow:
    """A row with this prompt and all columns of `raw`, except the column of the prompt."""
    column = _prompt_column(raw)
    others = {str(name): value for name, value in raw.items() if name != column and value is not None}
    return PromptRow(prompt, columns=others, is_text=column is not None and not isinstance(raw[column], list))


def checked_json(row: PromptRow) -> str:
    """The row's JSON.

    Raises:
        RowError: a column is not valid Unicode.
    """
    text = row_to_json(row)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowError(
            "bad encoding", "a column holds half of a surrogate pair: not valid Unicode."
        ) from None
    return text


def _prompt_column(raw: Raw) -> str | None:
    return _first_column(raw, (*CONVERSATION_COLUMNS, *PROMPT_COLUMNS, "chosen", "text"))


def retention_row(raw: Raw) -> TextRow | QuestionRow:
    """A text or a question that shows what a model still knows.

    Raises:
        RowError: the row cannot be used. The text says what is wrong, what was found, and what is needed.
    """
    if _has(raw, "text") and not _has(raw, "choices"):
        return TextRow(_text(raw["text"], "text"))
    if _first_column(raw, QUESTION_COLUMNS) is None:
        raise _missing("text", raw, RETENTION_NEEDS)
    return _question(raw)


def _question(raw: Raw) -> QuestionRow:
    for column in QUESTION_COLUMNS:
        if not _has(raw, column):
            raise _missing(column, raw, RETENTION_NEEDS)
    question, choices, answer = _text(raw["question"], "question"), raw["choices"], raw["answer"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise RowError(
            "wrong type", f'"choices" must be a list of at least two texts, found {_short_repr(choices)}.'
        )
    texts = [_text(choice, f"choices[{index}]") for index, choice in enumerate(choices)]
    letters = [chr(ord("A") + index) for index in range(len(texts))]
    if isinstance(answer, str) and answer.strip().upper() in letters:
        answer = letters.index(answer.strip().upper())
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(texts):
        raise RowError(
            "wrong answer index",
            f'"answer" must be the index of a choice (0 to {len(texts) - 1}) or its letter, '
            f"found {_short_repr(answer)}.",
        )
    return QuestionRow(question, texts, answer)


COLUMN_SYNONYMS = {
    "prompt": (*PROMPT_COLUMNS, "query", "input", "request", "user", "context", "title"),
    "completion": (*ANSWER_COLUMNS, "reply", "target", "assistant", "text", "solution"),
    "chosen": ("chosen", "preferred", "better", "winner", "accepted", "positive", "response_chosen"),
    "rejected": ("rejected", "dispreferred", "worse", "loser", "refused", "negative", "response_rejected"),
    "text": ("text", "content", "sentence", "document"),
}
"""Our name -> names that other data sets use for this column."""


def column_mapping(raw: Raw, columns: Sequence[str], fields: Mapping[str, str]) -> str:
    """YAML text: our names -> the source's columns read, such as `{prompt: question, completion: answer}`.

    Args:
        raw: a row whose columns `fields` has already renamed.
        columns: our names, as in `Role.columns`.
        fields: our names -> the source's columns.
    """
    conversation = _first_column(raw, CONVERSATION_COLUMNS)
    if "chosen" not in columns and conversation is not None:
        return _as_yaml({"messages": fields.get(conversation, conversation)})
    if columns == ("text",) and _has(raw, "choices"):
        columns = QUESTION_COLUMNS
    if "chosen" in columns and not _has(raw, "chosen") and (thumb := _first_column(raw, THUMB_COLUMNS)):
        columns = ("prompt", "completion", thumb)
    has_answer = bool({"completion", "chosen"} & {*columns})
    accepted = {
        "prompt": PROMPT_COLUMNS if has_answer else (*PROMPT_COLUMNS, "chosen", "text"),
        "completion": ANSWER_COLUMNS,
    }
    first_columns = {ours: _first_column(raw, accepted.get(ours, (ours,))) for ours in columns}
    mapping = {
        ours: fields.get(theirs, theirs) for ours, theirs in first_columns.items() if theirs is not None
    }
    return _as_yaml(mapping or {"text": "text"})


def similar_columns(raw: Raw, columns: Sequence[str]) -> dict[str, str]:
    """Our names -> the source's columns with a similar name. Spaces, brackets and capitals do not count. A
    column that holds a number is not taken for a text."""
    unused = [str(column) for column in raw]
    columns_by_name: dict[str, str] = {}
    for ours in columns:
        by_plain_name = {_plain_name(name): name for name in unused}
        candidates = [
            name
            for name, own in by_plain_name.items()
            if ours not in COLUMN_SYNONYMS or not _is_number(raw.get(own))
        ]
        for synonym in COLUMN_SYNONYMS.get(ours, (ours,)):
            matches = (
                [synonym]
                if synonym in by_plain_name
                else get_close_matches(synonym, candidates, n=1, cutoff=0.75)
            )
            matches += [name for name in candidates if synonym in name.split()]  # `better answer`
            if matches:
                columns_by_name[ours] = by_plain_name[matches[0]]
                unused.remove(columns_by_name[ours])
                break
    return columns_by_name


def _plain_name(column: str) -> str:
    return " ".join(re.sub(r"\(.*?\)|\[.*?\]", " ", column).lower().split())


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def likely_fields(raw: Raw, columns: Sequence[str]) -> str:
    """A `fields` value for a row without the columns that its role needs, guessed from the names of its
    columns. COLUMN stands for a column without a guess."""
    similar = similar_columns(raw, columns)
    return _as_yaml({ours: similar.get(ours, "COLUMN") for ours in columns})


def _as_yaml(columns: Mapping[str, str]) -> str:
    return "{" + ", ".join(f"{ours}: {quoted(theirs)}" for ours, theirs in columns.items()) + "}"


def quoted(text: str) -> str:
    """The text for Hydra and YAML, in quotes if it needs them."""
    return text if re.fullmatch(r"[\w./-]+", text) else json.dumps(text, ensure_ascii=False)


def _first_column(raw: Raw, columns: Sequence[str]) -> str | None:
    return next((column for column in columns if _has(raw, column)), None)


def _has(raw: Raw, column: str) -> bool:
    """Whether a row has a value. Null counts as absent: Parquet and the Hub give every row all columns."""
    return raw.get(column) is not None


def _prompt(raw: Raw, column: str) -> list[Message]:
    """A prompt from text, messages, a transcript, or the root of an OpenAssistant tree."""
    value = raw[column]
    if isinstance(value, Mapping) and "text" in value:
        value = value["text"]
    if isinstance(value, list) or _is_transcript(value):
        return _with_system(raw, _messages(value, column))
    if column == "text" and ("parent_id" in raw or "role" in raw):
        _check_opens_conversation(raw)
    text = _text(value, column, "text or a list of messages")
    if column in ("instruction", "question"):
        context = [raw[name] for name in CONTEXT_COLUMNS if raw.get(name) not in (None, "")]
        text = "\n\n".join([text, *(_text(value, "input") for value in context[:1])])
    return _with_system(raw, [{"role": "user", "content": text}])


def _check_opens_conversation(raw: Raw) -> None:
    """Refuse a message that answers another one. OpenAssistant has a row for every message of its trees, but
    only the roots are prompts."""
    if raw.get("parent_id") or SPEAKERS.get(str(raw.get("role", "user")).lower()) == "assistant":
        raise RowError("not a prompt", "this message answers another one. A prompt opens a conversation.")


def _answer(value: Any, column: str) -> tuple[list[Message], str]:
    """The turns before an answer, if the column holds a conversation; and the answer."""
    if not isinstance(value, list) and not _is_transcript(value):
        return [], _text(value, column, "text or a list of messages")
    messages = _messages(value, column)
    if messages[-1]["role"] != "assistant":
        raise RowError(
            "no answer", f'"{column}" ends with a {messages[-1]["role"]} turn, not with an answer.'
        )
    return messages[:-1], messages[-1]["content"]


def _join_turns(prompt: list[Message], before: list[Message]) -> list[Message]:
    """The prompt column followed by the turns before the answers. These turns often repeat the prompt or its
    first turn (UltraFeedback); then it appears once. Of two system messages, the conversation's own
    counts."""
    (opening, asked), (own_opening, turns) = _without_system(prompt), _without_system(before)
    if asked in (turns[: len(asked)], turns[len(turns) - len(asked) :]):
        return [*(own_opening or opening), *turns]
    return [*prompt, *before]


def _without_system(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    """The system message at the front, if there is one; and the turns."""
    num_system = 1 if messages and messages[0]["role"] == "system" else 0
    return messages[:num_system], messages[num_system:]


def _last_exchange(messages: list[Message], column: str) -> SftRow:
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise RowError(
            "no answer", f'"{column}" has no assistant turn: a prompt without an answer. {SFT_NEEDS}'
        )
    first_question = next((i for i, message in enumerate(messages) if message["role"] == "user"), 0)
    turns = max(1, sum(index > first_question for index in answers))  # earlier turns answer no question
    return SftRow(
        _require_user_turn(messages[: answers[-1]], column), answer_of(messages[answers[-1]]), turns
    )


def _require_user_turn(prompt: list[Message], column: str) -> list[Message]:
    if not any(message["role"] == "user" for message in prompt):
        raise RowError("no prompt", f'"{column}" has no user turn before the answer.')
    return prompt


def _with_system(raw: Raw, messages: list[Message]) -> list[Message]:
    if raw.get("system") in (None, "") or not messages or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": _text(raw["system"], "system")}, *messages]


def _messages(value: Any, column: str, *, tools: bool = False) -> list[Message]:
    """Messages from a list of role/content or from/value, or from an HH transcript.

    Args:
        tools: whether the assistant may call tools, and tools may answer.
    """
    if _is_transcript(value):
        return _transcript(value, column)
    if not isinstance(value, list) or not value:
        raise RowError("wrong type", f'"{column}" must be a list of messages, found {_short_repr(value)}.')
    messages: list[Message] = []
    for index, item in enumerate(value):
        where = f"{column}[{index}]"
        if not isinstance(item, Mapping):
            raise RowError("wrong type", f'"{where}" must have role and content, found {_short_repr(item)}.')
        who, what = ("role", "content") if "role" in item else ("from", "value")
        if tools and who == "role" and (item["role"] == "tool" or item.get("tool_calls")):
            messages.append(_tool_message(item, where))
            continue
        if who not in item or what not in item:
            raise RowError(
                "missing field",
                f'"{where}" needs role and content (or from and value), found: {_column_names(item)}.',
            )
        speaker = SPEAKERS.get(str(item[who]).lower())
        if speaker is None:
            raise RowError(
                "unknown role", f'"{where}" has the role {item[who]!r}; known: {", ".join(SPEAKERS)}.'
            )
        messages.append({"role": speaker, "content": _text(item[what], f"{where}.{what}")})
    return messages


def _tool_message(item: Raw, where: str) -> Message:
    """An assistant turn with calls, or the answer of a tool, in OpenAI's format."""
    if item["role"] == "tool":
        answer: Message = {"role": "tool", "content": _text(item.get("content"), f"{where}.content")}
        if item.get("name") is not None:
            answer["name"] = _text(item["name"], f"{where}.name")
        if item.get("tool_call_id") is not None:
            answer["tool_call_id"] = _text(item["tool_call_id"], f"{where}.tool_call_id")
        return answer
    if SPEAKERS.get(str(item["role"]).lower()) != "assistant":
        raise RowError("wrong type", f'"{where}" has tool_calls, and its role is {item["role"]!r}.')
    calls = _as_mappings(item["tool_calls"], f"{where}.tool_calls")
    content = item.get("content")
    return {
        "role": "assistant",
        "content": _text(content, f"{where}.content") if content not in (None, "") else "",
        "tool_calls": [_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)],
    }


def _call(call: Raw, where: str) -> dict[str, Any]:
    """A call. Its arguments become a mapping, which templates expect."""
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError("wrong type", f'"{where}" needs a function with a name, found {_short_repr(call)}.')
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            arguments = None
    if not isinstance(arguments, Mapping):
        raise RowError(
            "wrong type", f'"{where}.arguments" must be a mapping, or JSON of one, found '
            f"{_short_repr(function['arguments'])}.",
        )  # fmt: skip
    call_id: dict[str, Any] = {} if call.get("id") is None else {"id": call["id"]}
    return call_id | {"type": "function", "function": {"name": function["name"], "arguments": {**arguments}}}


def _with_tools(raw: Raw, messages: list[Message]) -> list[Message]:
    if not (tools := _tools(raw)) or not messages:
        return messages
    first = messages[0].copy()
    first["tools"] = tools
    return [first, *messages[1:]]


def _tools(raw: Raw) -> list[dict[str, Any]]:
    """The JSON schemas of functions in the column `tools`, which holds a list or its JSON text."""
    value = raw.get("tools")
    if value in (None, "", "[]", []):
        return []
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise RowError("wrong type", f'"tools" is no JSON, found {_short_repr(value)}.') from None
    tools = _as_mappings(value, "tools")
    for index, tool in enumerate(tools):
        function = tool.get("function", tool)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError(
                "wrong type", f'"tools[{index}]" needs a function with a name, found {_short_repr(tool)}.'
            )
    return [{**tool} for tool in tools]


def _as_mappings(value: Any, column: str) -> list[Raw]:
    if not isinstance(value, list) or not value or not all(isinstance(each, Mapping) for each in value):
        raise RowError("wrong type", f'"{column}" must be a list of mappings, found {_short_repr(value)}.')
    return value


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(HH_START)


def _transcript(text: str, column: str) -> list[Message]:
    pieces = HH_TURN.split(text)[1:]
    turns = list(zip(pieces[::2], pieces[1::2], strict=True))
    if turns[-1][0] == "Assistant" and not turns[-1][1].strip():  # a prompt ends with an empty answer
        turns.pop()
    return [
        {"role": SPEAKERS[speaker.lower()], "content": _text(content, f"{column} turn {number}")}
        for number, (speaker, content) in enumerate(turns, 1)
    ]


def _text(value: Any, column: str, needed: str = "text") -> str:
    """A text without the white space around it."""
    if value is None:
        raise RowError("empty", f'"{column}" is null. It must be {needed}.')
    if not isinstance(value, str):
        raise RowError("wrong type", f'"{column}" must be {needed}, found {_short_repr(value)}.')
    if not value.strip():
        raise RowError("empty", f'"{column}" is empty.')
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError(
            "bad encoding", f'"{column}" holds half of a surrogate pair: not valid Unicode.'
        ) from None
    return value.strip()


def _gold(raw: Raw, column: str) -> float | None:
    value = raw.get(column)
    if value in (None, ""):
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # CSV cells are texts
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RowError("wrong type", f'"{column}" must be a finite number, found {_short_repr(value)}.')
    return number


def _missing(column: str, raw: Raw, needs: str) -> RowError:
    return RowError("missing field", f'"{column}" is missing (found: {_column_names(raw)}). {needs}')


def _column_names(raw: Raw) -> str:
    columns = [str(column) if _has(raw, column) else f"{column} (null)" for column in raw]
    return ", ".join(columns) or "nothing"


def _short_repr(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 40 else text[:37] + '...'} ({type(value).__name__})"
