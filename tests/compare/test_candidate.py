"""How a candidate is written, and what it is called."""

from __future__ import annotations

import pytest

from rlhf.compare.candidate import Candidate, in_order, is_directory, is_endpoint, is_stage, parse_candidate


@pytest.mark.parametrize(
    ("text", "candidate"),
    [
        ("base", ("base", "base", "zero_shot")),
        ("base+few_shot", ("base+few_shot", "base", "few_shot")),
        ("dpo@2+retrieval", ("dpo@2+retrieval", "dpo@2", "retrieval")),
        ("best_of_n", ("best_of_n", "sft", "best_of_n")),  # that of the start
        ("base+best_of_n", ("base+best_of_n", "base", "best_of_n")),
        ("runs/a+b/artifacts/sft", ("a+b/sft", "runs/a+b/artifacts/sft", "zero_shot")),  # no method
        ("./m/x+few_shot", ("m/x+few_shot", "./m/x", "few_shot")),
        ("http://h:1/v1#org/gpt+few_shot", ("org-gpt+few_shot", "http://h:1/v1#org/gpt", "few_shot")),
    ],
)
def test_a_candidate_is_a_model_and_a_method(text: str, candidate: tuple[str, str, str]) -> None:
    assert parse_candidate(text, "sft") == candidate


def test_a_model_is_a_stage_a_directory_or_an_endpoint() -> None:
    for model, kind in {"sft": is_stage, "./sft": is_directory, "https://h/v1#m": is_endpoint}.items():
        assert [each for each in (is_stage, is_directory, is_endpoint) if each(model)] == [kind]
    assert not is_stage("base") and not is_stage("init")


def test_candidates_are_ordered_by_model_then_method() -> None:
    texts = ["./x", "ppo", "base+retrieval", "sft", "base", "base+few_shot", "http://h/v1#m"]
    given: list[Candidate] = [parse_candidate(text, "sft") for text in texts]
    ordered = [each.name for each in in_order(given, ["base", "prepare", "sft", "ppo"])]
    assert ordered == ["base", "base+few_shot", "base+retrieval", "sft", "ppo", "x", "m"]
