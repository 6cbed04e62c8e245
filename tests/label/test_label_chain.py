"""stage=label in real chains on the tiny model: its key, what reads it, and rounds of feedback."""

from __future__ import annotations

import json
import signal
import socket
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from helpers.chains import Chain, Outcome, RealChain, wait_until
from helpers.labelling import LINK, Browser
from rlhf.label.pairs import pair_id

RULE = ("label.annotator=rule", "label.reward=vader")


def rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def own_pairs(chain: Chain) -> str:
    """A file of pairs that VADER can tell apart, and one that it cannot."""
    found = [
        {"prompt": f"Rate {n}", "first": f"It is awful, {n}.", "second": f"I love it, {n}!"}
        for n in range(24)
    ]
    same = {"prompt": "Which?", "first": "The table.", "second": "The chair."}
    return chain.write("own.jsonl", [*found, same])


def label(chain: Chain, *overrides: str) -> Outcome:
    found = chain.run("stage=label", f"label.pairs={own_pairs(chain)}", *RULE, *overrides)
    assert found.code == 0, found.err
    return found


def test_a_rule_judges_a_file_of_pairs(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    first = label(chain, "label.votes=10")
    assert first.statuses == {"label": "ran"}
    made = rows(first.artifact("label") / "pairs.jsonl")
    metrics = first.summary["stages"]["label"]["metrics"]
    assert metrics["label/votes"] == 10 and len(made) == metrics["label/pairs"] >= 9
    assert all("love" in row["chosen"] and "awful" in row["rejected"] for row in made)
    assert made[0]["votes"] == {"chosen": 1, "rejected": 0, "tie": 0, "both_bad": 0}
    assert made[0]["annotators"][0].startswith("rule:vader")

    again = label(chain, "label.votes=10")
    assert again.statuses == {"label": "reused"} and again.key("label") == first.key("label")

    more = label(chain, "label.votes=30")
    metrics = more.summary["stages"]["label"]["metrics"]
    assert more.key("label") != first.key("label") and first.artifact("label").is_dir()
    assert (metrics["label/votes"], metrics["label/pairs"], metrics["label/ties"]) == (25, 24, 1)
    assert metrics["label/pairs_open"] == 0
    assert label(chain, "label.votes=30").statuses == {"label": "reused"}, "no pair is left"
    fewer = label(chain, "label.votes=10")
    assert fewer.statuses == {"label": "reused"} and fewer.key("label") == more.key("label")


def test_another_rule_judges_anew_and_the_same_in_another_file_is_the_same_artifact(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    (tmp_path / "taste.py").write_text(
        "def score(prompts, texts):\n    return [-len(text) for text in texts]\n"
    )
    first = label(chain)
    other = label(chain, "label.reward=python:taste:score")
    assert other.key("label") != first.key("label")
    assert {
        row["annotators"][0].partition(" ")[0] for row in rows(other.artifact("label") / "pairs.jsonl")
    } == {"rule:python:taste:score"}
    assert label(chain).statuses == {"label": "reused"}
    elsewhere = label(chain, "label.file=elsewhere.sqlite")
    assert elsewhere.key("label") == first.key("label")


def test_votes_of_another_tool_are_read_and_written(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    theirs = [
        {
            "prompt": f"Rate {n}", "chosen": f"I love it, {n}!", "rejected": f"It is awful, {n}.",
            "annotator": "ada", "time": "2026-01-31T12:00:00+00:00",
        }
        for n in range(4)
    ]  # fmt: skip
    asked = ("stage=label", f"label.pairs={own_pairs(chain)}", "label.votes=4")
    first = chain.run(*asked, f"label.imports=[{chain.write('theirs.jsonl', theirs)}]")
    assert first.code == 0, first.err
    made = rows(first.artifact("label") / "pairs.jsonl")
    assert [(row["chosen"], row["rejected"]) for row in made] == [
        (row["chosen"], row["rejected"]) for row in theirs
    ]
    assert made[0]["annotators"] == ["ada"] and made[0]["times"] == ["2026-01-31T12:00:00+00:00"]

    (tmp_path / "out.jsonl").write_bytes((first.artifact("label") / "votes.jsonl").read_bytes())
    back = chain.run(*asked, "label.file=new.sqlite", "label.imports=[out.jsonl]")
    assert rows(back.artifact("label") / "pairs.jsonl") == made
    wrong = chain.write("wrong.jsonl", [{"prompt": "a", "first": "b", "second": "c", "choice": "left"}])
    refused = chain.run(*asked, f"label.imports=[{wrong}]")
    assert refused.code == 2 and "wrong.jsonl line 1: choice='left'" in refused.err


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("label.reward=learned", "Use annotator=reward_model"),
        ("label.reward=null", "needs reward"),
        ("label.annotator=judge", "Use annotator=rule"),
        ("label.answers=[sft]", "sft is no generate stage"),
        ("label.answers=[]", "Name one generate stage or two"),
        ("label.file=pairs.jsonl", "cannot be used as a file of votes"),
    ],
)
def test_slips_are_named(tmp_path: Path, override: str, said: str) -> None:
    chain = Chain(tmp_path)
    pairs = [] if "answers" in override else [f"label.pairs={own_pairs(chain)}"]
    found = chain.run("stage=label", *RULE, *pairs, override)
    assert found.code == 2 and said in found.err, found.err


@pytest.mark.parametrize(
    ("reader", "counts", "reads"),
    [
        ("reward", "pairs", ["reward.pairs=stage:label"]),
        ("dpo", "rows", ["dpo.data=stage:label", "dpo.init=base", "dpo.peft=none"]),
    ],
)
def test_a_stage_learns_from_the_judgements(
    tmp_path: Path, reader: str, counts: str, reads: list[str]
) -> None:
    chain = Chain(tmp_path)
    args = (*RULE, f"label.pairs={own_pairs(chain)}", *reads, f"stage={reader}", "gates=warn")
    first = chain.run(*args, "label.votes=20")
    assert first.code == 0, first.err
    metrics = first.summary["stages"][reader]["metrics"]
    assert metrics[f"{reader}/train_{counts}"] + metrics[f"{reader}/held_out_{counts}"] == 20
    again = chain.run(*args, "label.votes=20")
    assert set(again.statuses.values()) == {"reused"}
    more = chain.run(*args, "label.votes=24")
    assert more.statuses[reader] == "ran" and first.artifact(reader).is_dir()


FEEDBACK = (
    "recipe=feedback", "recipe.rounds=2", *RULE, "reward.pairs=stage:label", "evaluate.gold=null",
    "gates=warn", "label.votes=30",
    "generate@answers.num_prompts=null", "generate@answers_2.num_prompts=null", "ppo.peft=none",
    "ppo.optim.lr=1e-2",
)  # fmt: skip


@pytest.mark.slow
def test_rounds_of_feedback_keep_old_judgements(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    (tmp_path / "rule.py").write_text(
        "def score(prompts, texts):\n    return [float(sum(map(ord, each)) % 97) for each in texts]\n"
    )
    args = (*FEEDBACK, "label.reward=python:rule:score", "label@2.reward=python:rule:score")
    first = chain.run(*args)
    assert first.code == 0, first.err
    assert [*first.statuses] == [
        "prepare", "sft", "generate@answers", "label", "reward", "generate", "ppo",
        "generate@answers_2", "label@2", "reward@2", "ppo@2", "evaluate",
    ]  # fmt: skip
    one, two = (rows(first.artifact(name) / "pairs.jsonl") for name in ("label", "label@2"))
    assert len(one) >= 20 and two[: len(one)] == one and len(two) > len(one)
    assert {row["policy"] for row in rows(first.directory / "samples.jsonl") if "policy" in row} >= {
        "sft",
        "ppo",
    }
    assert len({pair_id(row["prompt"], row["chosen"], row["rejected"]) for row in two}) == len(two)
    learned = first.summary["stages"]["reward@2"]["metrics"]
    assert learned["reward@2/train_pairs"] + learned["reward@2/held_out_pairs"] == len(two)
    again = chain.run(*args)
    assert set(again.statuses.values()) == {"reused"}


@pytest.mark.slow
def test_ctrl_c_publishes_what_is_there(tmp_path: Path) -> None:
    """The run ends with 130; the same command asks on; with fewer votes wanted the snapshot is taken."""
    chain = RealChain(tmp_path)
    own_pairs(Chain(tmp_path))
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
    asked = ("stage=label", "label.pairs=own.jsonl", "label.annotators=[ada]", f"label.server.port={port}")
    process = chain.start("stopped", *asked)
    wait_until(lambda: "\n" in process.printed()[0].partition("label: ada: ")[2], process)  # a whole line
    found = LINK.search(process.printed()[0])
    assert found is not None
    ada = Browser(found[2])
    for _ in range(3):
        ada.prefer("love" if "love" in ada.text else "table")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "3 votes are published" in out
    (made,) = chain.store("stopped").glob("label/*/pairs.jsonl")
    kept = made.read_bytes()

    process = again = chain.start("stopped", *asked)
    wait_until(lambda: "has a link already" in again.printed()[0], again)
    ada.page = ada.client.get("/")
    ada.prefer("love" if "love" in ada.text else "table")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert len([*chain.store("stopped").glob("label/*/pairs.jsonl")]) == 2 and made.read_bytes() == kept

    out, _ = chain.run("stopped", *asked, "label.votes=4")
    assert "label reused" in out
