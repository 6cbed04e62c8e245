"""What is known of a candidate."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from rlhf.decide.candidate import FIGURES, Candidate, Result, State, finite, read_answers, table
from rlhf.evaluation.selection import best_untrained
from rlhf.pipeline.settings import CandidateConfig

NAN = math.nan


def candidate(**known: object) -> Candidate:
    config = CandidateConfig(title="SFT, LoRA", asks="sft", length="sft.epochs")
    return Candidate("sft_lora", config, True, **known)  # type: ignore[arg-type]  # the tests' own fields


def sealed(**metrics: float) -> Result:
    return Result((), {}, metrics, "run", ())


def test_figures_are_means_over_the_seeds_that_have_them() -> None:
    each = candidate(
        sealed=[
            sealed(seconds_p50=1.0, stop_rate=0.5, other=9.0),
            sealed(seconds_p50=3.0, stop_rate=1.0),
            sealed(seconds_p50=2.6, memory_bytes=8.0),
        ]
    )
    assert each.figures == pytest.approx({"seconds_p50": 2.2, "memory_bytes": 8.0, "stop_rate": 0.75})
    assert candidate().figures == {}


def test_seconds_to_a_share_by_hand() -> None:
    each = candidate(step_seconds=100.0, ask_seconds=7.0)
    assert each.seconds_to(1.0) == 107.0
    each.share = 0.25
    assert each.seconds_to(1.0) == 82.0
    assert each.seconds_to(0.25) == 0.0  # trained and asked already
    assert each.seconds_to(0.1) == 0.0


def test_the_time_of_the_full_length_by_hand() -> None:
    assert candidate(train_seconds=60.0, step_seconds=100.0, share=0.25).full_seconds == 135.0


def test_a_question_without_a_score_is_still_a_question(tmp_path: Path) -> None:
    rows = [
        {"policy": "sft", "prompt": "a", "response": "yes", "gold": 0.5, "cost": 0.25},
        {"policy": "base", "prompt": "a", "response": "other", "gold": 9.0, "cost": 1.0},
        {"policy": "sft", "prompt": "b", "response": "no", "gold": None},
        {"policy": "sft", "prompt": "c", "response": "c", "score": 9.0},
        {"policy": "sft", "prompt": "d", "response": "d", "gold": 0.0},
    ]
    path = tmp_path / "responses.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts, scores, answers, costs = read_answers(path, "sft", "gold")
    assert [json.loads(each) for each in prompts] == ["a", "b", "c", "d"]
    assert scores == {'"a"': 0.5, '"d"': 0.0}
    assert answers == ["yes", "no", "c", "d"]
    assert costs == {'"a"': 0.25}  # the others were not timed


def test_a_prompt_without_a_score_is_nan() -> None:
    found = table([{"a": 1.0, "b": 0.0}, {"c": 0.5, "a": 0.25}], ["a", "b", "c"])
    assert found.flatten().tolist() == pytest.approx([1.0, 0.0, NAN, 0.25, NAN, 0.5], nan_ok=True)
    assert found.shape == (2, 3) and found.dtype == torch.float64
    assert table([{"a": 1.0}], []).shape == (1, 0)


@pytest.mark.parametrize(
    ("state", "is_asked", "is_open"),
    [
        (State.RUNNING, True, True),
        (State.CUT, True, True),
        (State.CUT, False, False),  # it never ran
        (State.WORSE, True, False),
        (State.FAILED, True, False),
        (State.COMPARED, True, False),
    ],
)
def test_who_may_still_be_a_finalist(state: State, is_asked: bool, is_open: bool) -> None:
    chosen = Result("a", {"a": 1.0}, {}, "run", ()) if is_asked else None
    assert candidate(state=state, chosen=chosen).is_open is is_open


def test_quality_is_the_mean_over_the_choosing_questions() -> None:
    each = candidate(chosen=Result("abcd", {"a": 1.0, "b": 0.0, "c": 0.5}, {}, "run", ()))
    assert each.quality is not None and each.quality.low < 0.5 < each.quality.high
    assert each.mean == pytest.approx(0.5) and each.quality.rows == 3
    assert candidate().quality is None and candidate().mean == -math.inf


def test_a_quality_of_shares_is_not_certain_if_all_answers_are_right() -> None:
    """And its interval ends within 0 and 1."""
    quality = candidate(chosen=Result("abc", dict.fromkeys("abc", 1.0), {}, "run", (), is_share=True)).quality
    assert quality is not None and quality.value == quality.high == 1.0 and 0 < quality.low < 0.6


def test_of_equal_options_without_training_base_wins() -> None:
    """Even if it happened to take longer."""
    configs = {"retrieval": "base+retrieval", "base": "base"}
    options = {
        name: Candidate(name, CandidateConfig(title=name, asks=asks), False, ask_seconds=seconds)
        for (name, asks), seconds in zip(configs.items(), (5.0, 6.0), strict=True)
    }
    same = dict.fromkeys(options, torch.zeros(4))
    assert best_untrained(same, {name: each.asking_cost for name, each in options.items()}) == "base"
    better = same | {"retrieval": torch.ones(4)}
    assert best_untrained(better, {name: each.asking_cost for name, each in options.items()}) == "retrieval"


def test_its_entry_has_only_numbers_that_json_knows() -> None:
    entry = candidate(
        chosen=Result("a", {"a": 1.0}, {}, "run", ()), sealed=[sealed(seconds_p50=math.inf)]
    ).as_json()
    assert json.loads(json.dumps(entry, allow_nan=False)) == entry
    assert entry["quality"]["value"] == 1.0 and entry["quality"]["rows"] == 1
    assert entry["train_seconds"] is None and {entry[figure] for figure in FIGURES} == {None}
    assert entry["state"] == "waiting" and entry["asks"] == "sft"
    assert [finite(each) for each in (None, 1.5, NAN, -math.inf)] == [None, 1.5, None, None]


def test_an_option_without_training_has_no_share_and_no_time() -> None:
    each = Candidate("base", CandidateConfig(title="base model", asks="base"), False, share=1.0)
    each.train_seconds = 0.0
    assert each.as_json()["share"] is None and each.as_json()["train_seconds"] is None
    assert candidate(share=0.5, train_seconds=3.0).as_json()["share"] == 0.5
