"""Which pair is next, and what a snapshot counts."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from helpers.labelling import many, pair
from rlhf.config import ConfigError
from rlhf.data.sources import SourceConfig
from rlhf.label.draw import MIN_VOTES_BEFORE_CHECK, Draw, DrawConfig
from rlhf.label.pairs import Pair, pairs_of_answers
from rlhf.label.snapshot import Snapshot, imported
from rlhf.label.votes import Choice, ExternalVote, Purpose, Vote, VotesFile

PLAIN = DrawConfig(random_share=0.3, overlap_share=0.0, overlap_people=2, check_share=0.0)


def gaps(count: int) -> list[Pair]:
    return [pair(f"Rate {n}", f"good {n}", f"bad {n}", gap=float(n)) for n in range(count)]


def vote(
    number: int, asked: Pair, choice: Choice = "first", by: str = "ada", purpose: Purpose = "random"
) -> Vote:
    return Vote(number, by, asked, "first", purpose, choice, "", float(number), number + 2.0)


def voted(draw: Draw, annotator: str, count: int, choice: Choice = "first") -> list[Vote]:
    """What an annotator is shown who always says the same."""
    votes: list[Vote] = []
    for number in range(count):
        found = draw.next(annotator, votes, {})
        if found is None:
            break
        asked, left, purpose = found
        said = Vote(number, annotator, asked, left, purpose, choice, "", 0.0, 1.0)
        votes.append(said)
    return votes


def test_large_gaps_are_mixed_with_moderate_ones() -> None:
    draw = Draw(gaps(300), PLAIN.model_copy(update={"random_share": 0.0}), 0, 1)
    shown = [each.pair.predicted or 0.0 for each in voted(draw, "ada", 20)]
    assert shown[::2] == [299.0 - n for n in range(10)]
    assert shown[1::2] == [199.0 - n for n in range(10)]


def test_the_random_share_is_random() -> None:
    draw = Draw(gaps(1000), PLAIN, 0, 1)
    random = [each.predicted or 0.0 for each in draw.random]
    assert len(random) == pytest.approx(300, abs=60)
    assert sum(random) / len(random) == pytest.approx(500, abs=60)
    votes = voted(draw, "ada", 100)
    assert sum(each.purpose == "random" for each in votes) == pytest.approx(30, abs=15)
    assert len({each.pair.id for each in votes}) == 100
    assert all(each.purpose == "random" for each in voted(Draw(many(20), PLAIN, 0, 1), "ada", 20))
    assert {*map(id, draw.in_order())} == {*map(id, draw.pairs.values())}


def test_several_people_see_some_pairs_and_no_one_sees_a_pair_twice() -> None:
    config = PLAIN.model_copy(update={"overlap_share": 0.5, "overlap_people": 3})
    draw = Draw(many(40), config, 0, 2)
    assert {*draw.wanted.values()} == {1, 2}, "no pair waits for a third person of two"
    ada = voted(draw, "ada", 100)
    assert len(ada) == 40
    shared = sum(wanted == 2 for wanted in draw.wanted.values())
    for _ in range(shared):
        found = draw.next("ben", ada, {})
        assert found is not None and draw.wanted[found[0].id] == 2
        ada.append(vote(len(ada), found[0], by="ben"))
    assert draw.next("ben", ada, {}) is None and not draw.has_pair_left(["ada", "ben"], ada)


def test_a_pair_on_anothers_page_is_not_given_out() -> None:
    draw = Draw(many(2), PLAIN, 0, 2)
    first = draw.next("ada", [], {})
    assert first is not None
    other = draw.next("ben", [], {"ada": first[0].id})
    assert other is not None and other[0].id != first[0].id
    assert draw.next("ben", [], {"ada": first[0].id, "eve": other[0].id}) is None


def test_attention_checks_are_the_same_pair_swapped() -> None:
    draw = Draw(many(60), PLAIN.model_copy(update={"check_share": 0.5}), 0, 1)
    votes = voted(draw, "ada", 40)
    checks = [each for each in votes if each.purpose == "check"]
    assert len(checks) > 8
    for check in checks:
        (first, again) = (each for each in votes if each.pair.id == check.pair.id)
        assert again is check and first.left != again.left and again.id - first.id > MIN_VOTES_BEFORE_CHECK
    found = Snapshot(votes, draw.pairs, None)
    assert len(found.counted) == 40 - len(checks) and all(found.checks())


def test_a_snapshot_counts_a_person_once_for_a_pair() -> None:
    one, two, three, four = pairs = many(4)
    votes = [
        vote(0, one, "first"), vote(1, one, "second", purpose="check"), vote(2, one, "second", by="ben"),
        vote(3, one, "second", by="eve"), vote(4, two, "tie"), vote(5, two, "first", by="ben"),
        vote(6, three, "both_bad"), vote(7, four, "skip"), vote(8, four, "first", by="rule:vader"),
    ]  # fmt: skip
    found = Snapshot(votes, {each.id for each in pairs}, None)
    assert len(found.counted) == 6
    rows = [*found.rows()]
    assert [(row["chosen"], row["votes"]) for row in rows] == [
        (one.second, {"chosen": 2, "rejected": 1, "tie": 0, "both_bad": 0}),
        (two.first, {"chosen": 1, "rejected": 0, "tie": 1, "both_bad": 0}),
    ]
    assert rows[0]["annotators"] == ["ada", "ben", "eve"] and [*found.checks()] == [False]
    metrics = found.metrics(Draw(pairs, PLAIN, 0, 3))
    assert (metrics["votes"], metrics["pairs"], metrics["ties"], metrics["skips"]) == (6, 2, 1, 1)
    assert (metrics["check_agreement"], metrics["seconds_per_vote"]) == (0.0, 2.0)
    assert metrics["overlap_pairs"] == 2 and metrics["left_share"] == 0.5

    assert [*Snapshot(votes, set(), None).rows()] == [], "pairs that nobody asks about any more"
    machine = Snapshot(votes, {each.id for each in pairs}, "rule:vader")
    assert [row["chosen"] for row in machine.rows()] == [four.first]
    assert Snapshot(votes[:-1], {each.id for each in pairs}, None).digest == found.digest
    assert Snapshot(votes[1:], {each.id for each in pairs}, None).digest != found.digest


def test_a_machines_votes_are_no_persons(tmp_path: Path) -> None:
    """Those of another tool's people may have such names."""
    row = {"prompt": "q", "first": "a", "second": "b", "choice": "first"}
    for annotator, is_refused in (("rule:python:rw:letters (d7610613)", True), ("mturk:A1", False)):
        (tmp_path / "votes.jsonl").write_text(json.dumps({**row, "annotator": annotator}) + "\n")
        source = SourceConfig(path=str(tmp_path / "votes.jsonl"))
        if is_refused:
            with pytest.raises(ConfigError, match=r"imports: votes.jsonl line 1: annotator=rule:.*person"):
                [*imported([source], "label.imports")]
        else:
            assert [vote.annotator for vote in imported([source], "label.imports")] == ["mturk-A1"]


def test_wins_of_two_stages_are_counted_by_prompt() -> None:
    """Of pairs that stand for all: not of those chosen by their gap, nor of a stage's own two answers."""
    made = [
        each._replace(first_by=first, second_by=second)
        for each, first, second in (
            (pair("q", "a", "b"), "old", "new"), (pair("q", "c", "d"), "new", "old"),
            (pair("r", "e", "f"), "new", "old"), (pair("s", "g", "h"), "new", "old"),
            (pair("t", "i", "j"), "new", "new"), (pair("u", "k", "l"), "", ""),
        )
    ]  # fmt: skip
    votes = [
        vote(0, made[0], "second"), vote(1, made[1], "tie"), vote(2, made[2], "second", purpose="imported"),
        vote(3, made[3], "first", purpose="chosen"), vote(4, made[4], "first"), vote(5, made[5], "first"),
    ]  # fmt: skip
    draw = Draw(made, PLAIN, 0, 1)
    found = Snapshot(votes, draw.pairs, None)
    assert found.wins(draw) == {"new": [0.5, -1.0], "old": [-0.5, 1.0]}
    metrics = found.metrics(draw)
    assert metrics["preferred/new"] == -0.25 == -metrics["preferred/old"]
    assert metrics["preferred_rows/new"] == 2


def test_the_reward_models_accuracy_is_of_random_pairs_alone() -> None:
    sure = [pair("a", "b", "c", gap=2.0), pair("d", "e", "f", gap=-1.0), pair("g", "h", "i", gap=1.0)]
    votes = [
        vote(0, sure[0], "first"), vote(1, sure[1], "first"), vote(2, sure[2], "second", purpose="chosen")
    ]  # fmt: skip
    metrics = Snapshot(votes, {each.id for each in sure}, None).metrics(Draw(sure, PLAIN, 0, 1))
    assert (metrics["reward_accuracy"], metrics["reward_accuracy_rows"]) == (0.5, 2)


def answers(path: Path, *rows: tuple[str, str]) -> Path:
    content = [
        {"prompt": [{"role": "user", "content": prompt}], "response": text, "score": float(len(text))}
        for prompt, text in rows
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content), "utf-8")
    return path


def test_pairs_of_one_policy_and_of_two(tmp_path: Path) -> None:
    one = answers(
        tmp_path / "one.jsonl", ("p", "a\u2028b"), ("p", "ccc c"), ("p", "ccc c"), ("q", "e"), ("q", "")
    )
    (alone,) = pairs_of_answers({"generate": one}, 9)
    assert (alone.first, alone.second, alone.predicted) == ("a\u2028b", "ccc c", -2.0)
    other = answers(tmp_path / "other.jsonl", ("p", "z"), ("q", "e"), ("r", "g"))
    both = pairs_of_answers({"generate": one, "generate@2": other}, 9)
    assert {(each.first, each.first_by, each.second, each.second_by) for each in both} == {
        ("a\u2028b", "generate", "z", "generate@2"), ("ccc c", "generate", "z", "generate@2"),
    }  # fmt: skip
    assert len(pairs_of_answers({"generate": one, "generate@2": other}, 1)) == 1


def test_votes_that_end_in_the_middle_are_not_added(tmp_path: Path) -> None:
    given = [ExternalVote("ada", each, "first", "imported") for each in many(3)]

    def stopped() -> Iterator[ExternalVote]:
        yield from given[:2]
        raise KeyboardInterrupt

    with closing(VotesFile(tmp_path / "votes.sqlite")) as file:
        with pytest.raises(KeyboardInterrupt):
            file.add("label", stopped())
        assert file.votes("label") == []
        assert file.add("label", given) == 3


def test_a_file_of_votes_is_only_added_to(tmp_path: Path) -> None:
    path = tmp_path / "votes.sqlite"
    with closing(VotesFile(path)) as file:
        given = [ExternalVote("ada", each, "first", "imported") for each in many(3)]
        assert file.add("label", given) == 3 and file.add("label", given) == 0
        assert file.votes("label@2") == []
    with closing(sqlite3.connect(path)) as plain:
        assert plain.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        for statement in ("DELETE FROM votes", "UPDATE votes SET choice = 'tie'"):
            with pytest.raises(sqlite3.IntegrityError, match="only added"):
                plain.execute(statement)
        plain.execute("PRAGMA user_version = 2")
        plain.commit()
    with pytest.raises(ConfigError, match="its schema has version 2"):
        VotesFile(path)
    with closing(sqlite3.connect(tmp_path / "other.sqlite")) as plain:
        plain.execute("CREATE TABLE mine (x)")
        plain.commit()
    with pytest.raises(ConfigError, match="other tables"):
        VotesFile(tmp_path / "other.sqlite")
