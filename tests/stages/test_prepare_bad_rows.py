"""`prepare` on rows that cannot be used: what is said, in the user's keys, and what is dropped."""

import dataclasses
from pathlib import Path

import pytest
from small_prepare import ShorterBase, write

from rlhf.config import ConfigError


def test_exact_duplicates_go_and_other_answers_stay(bench):
    bench.rows["sft"] += [bench.rows["sft"][5], {"prompt": "sft 5", "completion": "another"}]
    bench.prepare()
    assert bench.report["sft"]["removed"] == {"duplicate": {"count": 1, "examples": ["sft.jsonl line 41"]}}
    assert bench.job.summary["sft_rows"] == 41
    assert bench.job.summary["dropped"] == 1


def test_a_bad_row_is_one_error_in_the_users_keys(bench):
    del bench.rows["reward"][11]["rejected"]
    assert bench.complaint() == (
        'reward.pairs: reward.jsonl line 12: "rejected" is missing (found: prompt, chosen). '
        "A preference row needs prompt, chosen, rejected. "
        "Mend the row, or set prepare.on_bad_row=drop to leave out such rows."
    )


def test_prompts_without_answers(bench):
    bench.sources["sft"] = str(bench.directory / "ppo.jsonl")
    assert bench.complaint().startswith(
        'sft.data: ppo.jsonl line 1: "completion" is missing (found: prompt): a prompt without an answer.'
    )
    assert bench.complaint(on_bad_row="drop") == (
        "sft.data: no rows are left for train: 40 read; 0 kept; "
        "40 no answer (ppo.jsonl line 1, ppo.jsonl line 2, ppo.jsonl line 3, ...). Give more rows."
    )


def test_dropped_rows_are_counted_by_reason(bench):
    pairs = bench.rows["reward"]
    pairs[0]["rejected"] = "good"
    pairs[1]["rejected"] = 7
    pairs[2]["prompt"] = None
    for number in (3, 4, 5, 6):
        pairs[number]["chosen"] = " "
    path = bench.directory / "pairs.jsonl"
    path.write_bytes(Path(write(path, pairs)).read_bytes() + b'{"prompt": "\xff"}\n{"prompt": "cut')
    bench.sources["reward"] = str(path)
    bench.prepare(on_bad_row="drop")
    report = bench.report["reward"]
    assert report["read"] == 42
    assert sum(report["kept"].values()) == bench.job.summary["reward_pairs"] == 33
    assert bench.job.summary["dropped"] == 9
    assert {reason: removed["count"] for reason, removed in report["removed"].items()} == {
        "tie": 1, "wrong type": 1, "missing field": 1, "empty": 4, "bad encoding": 1, "broken JSON": 1,
    }  # fmt: skip
    assert report["removed"]["empty"]["examples"] == [f"pairs.jsonl line {number}" for number in (4, 5, 6)]
    assert "1 tie (pairs.jsonl line 1)" in bench.output
    assert "4 empty (pairs.jsonl line 4, pairs.jsonl line 5, pairs.jsonl line 6, ...)" in bench.output


@pytest.mark.parametrize("role", ["ppo", "evaluate"])
def test_a_prompt_that_leaves_no_room_for_an_answer(bench, role):
    bench.base = dataclasses.replace(bench.base, length=256)
    bench.rows[role][2] = {"prompt": "x" * 220}
    # "<im_start>user\n", the text, "<im_end>\n<im_start>assistant\n": 6 + 220 + 13 tokens
    bench.prepare(response_tokens=256 - 239)
    assert bench.complaint(response_tokens=256 - 238) == (
        f"{role}.prompts: {role}.jsonl line 3: the prompt has 239 tokens; the model's context of 256 "
        "leaves it 238 beside an answer of ppo.max_new_tokens=18. Shorten it or lower ppo.max_new_tokens. "
        "Mend the row, or set prepare.on_bad_row=drop to leave out such rows."
    )
    bench.prepare(response_tokens=256 - 238, on_bad_row="drop")
    assert bench.report[role]["removed"]["too long"]["count"] == 1


@pytest.mark.parametrize(("role", "row"), [
    ("sft", {"prompt": "x", "completion": "x" * 300}),
    ("reward", {"prompt": "x", "chosen": "x", "rejected": "x" * 300}),
])  # fmt: skip
def test_a_row_longer_than_the_context(bench, role, row):
    bench.base = dataclasses.replace(bench.base, length=256)
    bench.rows[role][2] = row
    # 6 + 1 + 13 tokens for the prompt, 300, and the end of the turn
    assert f"{role}.jsonl line 3: 321 tokens do not fit the model's context of 256." in bench.complaint()


def test_an_answer_as_long_as_the_context_is_refused(bench):
    bench.base = dataclasses.replace(bench.base, length=256)
    assert "ppo.max_new_tokens=256 leaves no room for a prompt" in bench.complaint(response_tokens=256)


def test_a_conversation_the_template_refuses_is_a_bad_row(bench, base, monkeypatch):
    tokenizer = base.load_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        + tokenizer.chat_template
    )
    monkeypatch.setattr(ShorterBase, "load_tokenizer", lambda self: tokenizer)
    bench.rows["sft"][0] = {"system": "Be brief.", "prompt": "x", "completion": "y"}
    complaint = bench.complaint()
    assert "sft.jsonl line 1: the chat template refuses the conversation: no system turns." in complaint


def test_a_role_without_held_out_rows(bench):
    assert bench.complaint(held_out_fraction=0.001) == (
        "sft.data: no rows are left for held_out: 40 read; 40 kept. "
        "Give more rows or raise prepare.held_out_fraction=0.001."
    )


def test_a_file_that_cannot_be_read_is_found_before_any_stage_runs(bench):
    bench.sources["ppo"] = str(bench.directory / "none.jsonl")
    with pytest.raises(ConfigError, match=r"^ppo\.prompts=.*none\.jsonl: there is no such file"):
        bench.stage().external()
