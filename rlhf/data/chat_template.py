"""Chat templates and token ids. Text becomes token ids only here, for every stage.

A prompt and its response are tokenized separately, because the response is sampled after the prompt's ids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf.config import ConfigError
from rlhf.data.schema import (
    Answer,
    Message,
    Row,
    SftRow,
    answer_of,
    calls_tools,
    each_turn,
    message_with,
    message_without,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] | capitalize + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
MESSAGE_KEYS = ("role", "content", "tool_calls", "tool_call_id", "name")
"""Keys of a message that a template gets."""
TEMPLATES = {"chatml": CHATML, "plain": PLAIN}


def resolve_template(choice: str) -> str:
    """The text of a named template or of a jinja file."""
    if choice in TEMPLATES:
        return TEMPLATES[choice]
    path = Path(choice)
    if not path.is_file():
        raise ConfigError(
            f"model.chat_template={choice}: there is no such file. Use one of "
            f"{', '.join(sorted(TEMPLATES))}, or a jinja file."
        )
    return path.read_text(encoding="utf-8")


def render_template(template: str, messages: Sequence[Message], *, opens_answer: bool = False) -> str:
    """A conversation as a template writes it, without a tokenizer and its special tokens."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        messages=messages, add_generation_prompt=opens_answer, bos_token="", eos_token=""
    )


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """The ids before a response: the conversation and the opening of the assistant's turn.

    An empty conversation (plain text) gives the beginning-of-text token. If the model has none, it gives the
    end token, because in pretraining a new text starts after it.
    """
    if not messages:
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        return [] if first is None else [int(first)]
    return _encode(tokenizer, _render(tokenizer, messages, opens_answer=True))


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, opens_answer: bool = False
) -> str:
    """The conversation as the tokenizer's template writes it."""
    turns: list[Any] = [
        {name: value for name, value in each.items() if name in MESSAGE_KEYS} for each in messages
    ]
    tools: Any = messages[0].get("tools")
    text = tokenizer.apply_chat_template(
        turns, tools=tools, tokenize=False, add_generation_prompt=opens_answer
    )
    return str(text)


def missing_opening(tokenizer: PreTrainedTokenizerBase) -> str:
    """Text that the template writes before a given answer, but not when it opens an answer to be sampled. The
    model would then have to write it. Empty for most templates."""
    marker = "\u241f"
    question = Message(role="user", content="x")
    opening = _render(tokenizer, [question], opens_answer=True)
    full_text = _render(tokenizer, [question, Message(role="assistant", content=marker)])
    if opening != _render(tokenizer, [question]) or not full_text.startswith(opening):
        return ""
    return full_text[len(opening) :].partition(marker)[0].strip()


def exchange_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], response: Answer
) -> tuple[list[int], int]:
    """Ids of prompt + response + end of turn, and the number of ids of the prompt.

    The end token is added even if the response was cut by a length limit: reward models see only complete
    turns, in training and when they score (Stiennon et al. 2020).
    """
    prompt = prompt_ids(tokenizer, messages)
    if not isinstance(response, str):
        response = _with_calls(tokenizer, messages, response)
    return [*prompt, *_encode(tokenizer, response), end_of_turn_id(tokenizer)], len(prompt)


def _with_calls(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], answer: Message) -> str:
    """The text that the model must write for this turn, as the template writes it, without the end of turn.

    Raises:
        TemplateError: an answer with calls begins differently from the answer that the template opens.
    """
    from jinja2 import TemplateError

    opening = _render(tokenizer, messages, opens_answer=True)
    full_text = _render(tokenizer, [*messages, answer])
    if not full_text.startswith(opening):
        raise TemplateError("a turn with calls does not begin as it opens the assistant's turn")
    end = str(tokenizer.convert_ids_to_tokens(end_of_turn_id(tokenizer)))
    text, separator, _ = full_text[len(opening) :].rpartition(end)
    return text if separator else full_text[len(opening) :].rstrip()


def check_tools(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> None:
    """Refuse a template that leaves out tools, calls or tool answers, as many do silently.

    Raises:
        TemplateError: the template leaves one of these out.
    """
    from jinja2 import TemplateError

    if not calls_tools(messages):
        return
    text = _render(tokenizer, messages)
    without_calls = [message_without(each, "tool_calls") for each in messages]
    if without_calls != [*messages] and _render(tokenizer, without_calls) == text:
        raise TemplateError("it does not show the assistant's calls (tool_calls)")
    without_tools = [message_without(each, "tools") for each in messages]
    if without_tools != [*messages] and _render(tokenizer, without_tools) == text:
        raise TemplateError("it does not show the tools that may be called (tools)")
    other_answers = [
        message_with(each, f"{each['content']}.") if each["role"] == "tool" else each for each in messages
    ]
    if other_answers != [*messages] and _render(tokenizer, other_answers) == text:
        raise TemplateError("it does not show what a tool answers (role tool)")


def sequences(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[list[int]]:
    """Token ids of the sequences of a row: one per exchange, so two for a pair."""
    return [
        prompt_ids(tokenizer, prompt) if answer is None else exchange_ids(tokenizer, prompt, answer)[0]
        for prompt, answer in row.exchanges()
    ]


class TurnsDifferError(ValueError):
    """The template renders earlier turns differently once later turns follow (some remove earlier
    thinking)."""


def conversation_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], response: Answer, turns: int
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a conversation with its response, and the (begin, end) of each of its last `turns` assistant
    turns, with the end-of-turn token.

    Raises:
        TurnsDifferError: in one sequence, the ids before a turn would differ from those when it is sampled.
    """
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    earlier = answers[len(answers) - turns + 1 :]
    spans: list[tuple[int, int]] = []
    before: list[int] = []
    for index in (*earlier, len(messages)):
        answer = response if index == len(messages) else answer_of(messages[index])
        ids, start = exchange_ids(tokenizer, messages[:index], answer)
        if ids[: min(start, len(before))] != before:
            raise TurnsDifferError
        spans.append((start, len(ids)))
        before = ids
    return before, spans


class Encoded(NamedTuple):
    """A sequence made from a row."""

    ids: Any
    """A list of ints, or an array in a mapped file."""
    spans: Any
    """The (begin, end) of each answer in it. A prompt without an answer has none."""

    @property
    def num_prompt(self) -> int:
        """Number of tokens before the last answer."""
        return int(self.spans[-1][0]) if len(self.spans) else len(self.ids)


def encode(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[Encoded]:
    """One sequence for each of the row's exchanges.

    The sequence of a conversation with several answers has a span for each. If the chat template renders
    earlier turns differently once later turns follow, the sequence has the span of the last answer only. One
    more sequence for each earlier turn then follows it.
    """
    if isinstance(row, SftRow) and row.uses_tools:
        check_tools(tokenizer, row.conversation)
    if isinstance(row, SftRow) and row.turns > 1:
        try:
            return [Encoded(*conversation_ids(tokenizer, row.prompt, row.completion, row.turns))]
        except TurnsDifferError:
            *earlier, last = each_turn(row)
            return [encode(tokenizer, turn)[0] for turn in (last, *earlier)]
    sequences = []
    for prompt, answer in row.exchanges():
        if answer is None:
            sequences.append(Encoded(prompt_ids(tokenizer, prompt), []))
        else:
            ids, begin = exchange_ids(tokenizer, prompt, answer)
            sequences.append(Encoded(ids, [(begin, len(ids))]))
    return sequences


def continuation_ids(
    tokenizer: PreTrainedTokenizerBase, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Ids of plain text without a template: of the context, and of the continuation to predict.

    Both are tokenized together and cut where the context alone ends, because some tokenizers add a space
    before every text. With an empty context and no beginning-of-text token, the text's first token is the
    context. If the text has only one token, the end token is the context.
    """
    begin = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    ids = [*begin, *_encode(tokenizer, context + continuation)]
    if len(ids) == 1:
        ids = [*prompt_ids(tokenizer, []), *ids]
    num_context = len(begin) + len(_encode(tokenizer, context))
    num_context = min(max(num_context, 1), len(ids) - 1)
    return ids[:num_context], ids[num_context:]


@lru_cache(maxsize=8)
def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an assistant's turn in this template. It is not always `eos_token`, as in Gemma."""
    marker = "\u241f"
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": marker}]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    after = _encode(tokenizer, text.rpartition(marker)[2].lstrip())
    flagged = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    if after and after[0] in flagged.union(tokenizer.all_special_ids):
        return after[0]
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "The tokenizer names no eos_token and its chat template ends no turn with a special token: "
            "nothing would stop a response. Set model.chat_template."
        )
    return int(tokenizer.eos_token_id)


def stop_ids(tokenizer: PreTrainedTokenizerBase, generation_eos: int | Sequence[int] | None) -> list[int]:
    """Every id that ends a response: from the template, the tokenizer and the generation config."""
    listed = [generation_eos] if isinstance(generation_eos, int) else list(generation_eos or [])
    own = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return sorted({end_of_turn_id(tokenizer), *own, *listed})


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every id that `response_text` removes."""
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(number for number, token in added if token.special)}


def response_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """A sampled response as text, without its stop token and other special tokens. In the text, they would
    become turns of the conversation when it is encoded again."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identity of vocabulary, chat template and special tokens: equal digests mean equal ids."""
    parts: dict[str, Any] = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "template": tokenizer.chat_template,
        "special": {name: str(value) for name, value in tokenizer.special_tokens_map.items()},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    if not tokenizer.is_fast:
        return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    # the same as that call, but faster because it computes no offsets
    backend: Any = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    ids: list[int] = backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
    return ids
