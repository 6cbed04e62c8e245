"""`prepare` on real files: what is kept, where it lands, and what is said about the rest."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from helpers.jobs import user
from helpers.stages import Bench
from rlhf.data.chat_template import prompt_ids
from rlhf.data.prepared import PreparedData
from rlhf.data.roles import ROLES, training_roles
from rlhf.data.schema import QuestionRow, TextRow, prompt_identity
from rlhf.pipeline.key import knobs

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared" / "data"
SAMPLES = ROOT / "data"


def identities(data: PreparedData, role: str) -> dict[str, set[str]]:
    return {split: {prompt_identity(row) for row in data.rows(role, split)} for split in ROLES[role].splits}


def assert_apart(data: PreparedData) -> None:
    """No prompt of any role is in two of train, held-out and evaluation."""
    prompts = {"train": set(), "held_out": set(), "evaluation": identities(data, "evaluate")["evaluation"]}
    for role in training_roles():
        for split, found in identities(data, role).items():
            assert found, f"{role} {split} is empty"
            prompts[split] |= found
    assert prompts["evaluation"]
    assert not prompts["train"] & prompts["held_out"]
    assert not prompts["train"] & prompts["evaluation"]
    assert not prompts["held_out"] & prompts["evaluation"]


def test_every_row_is_kept_once_and_counted(bench: Bench) -> None:
    data = bench.prepare()
    assert_apart(data)
    for role in training_roles():
        assert sum(len(data.rows(role, split)) for split in ("train", "held_out")) == 40
    assert len(data.rows("evaluate", "evaluation")) == 40
    retention = [*data.rows("retention", "evaluation")]
    assert retention[:40] == [TextRow(f"fact {n}", "texts") for n in range(40)]
    assert retention[40:] == [QuestionRow(f"question {n}", ["a", "b"], 0) for n in range(40)]
    assert bench.summary == {
        "sft_rows": 40, "reward_pairs": 40, "ppo_prompts": 40, "evaluation_prompts": 40,
        "retention_texts": 40, "retention_questions": 40, "dropped": 0, "bad_share": 0, "leaks": 0,
        "near_duplicates": 0, "near_duplicate_share": 0, "contradictions": 0, "contradiction_share": 0,
        "copied_answers": 0, "copied_answer_share": 0, "foreign_template": 0,
        "vocabulary_size": 259,
    }  # fmt: skip
    assert bench.report["sft"]["read"] == 40
    assert bench.report["sft"]["removed"] == {}
    assert bench.report["sft"]["digest"] == data.digest("sft")
    assert "sft.data sft.jsonl 40" in bench.output


def test_prompts_keep_their_columns_also_where_another_role_lends_them(bench: Bench) -> None:
    bench.rows["sft"] = [
        {"question": f"what is {n}?", "answer": f"it is {n}", "level": n % 2 or None} for n in range(40)
    ] + [{"question": "what is 0?", "answer": "it is 0", "level": 7}]
    bench.sources["ppo"] = "sft.data"
    asks = bench.prepare().rows("ppo", "train")
    assert len(asks) > 20
    for row in asks:
        number = int(row.asked().removeprefix("what is ").removesuffix("?"))
        level = {"level": 1} if number % 2 else {}
        assert row.columns == {"answer": f"it is {number}"} | level and row.is_text


def test_rows_that_differ_in_other_columns_alone_ask_the_same(bench: Bench) -> None:
    bench.rows["ppo"] = [{"prompt": f"ask {n % 20}", "id": n} for n in range(40)]
    data = bench.prepare()
    rows = [*data.rows("ppo", "train"), *data.rows("ppo", "held_out")]
    assert sorted(row.columns["id"] for row in rows) == [*range(20)]
    assert bench.report["ppo"]["removed"]["duplicate"]["count"] == 20


def test_token_lengths(bench: Bench) -> None:
    # A byte is a token. Of the lengths 1 to 40, sorted: 5 % is item round(1.95), the median item round(19.5).
    bench.rows["sft"] = [{"text": "x" * n} for n in range(40, 0, -1)]
    bench.prepare()
    around = 2  # <|im_start|> opens a plain text, <|im_end|> ends it
    assert bench.report["sft"]["tokens"] == {
        "p5": around + 3, "p50": around + 21, "p95": around + 38, "max": around + 40,
        "mean": around + 20.5, "deviation": pytest.approx(((40**2 - 1) / 12) ** 0.5),
        "in_common": pytest.approx(sum(1 + n for n in range(1, 40)) / 40),  # the shorter one's, but its end
    }  # fmt: skip


def test_both_sides_of_a_pair_have_their_prompt_in_common(bench: Bench) -> None:
    bench.rows["pairs"] = [{"prompt": f"{n:02}", "chosen": "a", "rejected": "b"} for n in range(10, 50)]
    prepared = bench.prepare()
    tokenizer = bench.job.base.load_tokenizer()
    nothing, prompt = (len(prompt_ids(tokenizer, user(text))) for text in ("", "10"))
    found = (
        2 * prepared.size("pairs", "train").shared_prefix
    )  # of the two sides, and of a pair and the next one
    assert prompt < found < prompt + nothing


def test_evaluation_is_drawn_when_it_shares_its_source(bench: Bench) -> None:
    bench.sources["evaluate"] = str(bench.directory / "ppo.jsonl")
    bench.rows["pairs"] += [{"prompt": f"ppo {n}", "chosen": "good", "rejected": "bad"} for n in range(40)]
    data = bench.prepare()
    assert_apart(data)
    num_evaluation = len(data.rows("evaluate", "evaluation"))
    assert 4 <= num_evaluation <= 16  # a quarter of 40
    assert bench.report["evaluate"]["removed"]["left_for_training"]["count"] == 40 - num_evaluation
    assert bench.report["ppo"]["removed"]["in_evaluation"]["count"] == num_evaluation
    assert bench.report["pairs"]["removed"]["in_evaluation"]["count"] == num_evaluation
    assert bench.summary["leaks"] == bench.summary["dropped"] == 0  # by design, so no leak
    assert "LEAK" not in bench.output
    assert f"ppo.prompts: {num_evaluation} in evaluation (" in bench.output
    assert f"evaluate.prompts: {40 - num_evaluation} left for training (" in bench.output
    kept = bench.report["ppo"]["kept"]
    shares = f"{kept['train']} {kept['held_out']} - {num_evaluation} 0"  # the last two: set aside, dropped
    assert f"ppo.prompts ppo.jsonl 40 {shares} " in bench.output
    assert kept["train"] + kept["held_out"] + num_evaluation == 40


def test_the_same_file_elsewhere_is_the_same_source(bench: Bench) -> None:
    bench.stage()
    copy = shutil.copy(bench.directory / "ppo.jsonl", bench.directory / "copy.jsonl")
    bench.sources["evaluate"] = str(copy)
    assert_apart(bench.prepare())


def test_a_leak_from_another_source_is_removed_and_told_loudly(bench: Bench) -> None:
    bench.rows["evaluate"][3] = {"prompt": "SFT  7"}  # as sft 7, but for case and spacing
    bench.rows["evaluate"][4] = {"prompt": "ppo 2"}
    data = bench.prepare()
    assert_apart(data)
    assert bench.summary["leaks"] == 2
    assert bench.summary["sft_rows"] == bench.summary["ppo_prompts"] == 39
    assert bench.report["sft"]["removed"] == {"leak": {"count": 1, "examples": ["sft.jsonl line 8"]}}
    assert (
        "LEAK: 2 training rows ask what evaluate.prompts or evaluate.retention asks; they are left out: "
        "1 in sft.data (sft.jsonl line 8); 1 in ppo.prompts (ppo.jsonl line 3)."
    ) in bench.output


def test_a_leak_hidden_in_a_conversation_is_found(bench: Bench) -> None:
    bench.rows["evaluate"][3:6] = [{"prompt": f"hidden {n}"} for n in range(3)]
    system = {"role": "system", "content": "Be kind."}
    told = {"role": "assistant", "content": "It is so."}
    bench.rows["evaluate"][6] = {"prompt": [system, *user("hidden 3")]}
    behind_system = [system, *user("Hidden  0"), told]
    in_turns = [*user("hidden 1"), told, *user("And now?"), told]
    later = [*user("Hello"), told, *user("hidden 2"), told]
    with_system = [system, *user("Hello"), told, *user("hidden 3"), told]
    answer_only = [*user("Say it"), {"role": "assistant", "content": "hidden 1"}]
    conversations = [behind_system, in_turns, later, with_system, answer_only]
    bench.rows["sft"] += [{"messages": messages} for messages in conversations]
    bench.rows["ppo"] += [{"prompt": [system, *user("hidden 0")]}]
    bench.prepare()
    assert bench.summary["leaks"] == 5
    assert "4 in sft.data (sft.jsonl line 41, sft.jsonl line 42, sft.jsonl line 43" in bench.output
    assert bench.summary["sft_rows"] == 41


def test_a_retention_row_that_is_trained_on_is_a_leak(bench: Bench) -> None:
    bench.rows["sft"] += [{"text": "Fact 7"}, {"prompt": "question 3", "completion": "a"}]
    data = bench.prepare()
    assert bench.summary["leaks"] == 2
    assert len(data.rows("retention", "evaluation")) == 80
    assert "2 in sft.data (sft.jsonl line 41, sft.jsonl line 42)" in bench.output


def test_retention_shares_a_source_with_training_and_only_that_one_is_divided(bench: Bench) -> None:
    bench.sources["sft"] = str(bench.directory / "texts.jsonl")
    data = bench.prepare()
    retention = [*data.rows("retention", "evaluation")]
    kept = {row.text for row in retention if isinstance(row, TextRow)}
    trained = {row.completion for split in ("train", "held_out") for row in data.rows("sft", split)}
    assert 4 <= len(kept) <= 16  # a quarter of 40
    assert (kept & trained, len(kept | trained)) == (set(), 40)
    assert len(retention) - len(kept) == 40  # all questions
    assert bench.summary["leaks"] == 0


def test_what_is_replayed_or_mixed_in_is_neither_evaluated_nor_held_out(bench: Bench) -> None:
    bench.sources |= {role: str(bench.directory / "texts.jsonl") for role in ("sft", "replay", "ptx")}
    data = bench.prepare()
    assert_apart(data)
    kept = {row.text for row in data.rows("retention", "evaluation") if isinstance(row, TextRow)}
    for role in ("replay", "ptx"):
        assert [*data.rows(role, "train")] == [*data.rows("sft", "train")]
        assert not kept & {row.completion for row in data.rows(role, "train")}


def test_a_source_that_is_null_gives_no_rows(bench: Bench) -> None:
    bench.sources |= {"replay": None, "ptx": None}
    data = bench.prepare()
    assert [*data.rows("replay", "train")] == [*data.rows("ptx", "held_out")] == []
    assert "replay" not in bench.report
    assert "sft.replay" not in bench.output


def test_what_retention_figures_are_called_is_in_the_key(bench: Bench) -> None:
    before = bench.digests()
    copy = shutil.copy(bench.directory / "texts.jsonl", bench.directory / "facts.jsonl")
    bench.sources["retention"] = [str(copy), str(bench.directory / "questions.jsonl")]
    after = bench.digests()
    assert {name for name in after if after[name] != before[name]} == {"names"}


def test_the_key_is_the_content_of_the_sources_not_their_place(bench: Bench) -> None:
    before = bench.digests(), knobs(bench.stage())
    moved = shutil.copy(bench.directory / "ppo.jsonl", bench.directory / "elsewhere.jsonl")
    bench.sources["ppo"] = str(moved)
    assert (bench.digests(), knobs(bench.stage())) == before
    bench.sources["ppo"] = {"path": str(moved), "limit": 3}
    changed = {role for role in ROLES if bench.digests()[role] != before[0][role]}
    assert changed == {"ppo"}


def test_a_role_does_not_change_with_another_roles_source(bench: Bench) -> None:
    before = bench.prepare()
    digests = {role: before.digest(role) for role in ROLES}
    bench.rows["ppo"] = bench.rows["ppo"][:20] + [{"prompt": f"new {n}"} for n in range(9)]
    after = bench.prepare()
    assert {role for role in ROLES if after.digest(role) != digests[role]} == {"ppo"}


def test_the_split_is_stable_under_order_and_added_rows(bench: Bench) -> None:
    bench.sources["evaluate"] = str(bench.directory / "ppo.jsonl")
    before = bench.prepare()
    bench.rows["ppo"] += [{"prompt": f"more {n}"} for n in range(40)]
    random.Random(0).shuffle(bench.rows["ppo"])
    after = bench.prepare()
    assert identities(before, "evaluate")["evaluation"] < identities(after, "evaluate")["evaluation"]
    for split, found in identities(before, "ppo").items():
        assert found < identities(after, "ppo")[split]


def packaged(role: str, name: str) -> dict[str, str]:
    if not (SAMPLES / f"{name}.jsonl").exists():
        pytest.skip(f"data/{name}.jsonl is not there")
    return {role: f"samples:{name}"}


def test_packaged_prompts_never_overlap_and_hold_no_bad_row(bench: Bench) -> None:
    bench.sources = {
        **packaged("sft", "instructions"),
        **packaged("pairs", "pairs"),
        **packaged("ppo", "prompts"),
        **packaged("evaluate", "prompts"),
        "retention": ["samples:retention_sentences", "samples:retention_questions"],
    }
    assert_apart(bench.prepare(held_out_fraction=0.1, evaluation_fraction=0.15))
    assert bench.summary["dropped"] == 0


def test_packaged_prompts_never_overlap_with_pairs_on_the_same_prompts(bench: Bench) -> None:
    prompts = [json.loads(line) for line in (SAMPLES / "prompts.jsonl").read_text().splitlines()]
    bench.rows["pairs"] = [{**row, "chosen": "good", "rejected": "bad"} for row in prompts]
    bench.sources = {
        "sft": "samples:instructions",
        "ppo": "samples:prompts",
        "evaluate": "samples:prompts",
        "retention": ["samples:retention_sentences", "samples:retention_questions"],
    }
    assert_apart(bench.prepare(held_out_fraction=0.1, evaluation_fraction=0.15))
    assert bench.summary["dropped"] == bench.summary["leaks"] == 0
    # Held-out prompts are the same ones for the reward model and for PPO.
    data = PreparedData(bench.job.directory)
    assert identities(data, "pairs") == identities(data, "ppo")


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data sets are not there")
def test_real_human_data_is_read_completely(bench: Bench) -> None:
    prompts = sorted((REAL / "oasst-prompts").glob("*.jsonl"))[0]
    bench.sources = {
        "sft": str(REAL / "dolly-nocontext" / "train.jsonl.gz"),
        "pairs": str(REAL / "hh-helpful-base" / "pairs.jsonl.gz"),
        "ppo": str(prompts),
        "evaluate": str(prompts),
        "retention": str(REAL / "wikitext2-valid" / "valid.txt.gz"),
    }
    assert_apart(bench.prepare())
    assert bench.report["sft"]["read"] == bench.summary["sft_rows"] + 1 == 5027
    assert bench.report["pairs"]["read"] == bench.summary["reward_pairs"] == 2339
    assert bench.summary["copied_answers"] == 1  # it quotes its question
    assert bench.summary["near_duplicates"] == bench.summary["contradictions"] == 0
    assert bench.report["ppo"]["read"] == 263
    assert bench.summary["ppo_prompts"] + bench.summary["evaluation_prompts"] == 263
