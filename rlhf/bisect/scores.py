"""Whether a policy is as bad as the bad run's, by the judge's scores of its answers to the same prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.bisect.search import Answer
from rlhf.evaluation.sampled import Sampled

Scores = Mapping[str, float]
"""Prompt, as JSON -> the judge's score of the policy's answer."""


class NoScoresError(Exception):
    """A trial cannot be judged. The text says why."""


class Verdict(NamedTuple):
    """What a trial's scores tell."""

    answer: Answer
    gain: Sampled | None = None
    """Its score minus that of the good run, prompt by prompt; None if it has no scores."""
    why: str = ""
    """Why it has no scores."""

    @property
    def words(self) -> str:
        """The gain with its interval, or why there is none."""
        return self.why if self.gain is None else in_words(self.gain)

    def as_json(self) -> dict[str, Any]:
        """As JSON values."""
        gain = None if self.gain is None else self.gain._asdict()
        return {"answer": self.answer.value, "gain": gain, "why": self.why}


def in_words(gain: Sampled) -> str:
    """A gain with its interval and the number of prompts."""
    return f"{gain.value:+.3f} (95%: {gain.low:+.3f} to {gain.high:+.3f}, {gain.rows} prompts)"


def read_scores(responses: Path, policy: str, kind: str) -> dict[str, float]:
    """A policy's scores in the responses.jsonl of `evaluate`. An answer without a score is left out.

    Args:
        kind: `gold` or `judge`.
    """
    scores: dict[str, float] = {}
    with responses.open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            if row["policy"] == policy and row.get(kind) is not None:
                scores[json.dumps(row["prompt"], sort_keys=True)] = row[kind]
    return scores


def mean_of(several: Sequence[Scores]) -> Scores:
    """For each prompt the mean over several seeds."""
    common = [prompt for prompt in several[0] if all(prompt in each for each in several)]
    return {prompt: sum(each[prompt] for each in several) / len(several) for prompt in common}


def difference(own: Scores, other: Scores) -> Sampled:
    """The mean difference over the prompts that both answered, with its interval."""
    return _mean([own[prompt] - other[prompt] for prompt in own if prompt in other])


def compare(trial: Scores, good: Scores, bad: Scores) -> Verdict:
    """Bad if the whole interval of the trial's score lies below half way between good and bad, good if above,
    else unknown. All three are compared prompt by prompt, so the difficulty of the prompts cancels out."""
    common = [prompt for prompt in trial if prompt in good and prompt in bad]
    over_half_way = _mean([trial[each] - (good[each] + bad[each]) / 2 for each in common])
    answer = Answer.UNKNOWN
    if over_half_way.high < 0:
        answer = Answer.BAD
    elif over_half_way.low > 0:
        answer = Answer.GOOD
    return Verdict(answer, difference(trial, good))


def _mean(values: Sequence[float]) -> Sampled:
    import torch

    from rlhf.evaluation.intervals import mean

    return mean(torch.tensor(values, dtype=torch.float64))
