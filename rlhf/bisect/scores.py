"""Whether a policy is as bad as the bad run's, by the judge's scores of its answers to the same prompts.

Dimensions: S seeds, B prompts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.bisect.search import Answer
from rlhf.evaluation.sampled import Sampled

Scores = Mapping[str, float]
"""Prompt, as JSON -> the judge's score of the policy's answer."""


MIN_PROMPTS = 8
"""Fewest prompts that tell anything: fewer may all agree by chance."""


class NoScoresError(Exception):
    """A trial cannot be judged. The text says why."""


class Verdict(NamedTuple):
    """What a trial's scores tell."""

    answer: Answer
    gain: Sampled | None = None
    """Its score minus that of the good run, prompt by prompt; None if it has no scores."""
    over_half_way: Sampled | None = None
    """Its score minus half way between the good and the bad run, prompt by prompt: what decides."""
    why: str = ""
    """Why it has no scores."""

    @property
    def words(self) -> str:
        """The gain with its interval, or why there is none."""
        return self.why if self.gain is None else in_words(self.gain)

    def as_json(self) -> dict[str, Any]:
        """As JSON values."""
        gain, over = (None if each is None else each._asdict() for each in (self.gain, self.over_half_way))
        return {"answer": self.answer.value, "gain": gain, "over_half_way": over, "why": self.why}


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


def difference(own: Sequence[Scores], other: Sequence[Scores]) -> Sampled:
    """The mean difference over the prompts that both answered, with its interval.

    Args:
        own: one entry for each seed; `other` has the same seeds.
    """
    return _mean([
        {prompt: scores[prompt] - others[prompt] for prompt in scores if prompt in others}
        for scores, others in zip(own, other, strict=True)
    ])  # fmt: skip


def compare(trial: Sequence[Scores], good: Sequence[Scores], bad: Sequence[Scores]) -> Verdict:
    """Bad if the whole interval of the trial's score lies below half way between good and bad, good if above,
    else unknown. All three are compared prompt by prompt, so the difficulty of the prompts cancels out.

    Args:
        trial: one entry for each seed, as in `good` and `bad`.
    """
    half_way = [
        {prompt: (scores[prompt] + others[prompt]) / 2 for prompt in scores if prompt in others}
        for scores, others in zip(good, bad, strict=True)
    ]
    over_half_way = difference(trial, half_way)
    answer = Answer.UNKNOWN
    if over_half_way.high < 0:
        answer = Answer.BAD
    elif over_half_way.low > 0:
        answer = Answer.GOOD
    return Verdict(answer, difference(trial, good), over_half_way)


def _mean(by_seed: Sequence[Scores]) -> Sampled:
    """The mean over prompts, each averaged over the seeds. With several seeds also the mean over seeds: the
    wider interval of the two counts, so that seeds that disagree tell nothing."""
    import torch

    from rlhf.evaluation.intervals import mean

    common = [prompt for prompt in by_seed[0] if all(prompt in each for each in by_seed)]
    scores_SB = torch.tensor([[each[prompt] for prompt in common] for each in by_seed], dtype=torch.float64)
    over_prompts = mean(scores_SB.mean(0))
    if len(common) < MIN_PROMPTS:
        return over_prompts._replace(low=-math.inf, high=math.inf)
    if len(by_seed) == 1:
        return over_prompts
    over_seeds = mean(scores_SB.mean(1))
    return max(over_prompts, over_seeds._replace(rows=len(common)), key=lambda each: each.high - each.low)
