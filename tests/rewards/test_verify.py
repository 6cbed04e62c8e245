"""`verify:NAME`: what is right, what is wrong, what has no answer, and what would take forever."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.jobs import user
from rlhf.config import ConfigError
from rlhf.data.schema import PromptRow
from rlhf.rewards import verify
from rlhf.rewards.checker import Checker
from rlhf.rewards.kinds import RewardPart, reward_digest, reward_kind
from rlhf.rewards.verify import verifier


def score(source: str, said: str, args: dict[str, Any] | None = None, **columns: Any) -> float | None:
    """What one response gets; None for no score."""
    found = verifier(source, args or {})([PromptRow(user("?"), columns=columns)], [said])
    return None if found.isnan() else float(found)


@pytest.mark.parametrize(("source", "args", "answer", "right", "wrong"), [
    ("verify:exact", {}, "Yes", " Yes\n", "yes"),
    ("verify:exact", {"ignore_case": True}, "Yes", "YES", "no"),
    ("verify:exact", {}, 4, "4", "4."),
    ("verify:number", {}, "so 6*3\n#### 1,018", "It is 1018.", "1018 or 1019"),
    ("verify:number", {}, 2, "2.0", "no number"),
    ("verify:number", {}, -2, "-2", "2"),
    ("verify:number", {"tolerance": 0.1}, 0.3, "about 0.4", "about 0.41"),
])  # fmt: skip
def test_a_response_is_compared_with_the_rows_answer(
    source: str, args: dict[str, Any], answer: Any, right: str, wrong: str
) -> None:
    assert [score(source, said, args, answer=answer) for said in (right, wrong)] == [1.0, 0.0]
    assert score(source, right, {**args, "column": "gold"}, gold=answer) == 1.0
    assert score(source, right, args) is None


@pytest.mark.parametrize(("source", "args", "right", "wrong"), [
    ("verify:regex", {"pattern": r"^\d+$"}, "12", "12a"),
    ("verify:length", {"min": 2, "max": 3}, "a b c", "a b c d"),
    ("verify:length", {"min": 2}, "a b", "a"),
    ("verify:length", {"max": 3, "unit": "characters"}, "abc", "abcd"),
    ("verify:repetition", {"words": 2, "max_share": 0.0}, "a b c", "a b a b"),
    ("verify:repetition", {"words": 1, "max_share": 0.5}, "a a", "a a a"),
    ("verify:repetition", {}, "", "no no no no no no"),
])  # fmt: skip
def test_a_response_is_checked_alone(source: str, args: dict[str, Any], right: str, wrong: str) -> None:
    assert [score(source, said, args) for said in (right, wrong)] == [1.0, 0.0]


def test_tokens_are_those_that_were_sampled() -> None:
    args = {"unit": "tokens", "max": 2}
    assert score("verify:length", "a b c", args, completion_ids=[1, 2]) == 1.0
    assert score("verify:length", "a", args, completion_ids=[1, 2, 3]) == 0.0
    assert score("verify:length", "a", args) is None


def test_a_pattern_that_takes_forever_does_not_match() -> None:
    args = {"pattern": "(a+)+$", "seconds": 0.05}
    assert score("verify:regex", "a" * 60 + "b", args) == 0.0


@pytest.fixture
def schema(tmp_path: Path) -> dict[str, Any]:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps({"type": "object", "required": ["a"]}))
    return {"schema_file": str(file)}


def test_json_follows_a_schema(schema: dict[str, Any]) -> None:
    check = verifier("verify:json_schema", schema)
    said = ['{"a": 1}', '{"b": 1}', "no JSON", "[" * 100_000]
    assert check([PromptRow(user("?"))] * 4, said).tolist() == [1.0, 0.0, 0.0, 0.0]


AROUND = ("{}", r"\boxed{{{}}}", "${}$", r"$\text{{{}}}$", "1 + {}", "The answer is {}.")


@pytest.mark.parametrize("source", ["verify:math", "verify:number", "verify:json_schema"])
def test_what_a_model_wrote_is_never_run(source: str, tmp_path: Path, schema: dict[str, Any]) -> None:
    """Neither as it is nor inside a formula or JSON."""
    file = tmp_path / "was_run"
    code = f"__import__('os').system('touch {file}')"
    plain = [around.format(code) for around in AROUND]
    said = [*plain, *map(json.dumps, plain), json.dumps({code: code, "a": code})]
    check = verifier(source, schema if source == "verify:json_schema" else {})
    scores = check([PromptRow(user("?"), columns={"answer": "123.25"})] * len(said), said)
    assert not file.exists()
    assert scores.tolist() == [0.0] * 12 + [float(source == "verify:json_schema")]


def test_mathematics_is_compared_by_value() -> None:
    check = verifier("verify:math", {})
    said = [r"So \boxed{\frac{1}{2}}", "it is 0.25", "0.5", "0.5"]
    rows = [PromptRow(user("?"), columns={"answer": answer}) for answer in ("0.5", "1/2", r"\frac12")]
    scores = check([*rows, PromptRow(user("?"))], said)
    assert scores[:3].tolist() == [1.0, 0.0, 1.0] and scores[3].isnan()


def test_a_check_that_takes_forever_is_stopped_and_the_next_one_is_made() -> None:
    checker = Checker("json_schema", 0.3)
    endless = json.dumps({"pattern": "^(a+)+$"})
    assert checker.check("{}", "1")
    checker.seconds = 0.3
    assert not checker.check(endless, json.dumps("a" * 60 + "b"))
    checker.seconds = 30.0
    assert checker.check(endless, json.dumps("aa"))


@pytest.mark.parametrize(("source", "args", "said"), [
    ("verify:regex", {}, "args.pattern: a value is required"),
    ("verify:regex", {"pattern": "("}, "missing )"),
    ("verify:exact", {"colum": "gold"}, "args.colum: there is no such key. Did you mean column?"),
    ("verify:length", {"min": 3, "max": 2}, "max=2 is below min=3"),
    ("verify:exacd", {}, "verify:exact|number|regex"),
    ("vader", {"column": "gold"}, "vader takes no args"),
])  # fmt: skip
def test_arguments_are_checked_with_the_config(source: str, args: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        RewardPart(source=source, args=args)
    assert said in str(caught.value)


def test_the_schemas_content_and_packages_are_in_the_key(schema: dict[str, Any], monkeypatch: Any) -> None:
    def digest() -> dict[str, str]:
        part = RewardPart(source="verify:json_schema", args=schema)
        return reward_kind(part.source).digest(part, lambda path: "")

    before = digest()
    assert "jsonschema" in before and before == digest()
    Path(schema["schema_file"]).write_text('{"type": "array"}')
    assert digest() != before
    Path(schema["schema_file"]).write_text('{"type": 3}')
    with pytest.raises(ConfigError, match=r"args\.schema_file=.*Give a file with a JSON schema"):
        digest()
    assert reward_digest("verify:exact") == {}
    monkeypatch.setattr(verify, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"verify:math: it needs math-verify \(pip install -e '\.\[verify\]'\)\."
    ):
        reward_digest("verify:math")
