"""A candidate of a decision: what is known of it so far."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.evaluation.intervals import mean, share
from rlhf.evaluation.sampled import Sampled
from rlhf.pipeline.settings import CandidateConfig, LimitsConfig

Scores = Mapping[str, float]
"""Prompt -> the judge's score of the answer."""
FIGURES = tuple(LimitsConfig.model_fields)
"""Figures of the final evaluation that a limit can name."""


class State(StrEnum):
    """What became of a candidate."""

    WAITING = "waiting"
    RUNNING = "running"
    LATE = "late"
    """Its pilot was stopped because others wait, and continues after them."""
    COMPARED = "compared"
    """It needs no training."""
    WORSE = "worse"
    CUT = "cut"
    """For lack of budget."""
    IMPOSSIBLE = "cannot run"
    FAILED = "failed"
    FINALIST = "finalist"
    BEHIND = "no finalist"
    """Not worse, but others looked better at the end."""
    REFUSED = "refused"
    WINNER = "winner"


class Result(NamedTuple):
    """What a finished trial measured."""

    prompts: Sequence[str]
    """The questions, in order."""
    scores: Scores
    """A question without a score is missing."""
    metrics: Mapping[str, float]
    """Summary metrics of this candidate's answers, without its name."""
    run: str
    answers: Sequence[str]
    costs: Mapping[str, float] = {}
    """Question -> money that its answer costs; only for those that were timed."""
    base_costs: Mapping[str, float] = {}
    """The same of the base model's answers, which were timed beside them."""
    is_share: bool = False
    """Whether scores lie between 0 and 1."""


class Answered(NamedTuple):
    """A policy's answers to the questions of `evaluate`."""

    prompts: list[str]
    scores: dict[str, float]
    answers: list[str]
    costs: dict[str, float]


@dataclass(eq=False)
class Candidate:
    """A candidate, with its results."""

    name: str
    config: CandidateConfig
    is_trained: bool
    state: State = State.WAITING
    why: str = ""
    share: float | None = None
    """Share of its length that its newest result was trained."""
    chosen: Result | None = None
    """On the choosing questions."""
    sealed: Sequence[Result] = ()
    """On the sealed questions, one for each seed."""
    gain: Sampled | None = None
    gain_over_base: Sampled | None = None
    limits_over: Sequence[str] = ()
    train_seconds: float = math.nan
    """Seconds in which its models were trained, with those that it starts from."""
    step_seconds: float = 0.0
    """Seconds of its own stage for the full length, at the pace so far."""
    ask_seconds: float = 0.0
    """Seconds in which it was asked the choosing questions."""
    first_share: float = 1.0
    """Share of its length that its first pilot trains."""
    planned: dict[str, float] = field(default_factory=dict)
    """Stage -> predicted seconds of its first pilot."""

    @property
    def title(self) -> str:
        """What tables call it."""
        return self.config.title

    @property
    def is_open(self) -> bool:
        """Whether it may still be a finalist."""
        return self.state in (State.WAITING, State.RUNNING, State.LATE, State.CUT) and self.chosen is not None

    @property
    def is_possible(self) -> bool:
        """Whether it may become a finalist, also if it has no pilot yet."""
        return self.is_trained and (self.is_open or self.state in (State.WAITING, State.LATE))

    @property
    def asking_cost(self) -> float:
        """What decides between equal options without training: seconds; 0 for the base model, because the
        others add to what it is asked, and seconds are noisy."""
        return 0.0 if self.config.asks == "base" else self.ask_seconds

    @property
    def full_seconds(self) -> float:
        """Seconds in which its models would be trained to their full length."""
        return self.train_seconds + self.step_seconds * (1 - (self.share or 0.0))

    @property
    def mean(self) -> float:
        """Mean score on the choosing questions."""
        return self.quality.value if self.quality is not None else -math.inf

    @property
    def scores(self) -> Scores:
        """The scores of its answers to the choosing questions."""
        return {} if self.chosen is None else self.chosen.scores

    @property
    def quality(self) -> Sampled | None:
        """Mean score on the choosing questions, with its interval."""
        if self.chosen is None or not self.scores:
            return None
        score_B = torch.tensor([*self.scores.values()], dtype=torch.float64)
        return share(score_B) if self.chosen.is_share else mean(score_B)

    @property
    def costs(self) -> dict[str, float]:
        """Sealed question -> money that its answer costs: with several seeds, the mean."""
        return _means([each.costs for each in self.sealed])

    @property
    def base_costs(self) -> dict[str, float]:
        """The same of the base model's answers, which were timed beside them."""
        return _means([each.base_costs for each in self.sealed])

    @property
    def figures(self) -> dict[str, float]:
        """The figures of the final evaluation: with several seeds, their mean."""
        found = {
            figure: [each.metrics[figure] for each in self.sealed if figure in each.metrics]
            for figure in FIGURES
        }
        return {figure: sum(values) / len(values) for figure, values in found.items() if values}

    def seconds_to(self, share: float) -> float:
        """What a pilot takes that trains on from its share of its length to another one, and asks it."""
        before = self.share or 0.0
        return 0.0 if share <= before else self.ask_seconds + self.step_seconds * (share - before)

    def as_json(self) -> dict[str, Any]:
        """Its entry in decision.json."""
        figures = self.figures
        return {
            "name": self.name,
            "title": self.title,
            "asks": self.config.asks,
            "trained": self.is_trained,
            "state": self.state.value,
            "why": self.why,
            "share": self.share if self.is_trained else None,
            "quality": _sampled(self.quality),
            "gain": _sampled(self.gain),
            "gain_over_base": _sampled(self.gain_over_base),
            "limits_over": [*self.limits_over],
            "train_seconds": finite(self.train_seconds) if self.is_trained else None,
            **{figure: finite(figures.get(figure)) for figure in FIGURES},
        }


def _means(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each key that all have."""
    both = [key for key in values[0] if all(key in each for each in values)] if values else []
    return {key: sum(each[key] for each in values) / len(values) for key in both}


def figures_of(candidates: Iterable[Candidate]) -> dict[str, dict[str, float]]:
    """Candidate -> the figures of its final evaluation."""
    return {each.name: each.figures for each in candidates}


def twins(found: Iterable[Candidate]) -> list[tuple[Candidate, Candidate]]:
    """Open candidates that gave the same answers to the choosing questions as one whose training took less,
    with that one. Such as a policy whose best step is the model that it started from."""
    by_answers = dict[tuple[str, ...], Candidate]()
    pairs = list[tuple[Candidate, Candidate]]()
    for each in sorted(found, key=lambda each: each.train_seconds):
        if each.is_open and each.chosen is not None:
            twin = by_answers.setdefault(tuple(each.chosen.answers), each)
            pairs += [(each, twin)] if twin is not each else []
    return pairs


def finite(value: float | None) -> float | None:
    """The value; None if it is not finite, as JSON has no such number."""
    return value if value is not None and math.isfinite(value) else None


def _sampled(found: Sampled | None) -> dict[str, float | None] | None:
    if found is None:
        return None
    return {key: finite(each) for key, each in found._asdict().items()}


def read_answers(responses: Path, policy: str, kind: str) -> Answered:
    """A policy's answers in the responses.jsonl of `evaluate`.

    Args:
        kind: the score that judges.
    """
    found = Answered([], {}, [], {})
    with responses.open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            if row["policy"] == policy:
                prompt = json.dumps(row["prompt"], sort_keys=True)
                found.prompts.append(prompt)
                found.answers.append(row["response"])
                if row.get(kind) is not None:
                    found.scores[prompt] = row[kind]
                if "cost" in row:
                    found.costs[prompt] = row["cost"]
    return found


def table(scores: Sequence[Scores], prompts: Sequence[str]) -> Tensor:
    """Scores as a tensor [C, B]; NaN where a prompt has no score."""
    return torch.tensor(
        [[each.get(prompt, math.nan) for prompt in prompts] for each in scores], dtype=torch.float64
    )
