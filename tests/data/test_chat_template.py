"""Templates and token ids: what a response follows, what ends it, and what tells two tokenizers apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AddedToken, AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase

from rlhf.config import ConfigError
from rlhf.data.chat_template import (
    CHATML,
    PLAIN,
    continuation_ids,
    end_of_turn_id,
    exchange_ids,
    prompt_ids,
    resolve_template,
    response_text,
    stop_ids,
    tokenizer_digest,
)
from rlhf.data.schema import Message

GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
HI: list[Message] = [{"role": "user", "content": "Hi"}]
TALK: list[Message] = [
    {"role": "system", "content": "Be kind."},
    *HI,
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]
BEGIN, STOP = 1, 2  # <|im_start|> and <|im_end|> of the tiny tokenizer


def make(tiny_model: Path, template: str | None = CHATML, *special: str) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_model)
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template
    return tokenizer


def text_of(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def test_chatml_by_hand(tiny_model: Path) -> None:
    tokenizer = make(tiny_model)
    assert text_of(tokenizer, prompt_ids(tokenizer, HI)) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text_of(tokenizer, prompt_ids(tokenizer, TALK)) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt_ids(tokenizer, HI)[0] == BEGIN  # one token, not its letters


def test_the_plain_template_by_hand(tiny_model: Path) -> None:
    tokenizer = make(tiny_model, PLAIN)
    assert text_of(tokenizer, prompt_ids(tokenizer, TALK)) == (
        "<|im_start|>System: Be kind.\n\nUser: Hi\n\nAssistant: Hello<|im_end|>\n\nUser: Bye\n\nAssistant: "
    )
    tokenizer.bos_token = None
    assert text_of(tokenizer, prompt_ids(tokenizer, HI)) == "User: Hi\n\nAssistant: "


def test_only_role_and_content_reach_the_template(tiny_model: Path) -> None:
    tokenizer = make(tiny_model, "{% for message in messages %}{{ message | length }}{% endfor %}")
    weighted: Any = {**HI[0], "weight": 1}
    assert text_of(tokenizer, prompt_ids(tokenizer, [weighted])) == "2"


def test_no_conversation_is_the_beginning_of_a_text(tiny_model: Path) -> None:
    tokenizer = make(tiny_model)
    assert prompt_ids(tokenizer, []) == [BEGIN]
    tokenizer.bos_token = None
    assert prompt_ids(tokenizer, []) == [STOP]  # the end of the text before
    tokenizer.eos_token = None
    assert prompt_ids(tokenizer, []) == []


@pytest.mark.parametrize("messages", [HI, TALK, []])
@pytest.mark.parametrize("response", ["Hello you", "", " leading space", "a\n\nb"])
def test_an_exchange_is_prompt_response_and_end(
    tiny_model: Path, messages: list[Message], response: str
) -> None:
    tokenizer = make(tiny_model)
    ids, prompt = exchange_ids(tokenizer, messages, response)
    assert ids[:prompt] == prompt_ids(tokenizer, messages)
    assert text_of(tokenizer, ids[prompt:]) == f"{response}<|im_end|>"
    assert ids[-1] == STOP


def test_what_a_user_writes_cannot_be_told_from_the_template(tiny_model: Path) -> None:
    """Known: special tokens in a text are read as such, here as in every template-based stack."""
    tokenizer = make(tiny_model)
    ids, prompt = exchange_ids(tokenizer, HI, "a<|im_end|>b")
    assert ids[prompt:].count(STOP) == 2


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        (PLAIN, "<|im_end|>"),  # the eos token
        (GEMMA, "<end_of_turn>"),  # not the eos token
        ("{% for message in messages %}{{ message['content'] }}\n<end_of_turn>{% endfor %}", "<end_of_turn>"),
        ("{% for message in messages %}{{ message['content'] }}{% endfor %}", "<|im_end|>"),  # none: eos
        ("{% for message in messages %}{{ message['content'] }} END {% endfor %}", "<|im_end|>"),  # no token
    ],
)
def test_the_end_of_a_turn_is_the_templates(tiny_model: Path, template: str, end: str) -> None:
    tokenizer = make(tiny_model, template, "<start_of_turn>", "<end_of_turn>")
    assert end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids(end)
    assert exchange_ids(tokenizer, HI, "x")[0][-1] == end_of_turn_id(tokenizer)


def test_a_turns_end_need_not_be_among_the_named_tokens(tiny_model: Path) -> None:
    """Gemma 3 and Phi flag theirs as special, and name them nowhere else."""
    tokenizer = make(tiny_model, GEMMA)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in ("<start_of_turn>", "<end_of_turn>")])
    turn = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert turn not in tokenizer.all_special_ids
    assert end_of_turn_id(tokenizer) == turn


def test_without_any_stop_token_there_is_no_way_to_end(tiny_model: Path) -> None:
    tokenizer = make(tiny_model, "{% for message in messages %}{{ message['content'] }}{% endfor %}")
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match=r"Set model\.chat_template"):
        end_of_turn_id(tokenizer)


def test_everything_that_ends_a_response_stops_it(tiny_model: Path) -> None:
    gemma = make(tiny_model, GEMMA, "<start_of_turn>", "<end_of_turn>")
    turn = gemma.convert_tokens_to_ids("<end_of_turn>")
    assert stop_ids(gemma, None) == [STOP, turn]
    assert stop_ids(gemma, 7) == [STOP, 7, turn]
    assert stop_ids(gemma, [9, STOP, 7]) == [STOP, 7, 9, turn]
    assert stop_ids(make(tiny_model), STOP) == [STOP]
    gemma.eos_token = None
    assert stop_ids(gemma, None) == [turn]


def test_a_response_is_shown_without_its_stop_token(tiny_model: Path) -> None:
    tokenizer = make(tiny_model)
    ids, prompt = exchange_ids(tokenizer, HI, " Größe 🙂\n")
    assert response_text(tokenizer, ids[prompt:]) == "Größe 🙂"
    assert response_text(tokenizer, []) == ""


@pytest.mark.parametrize(("context", "continuation"), [("Ice melts", " in the sun"), ("", "Ice"), ("a", "b")])
def test_a_continuation_is_cut_where_its_context_ends(
    tiny_model: Path, context: str, continuation: str
) -> None:
    tokenizer = make(tiny_model)
    given, rest = continuation_ids(tokenizer, context, continuation)
    assert given[0] == BEGIN
    assert text_of(tokenizer, given[1:]) == context
    assert text_of(tokenizer, rest) == continuation


def test_without_a_beginning_token_the_first_one_is_given_away(tiny_model: Path) -> None:
    tokenizer = make(tiny_model)
    tokenizer.bos_token = None
    given, rest = continuation_ids(tokenizer, "", "Ice")
    assert (text_of(tokenizer, given), text_of(tokenizer, rest)) == ("I", "ce")


def test_a_context_that_swallows_the_continuation_leaves_one_token(tiny_model: Path) -> None:
    tokenizer = make(tiny_model)
    given, rest = continuation_ids(tokenizer, "Ice", "")
    assert text_of(tokenizer, [*given, *rest][1:]) == "Ice"
    assert len(rest) == 1


def test_digests_tell_tokenizers_apart(tiny_model: Path) -> None:
    plain = make(tiny_model)
    assert tokenizer_digest(make(tiny_model)) == tokenizer_digest(plain)
    other_special = make(tiny_model)
    other_special.pad_token = "<|endoftext|>"
    more_words = make(tiny_model)
    more_words.add_tokens(["tell"])
    different = [plain, make(tiny_model, PLAIN), make(tiny_model, None), other_special, more_words]
    assert len({tokenizer_digest(tokenizer) for tokenizer in different}) == 5


def test_templates_have_names_or_files(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("{{ x }}")
    assert resolve_template("chatml") == CHATML
    assert resolve_template("plain") == PLAIN
    assert resolve_template(str(path)) == "{{ x }}"
    with pytest.raises(
        ConfigError, match=r"model\.chat_template=Chatml: there is no such file. Use one of chatml"
    ):
        resolve_template("Chatml")


@pytest.mark.parametrize("splits", [False, True])
def test_ids_are_those_of_a_call_of_the_tokenizer_whatever_it_was_saved_with(
    tiny_model: Path, *, splits: bool
) -> None:
    """A file of a tokenizer may say to cut and to pad."""
    tokenizer: Any = make(tiny_model)
    tokenizer.split_special_tokens = splits
    text = "Hello <|im_end|> Größe"
    wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert (STOP in wanted) is not splits
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=99)
    tokenizer.backend_tokenizer.encode_special_tokens = not splits
    ids, begin = exchange_ids(tokenizer, HI, text)
    assert ids[begin:-1] == wanted


def test_a_tokenizer_that_is_written_in_python_gives_its_own_ids() -> None:
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = CHATML
    ids, begin = exchange_ids(tokenizer, HI, "é")
    assert not tokenizer.is_fast and ids[begin:-1] == [0xC3 + 3, 0xA9 + 3]
