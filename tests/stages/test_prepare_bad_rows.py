"""`prepare` on rows that cannot be used: what is said, in the user's keys, and what is dropped."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from helpers.stages import Bench, ShorterBase, write_rows
from rlhf.config import ConfigError


def test_exact_duplicates_go_and_other_answers_stay(bench: Bench) -> None:
    bench.rows["sft"] += [bench.rows["sft"][5], {"prompt": "sft 5", "completion": "another"}]
    bench.prepare()
    assert bench.report["sft"]["removed"] == {"duplicate": {"count": 1, "examples": ["sft.jsonl line 41"]}}
    assert bench.summary["sft_rows"] == 41
    assert bench.summary["dropped"] == 1


def test_a_bad_row_is_one_error_in_the_users_keys(bench: Bench) -> None:
    del bench.rows["pairs"][11]["rejected"]
    assert bench.complaint() == (
        'reward.pairs: pairs.jsonl line 12: "rejected" is missing (found: prompt, chosen). '
        "A preference row needs prompt, chosen, rejected. Are they in other columns? "
        f"reward.pairs='{{path: {bench.directory}/pairs.jsonl, "
        "fields: {prompt: prompt, chosen: chosen, rejected: COLUMN}}'. "
        "Fix the row, or set prepare.on_bad_row=drop to leave out such rows."
    )


def test_prompts_without_answers(bench: Bench) -> None:
    bench.sources["sft"] = str(bench.directory / "ppo.jsonl")
    assert bench.complaint().startswith(
        'sft.data: ppo.jsonl line 1: "completion" is missing (found: prompt): a prompt without an answer.'
    )
    assert bench.complaint(on_bad_row="drop") == (
        "sft.data: no rows are left for train: 40 read; 0 kept; "
        "40 no answer (ppo.jsonl line 1, ppo.jsonl line 2, ppo.jsonl line 3, ...). Give more rows."
    )


def test_dropped_rows_are_counted_by_reason(bench: Bench) -> None:
    pairs = bench.rows["pairs"]
    pairs[0]["rejected"] = "good"
    pairs[1]["rejected"] = 7
    pairs[2]["prompt"] = None
    for number in (3, 4, 5, 6):
        pairs[number]["chosen"] = " "
    path = bench.directory / "damaged.jsonl"
    path.write_bytes(Path(write_rows(path, pairs)).read_bytes() + b'{"prompt": "\xff"}\n{"prompt": "cut')
    bench.sources["pairs"] = str(path)
    bench.prepare(on_bad_row="drop")
    report = bench.report["pairs"]
    assert report["read"] == 42
    assert sum(report["kept"].values()) == bench.summary["reward_pairs"] == 33
    assert bench.summary["dropped"] == 9
    assert bench.summary["bad_share"] == 9 / 42
    assert {reason: removed["count"] for reason, removed in report["removed"].items()} == {
        "tie": 1, "wrong type": 1, "missing field": 1, "empty": 4, "bad encoding": 1, "broken JSON": 1,
    }  # fmt: skip
    assert report["removed"]["empty"]["examples"] == [f"damaged.jsonl line {number}" for number in (4, 5, 6)]
    assert "1 tie (damaged.jsonl line 1)" in bench.output
    assert "4 empty (damaged.jsonl line 4, damaged.jsonl line 5, damaged.jsonl line 6, ...)" in bench.output


@pytest.mark.parametrize("role", ["ppo", "evaluate"])
def test_a_prompt_that_leaves_no_room_for_an_answer_is_left_out_and_counted(bench: Bench, role: str) -> None:
    bench.base = dataclasses.replace(bench.base, length=256)
    bench.rows[role][2] = {"prompt": "x" * 220}
    # "<im_start>user\n", the text, "<im_end>\n<im_start>assistant\n": 6 + 220 + 13 tokens
    bench.prepare(response_tokens=256 - 239)
    assert "too long" not in bench.report[role]["removed"]
    bench.prepare(response_tokens=256 - 238)
    place = f"{role}.jsonl line 3"
    assert bench.report[role]["removed"]["too long"] == {"count": 1, "examples": [place]}
    assert f"{role}.prompts: 1 too long ({place})" in bench.output
    assert "are prompts of more than 238, which leave no room for an answer of ppo.max_new_tokens=18" in (
        bench.output
    )


def test_a_pair_longer_than_the_context_is_left_out_and_counted(bench: Bench) -> None:
    bench.base = dataclasses.replace(bench.base, length=256)
    bench.rows["pairs"][2] = {"prompt": "x", "chosen": "x", "rejected": "x" * 300}
    bench.prepare()
    assert bench.report["pairs"]["removed"]["too long"]["count"] == 1
    assert sum(bench.report["pairs"]["kept"].values()) == 39


@pytest.mark.parametrize("role", ["sft", "replay", "ptx"])
def test_an_answer_longer_than_the_context_stays_to_be_cut(bench: Bench, role: str) -> None:
    bench.base = dataclasses.replace(bench.base, length=256)
    bench.rows[role] = [{"prompt": f"{role} {n}", "completion": "yes"} for n in range(40)]
    bench.rows[role][2] = {"prompt": "x", "completion": "x" * 300}
    bench.rows[role][3] = {"prompt": "x" * 300, "completion": "x"}
    bench.prepare()
    assert bench.report[role]["longer_than_context"] == {"count": 1, "examples": [f"{role}.jsonl line 3"]}
    assert bench.report[role]["removed"]["too long"]["examples"] == [f"{role}.jsonl line 4"]
    assert sum(bench.report[role]["kept"].values()) == 39
    assert f"1 to be cut ({role}.jsonl line 3)" in bench.output


def test_where_all_is_too_long_the_limits_are_told(bench: Bench) -> None:
    bench.base = dataclasses.replace(bench.base, length=256)
    bench.rows["ppo"] = [{"prompt": "x" * 300}]
    assert "1 too long (ppo.jsonl line 1)" in bench.complaint()
    assert "context of 256" in bench.complaint()


@pytest.mark.parametrize(("role", "row", "fields"), [
    ("sft", {"id": "1", "Question": "x", "Reply": "y"}, "{prompt: Question, completion: Reply}"),
    ("sft", {"frage": "x", "antwort": "y"}, "{prompt: COLUMN, completion: COLUMN}"),
    ("sft", {"Nr.": "1", "Question (EN)": "x", " Answer ": "y"},
     '{prompt: "Question (EN)", completion: " Answer "}'),
    ("pairs", {"query": "x", "preferred": "y", "dispreferred": "z"},
     "{prompt: query, chosen: preferred, rejected: dispreferred}"),
    ("ppo", {"query": "x"}, "{prompt: query}"),
])  # fmt: skip
def test_other_columns_are_shown_with_a_line_that_is_ready(
    bench: Bench, role: str, row: dict[str, Any], fields: str
) -> None:
    first = next(iter(row))
    bench.rows[role] = [row | {first: f"{n}" if row[first] == "1" else f"x {n}"} for n in range(40)]
    complaint = bench.complaint()
    assert f"found: {', '.join(row)}" in complaint
    assert f"='{{path: {bench.directory}/{role}.jsonl, fields: {fields}}}'" in complaint


def test_the_columns_that_were_found_are_shown(bench: Bench) -> None:
    bench.rows["sft"] = [{"id": n, "instruction": f"sft {n}", "output": "yes"} for n in range(40)]
    bench.prepare()
    told = (
        "sft.data: sft.jsonl has id, instruction, output; read as {prompt: instruction, completion: output}"
    )
    assert told in bench.output
    assert "pairs.jsonl has prompt, chosen, rejected; read as {prompt: prompt, chosen: chosen" in bench.output


def test_columns_that_were_named_are_shown_as_the_file_has_them(bench: Bench) -> None:
    bench.rows["sft"] = [{"id": n, "frage": f"sft {n}", "antwort": "yes"} for n in range(40)]
    bench.sources["sft"] = {
        "path": f"{bench.directory}/sft.jsonl",
        "fields": {"prompt": "frage", "completion": "antwort"},
    }
    bench.prepare()
    assert "sft.jsonl has id, frage, antwort; read as {prompt: frage, completion: antwort}" in bench.output


@pytest.mark.parametrize("limit", [3, 10])
def test_a_limit_leaves_rows_for_every_split(bench: Bench, limit: int) -> None:
    path = write_rows(bench.directory / "many.jsonl", [{"prompt": f"many {n}"} for n in range(200)])
    bench.sources["ppo"] = {"path": path, "limit": limit}
    bench.sources["evaluate"] = {"path": path, "limit": limit}
    data = bench.prepare()
    kept = [*data.rows("ppo", "train"), *data.rows("ppo", "held_out"), *data.rows("evaluate", "evaluation")]
    assert all(map(len, (data.rows("ppo", "train"), data.rows("ppo", "held_out")))) and len(kept) == limit
    assert bench.report["ppo"]["removed"]["beyond limit"]["count"] == 200 - limit
    numbers = [int(row.prompt[0]["content"].split()[1]) for row in kept]
    assert max(numbers) > 2 * limit  # drawn, not the first ones


def test_a_larger_limit_keeps_the_rows_of_a_smaller_one(bench: Bench) -> None:
    path = write_rows(bench.directory / "many.jsonl", [{"prompt": f"many {n}"} for n in range(200)])
    found = []
    for limit in (20, 60):
        bench.sources["ppo"] = {"path": path, "limit": limit}
        data = bench.prepare()
        rows = [*data.rows("ppo", "train"), *data.rows("ppo", "held_out")]
        found.append({row.prompt[0]["content"] for row in rows})
    assert len(found[0]) == 20 and found[0] < found[1]


def test_an_answer_as_long_as_the_context_is_refused(bench: Bench) -> None:
    bench.base = dataclasses.replace(bench.base, length=256)
    assert "ppo.max_new_tokens=256 leaves no room for a prompt" in bench.complaint(response_tokens=256)


def test_a_conversation_the_template_refuses_is_a_bad_row(
    bench: Bench, base: ShorterBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = base.load_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        + tokenizer.chat_template
    )
    monkeypatch.setattr(ShorterBase, "load_tokenizer", lambda self: tokenizer)
    bench.rows["sft"][0] = {"system": "Be brief.", "prompt": "x", "completion": "y"}
    complaint = bench.complaint()
    assert "sft.jsonl line 1: the chat template refuses the conversation: no system turns." in complaint


def test_a_role_without_held_out_rows(bench: Bench) -> None:
    assert bench.complaint(held_out_fraction=0.001) == (
        "sft.data: no rows are left for held_out: 40 read; 40 kept. "
        "Give more rows or raise prepare.held_out_fraction=0.001."
    )


def test_one_prompt_alone_is_not_advised_another_share(bench: Bench) -> None:
    bench.rows["sft"] = [{"prompt": "Which?", "completion": f"This: {number}."} for number in range(2)]
    for rows, counts in ((2, "2 read; 2 kept"), (1, "1 read; 1 kept")):
        bench.rows["sft"] = bench.rows["sft"][:rows]
        assert bench.complaint(held_out_fraction=0.001) == (
            f"sft.data: no rows are left for held_out: {counts}. "
            "Rows with the same prompt stay together: give rows with other prompts."
        )


def test_a_file_that_cannot_be_read_is_found_before_any_stage_runs(bench: Bench) -> None:
    bench.sources["ppo"] = str(bench.directory / "none.jsonl")
    with pytest.raises(ConfigError, match=r"^ppo\.prompts=.*none\.jsonl: there is no such file"):
        bench.digests()
