"""A trial's verdict, on scores that were worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.bisect.scores import compare, difference, read_scores
from rlhf.bisect.search import Answer

GOOD = {f"prompt {n}": float(n) for n in range(8)}
BAD = {prompt: score - 1.0 for prompt, score in GOOD.items()}


def shifted(by: float, wobble: float) -> dict[str, float]:
    """Scores at a distance from the good ones, alternately a little more and less."""
    return {prompt: score + by + wobble * (-1) ** n for n, (prompt, score) in enumerate(GOOD.items())}


@pytest.mark.parametrize(
    ("by", "wobble", "answer"),
    [
        (-1.0, 0.0, Answer.BAD),
        (0.0, 0.0, Answer.GOOD),
        (-0.6, 0.1, Answer.BAD),  # 0.1 below half way; the interval's half width is 0.089
        (-0.55, 0.1, Answer.UNKNOWN),
        (-0.45, 0.1, Answer.UNKNOWN),
        (-0.4, 0.1, Answer.GOOD),
        (-0.6, 0.2, Answer.UNKNOWN),
        (0.5, 0.1, Answer.GOOD),  # better than good
    ],
)
def test_the_interval_decides_against_half_way(by: float, wobble: float, answer: Answer) -> None:
    verdict = compare([shifted(by, wobble)], [GOOD], [BAD])
    assert verdict.answer is answer
    assert verdict.gain is not None and verdict.gain.value == pytest.approx(by)


def test_only_prompts_that_all_answered_count() -> None:
    trial = shifted(-1.0, 0.0) | {"another": 99.0}
    verdict = compare([trial], [GOOD | {"third": 0.0}], [BAD])
    assert verdict.answer is Answer.BAD
    assert verdict.gain is not None and verdict.gain.rows == 8 and verdict.gain.value == pytest.approx(-1.0)


@pytest.mark.parametrize("prompts", [0, 1, 2, 7])
def test_few_prompts_tell_nothing_even_if_all_agree(prompts: int) -> None:
    trial = dict([*shifted(-1.0, 0.0).items()][:prompts])
    assert compare([trial], [GOOD], [BAD]).answer is Answer.UNKNOWN
    assert compare([shifted(-1.0, 0.0)], [GOOD], [BAD]).answer is Answer.BAD


def test_the_difference_is_paired() -> None:
    found = difference([shifted(-0.5, 0.1)], [GOOD])
    assert found.value == pytest.approx(-0.5) and found.high - found.low < 0.2  # unpaired: more than 4


def test_with_several_seeds_each_prompt_counts_once_and_seeds_that_agree_tell() -> None:
    seeds = [shifted(-0.6, 0.4), shifted(-0.6, -0.4)]  # one alone does not tell
    assert compare(seeds[:1], [GOOD], [BAD]).answer is Answer.UNKNOWN
    verdict = compare(seeds, [GOOD] * 2, [BAD] * 2)
    assert verdict.answer is Answer.BAD
    assert verdict.gain is not None and verdict.gain.rows == len(GOOD)


def test_seeds_that_disagree_tell_nothing_however_many_prompts_there_are() -> None:
    seeds = [shifted(-1.0, 0.0), shifted(-1.0, 0.0), shifted(0.0, 0.0)]
    verdict = compare(seeds, [GOOD] * 3, [BAD] * 3)
    assert verdict.answer is Answer.UNKNOWN
    # mean -2/3, deviation 0.577 over 3 seeds: 4.30 * 0.577 / sqrt(3)
    assert verdict.gain is not None and verdict.gain.high == pytest.approx(-2 / 3 + 1.434, abs=0.02)


def test_scores_are_read_by_prompt_and_an_unscored_answer_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    turns = [{"role": "user", "content": "Hello\u2028there"}]
    rows = [
        {"policy": "ppo", "prompt": turns, "gold": 0.5, "score": 9.0},
        {"policy": "sft", "prompt": turns, "gold": 0.1, "score": 9.0},
        {"policy": "ppo", "prompt": [], "gold": None, "score": 9.0},
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert read_scores(path, "ppo", "gold") == {json.dumps(turns, sort_keys=True): 0.5}
    assert read_scores(path, "ppo", "judge") == {}
