"""The result of a decision: in words, and for decision.json."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rlhf.costs.price import break_even_interval, cost_of
from rlhf.decide.candidate import Candidate, State
from rlhf.evaluation.intervals import mean
from rlhf.evaluation.sampled import Sampled
from rlhf.evaluation.selection import Decision, Outcome, over_limits
from rlhf.pipeline.settings import DecideConfig
from rlhf.tracking.progress import clock

JUDGES = {"gold": "gold score", "judge": "judge's score", "rouge_l": "ROUGE-L"}
"""Score -> its words. Others are their own."""


FEW_SEALED = 10
"""About a third of 30 questions: half of those that docs/decide.md asks for at least."""


class Judgement(NamedTuple):
    """What the sealed questions say."""

    found: Decision
    looks: int
    """How often these sealed questions have judged, this time included."""
    questions: int


@dataclass(frozen=True)
class Told:
    """What can be told of a decision so far."""

    config: DecideConfig
    candidates: Mapping[str, Candidate]
    untrained: Candidate | None
    """The best option without training, once it is known."""
    winner: Candidate | None
    judgement: Judgement | None
    kind: str
    """The score that judges."""
    price: float
    """Price of the machine per hour."""
    command: str | None
    """Makes the winner at its full length."""
    model: Path | None
    """The winner's model that was judged."""

    @property
    def judge(self) -> str:
        """What judges, in words."""
        return JUDGES.get(self.kind, self.kind.replace("_", " "))

    @property
    def failed(self) -> list[Candidate]:
        """The candidates that failed, in training or before the judge."""
        return [each for each in self.candidates.values() if each.state is State.FAILED]

    def sentences(self) -> list[str]:
        """The result: the first line says what to do, the others why."""
        if self.judgement is None or self.untrained is None:
            return []
        found, untrained = self.judgement.found, self.untrained.title
        gains = {name: each.gain for name, each in found.finalists.items()}
        lines = [self.headline(self.judgement, untrained)]
        if not any(
            each.is_trained and each.state is not State.IMPOSSIBLE for each in self.candidates.values()
        ):
            lines += cannot_run(self.candidates.values())
        if self.winner is not None:
            lines += self.about(self.winner)
        elif self.untrained.gain_over_base is not None:
            gain = self.untrained.gain_over_base
            unsure = "" if gain.low > 0 else " So it is not shown to be better than that."
            lines.append(f"{untrained} over the base model: {in_words(gain)}.{unsure}")
        lines += [
            f"{self.candidates[name].title}: {in_words(gain)} over {untrained}.{self.why_not(name, found)}"
            for name, gain in gains.items()
            if name != found.winner
        ]
        lines += [
            f"{self.candidates[name].title} is refused: {self.off_limits(name, limits)}."
            for name, limits in found.refused.items()
        ]
        lines += [] if self.winner is not None else self.outside(self.untrained)
        sealed = self.judgement.questions
        if sealed < FEW_SEALED:
            lines.append(f"Only {sealed} sealed questions judged: few to stand for all others.")
        lines += [
            f"{sealed - gain.rows} of the {sealed} sealed questions do not count for "
            f"{self.candidates[name].title}: its answer or that of {untrained} has no score. If it is bad "
            "answers that have none, the gain is wrong."
            for name, gain in gains.items()
            if gain.rows < sealed
        ]
        lines += [f"{each.title} could not be judged: {each.why.rstrip('.')}." for each in self.failed]
        cut = [each for each in self.candidates.values() if each.state is State.CUT]
        if untried := [each.title for each in cut if each.chosen is None]:
            lines.append(f"Not tried at all, for lack of budget: {', '.join(untried)}. They may be better.")
        if unjudged := [f"{each.title} ({each.why})" for each in cut if each.chosen is not None]:
            lines.append(f"Not judged, for lack of budget: {', '.join(unjudged)}. They may be better.")
        if self.judgement.looks > 1:
            lines.append(
                f"These sealed questions have judged {self.judgement.looks} times. Each time the intervals "
                "are wider, because their error is halved."
            )
        return lines

    def why_not(self, name: str, found: Decision) -> str:
        """Why the finalist with the largest gain is not shipped; empty for the others, because the judgement
        compares the winner with this one only."""
        gains = {other: each.gain.value for other, each in found.finalists.items() if each.claimed}
        if self.winner is None or name != max(gains, key=lambda other: gains[other]):
            return ""
        if gains[name] <= gains[self.winner.name]:
            return ""
        return (
            f" It is not shown to be better than {self.winner.title}, which costs less: training and "
            f"decide.requests={self.config.requests:g} answers."
        )

    def headline(self, judgement: Judgement, untrained: str) -> str:
        """What to do."""
        found = judgement.found
        if self.winner is not None:
            gain = in_words(found.finalists[self.winner.name].gain)
            return (
                f"Ship {self.winner.title}: its {self.judge} is {gain} over {untrained}, the best option "
                "without training."
            )
        if found.outcome is Outcome.UNTOLD and not found.finalists:
            if self.failed:
                titles = ", ".join(each.title for each in self.failed)
                return (
                    f"It cannot be told: {titles} could not be judged, and the {self.judge} is the same for "
                    "all other answers."
                )
            return (
                f"It cannot be told: the {self.judge} is the same for every answer, "
                "so it judges nothing. Give another judge."
            )
        if found.outcome is Outcome.NO_TRAINING and not found.finalists and not found.refused:
            trains = any(each.is_trained for each in self.candidates.values())
            why = "no candidate that trains can run" if trains else "no candidate of this decision trains"
            return f"Nothing was trained: {why}. {untrained} is the best one on the choosing questions."
        if found.outcome is Outcome.NO_TRAINING and not found.finalists:
            measured = (
                any(is_measured(self.candidates[name].figures.get(figure)) for figure in limits)
                for name, limits in found.refused.items()
            )
            why = "every finalist is outside a limit"
            if not all(measured):
                why = "no finalist is known to be within its limits"
            return f"Do not train: {why}. Use {untrained}."
        if found.outcome is Outcome.NO_TRAINING:
            if found.at_most < 0:
                loss = f"{-found.at_most:.3g}"
                return f"Do not train: {untrained} is better, by at least {loss} in {self.judge}."
            return (
                f"Do not train: {untrained} is as good. No finalist gains more than {found.at_most:+.3g} in "
                f"{self.judge}, and decide.smallest_gain={self.config.smallest_gain:g}."
            )
        more = (
            f"about {found.more_questions:,} more questions would tell (a third of them is sealed)"
            if found.more_questions is not None
            else "no number of questions that anybody writes would tell"
        )
        what = f"training gains over {untrained}"
        if any(each.claimed for each in found.finalists.values()):
            what = f"the gain over {untrained} reaches decide.smallest_gain={self.config.smallest_gain:g}"
        return f"It cannot be told whether {what}: {more}. Until then, use {untrained}."

    def off_limits(self, name: str, figures: Iterable[str]) -> str:
        """Why these figures of a candidate are outside their limits."""
        return off_limits(self.candidates[name].figures, figures, self.config.limits.ranges)

    def outside(self, each: Candidate) -> Iterator[str]:
        """That an option without training is itself outside limits. What has no value for it is no reason."""
        limits = self.config.limits.ranges
        values = {figure: each.figures[figure] for figure in limits if is_measured(each.figures.get(figure))}
        over = over_limits({each.name: values}, {figure: limits[figure] for figure in values})
        if figures := over.get(each.name):
            yield f"{each.title} is itself outside: {self.off_limits(each.name, figures)}."

    def about(self, each: Candidate) -> Iterator[str]:
        """What else a user wants to know of the winner."""
        assert self.untrained is not None
        if each.gain_over_base is not None and self.untrained.config.asks != "base":
            yield f"Over the base model: {in_words(each.gain_over_base)}."
        figures = each.figures
        if (ratio := figures.get("retention_perplexity_ratio")) is not None:
            perplexity = f"Perplexity on evaluate.retention: {ratio:.3f} times the base model's"
            yield f"{perplexity} (above 1 it forgets)."
        if (change := figures.get("question_accuracy_change")) is not None:
            yield f"Its share of right answers to evaluate.retention changes by {change:+.3f}."
        if "seconds_p50" in figures:
            yield f"An answer takes {figures['seconds_p50']:.2g} s (p95: {figures['seconds_p95']:.2g} s)."
        if (requests := self.pays_off(each)) is not None:
            value, low, high = ("never" if n == math.inf else f"{math.ceil(n):,}" for n in requests[:3])
            other = self.untrained.title
            told = f"it pays off after {value} answers ({low} to {high})"
            if value == "never":
                told = f"they are no cheaper than those of {other}, so it only pays in quality"
                if low != "never":
                    told = f"whether they are cheaper than those of {other} cannot be told"
            yield (
                f"Training took {clock(each.train_seconds)}, 1,000 answers cost "
                f"{figures['cost_per_thousand']:.3g} at evaluate.price_per_hour={self.price:g}: {told}."
            )
        if self.model is None:
            yield f"The method was judged over {self.config.seeds} seeds, and not one model."
        if each.share is not None and each.share < 1:
            yield (
                f"It was trained to {percent(each.share)} of its length. The command makes it at full "
                "length; that model has not been judged."
            )

    def commands(self) -> Iterator[str]:
        """Where the winner is, and how it is made."""
        if self.model is not None:
            yield f"The model that was judged: {self.model}"
        if self.command is not None:
            yield f"Made by: {self.command}"

    def pays_off(self, each: Candidate) -> Sampled | None:
        """Number of answers after which training has paid off, against the best option without it: infinite
        if it never does, None if a cost is not known. Its interval follows from what the answers to each of
        the sealed questions that were timed cost."""
        if self.untrained is None or not each.is_trained:
            return None
        is_base = self.untrained.config.asks == "base"  # timed in the same run, so under the same load
        own, other = each.costs, each.base_costs if is_base else self.untrained.costs
        timed = [prompt for prompt in own if prompt in other]
        if not timed:
            return None
        saving = mean(torch.tensor([other[prompt] - own[prompt] for prompt in timed], dtype=torch.float64))
        setup = cost_of(each.train_seconds, self.price)
        return Sampled(*break_even_interval(setup, 0.0, saving[:3]), len(timed))

    def more(self) -> list[str]:
        """What five times the budget could still change."""
        ended = [State.FINALIST, State.WINNER, State.REFUSED]
        lines = [
            f"{each.title} was dropped for lack of budget: {each.why}."
            for each in self.candidates.values()
            if each.state is State.CUT
        ]
        lines += [
            f"{each.title} was judged at {percent(each.share)} of its length. About "
            f"{clock(each.seconds_to(1.0))} more would train it to the end."
            for each in self.candidates.values()
            if each.state in ended and each.share is not None and each.share < 1
        ]
        if self.judgement is not None and not lines:
            return [
                "Nothing was cut, so a larger budget changes nothing. More questions or training rows may."
            ]
        return lines

    def as_json(self) -> dict[str, Any]:
        """Its entries in decision.json."""
        found = None if self.judgement is None else self.judgement.found
        return {
            "outcome": None if found is None else found.outcome.value,
            "sentences": self.sentences(),
            "command": self.command,
            "artifact": None if self.model is None else str(self.model),
            "judge": self.judge,
            "smallest_gain": self.config.smallest_gain,
            "seeds": self.config.seeds,
            "untrained": None if self.untrained is None else self.untrained.name,
            "winner": None if self.winner is None else self.winner.name,
            "candidates": [
                each.as_json() | {"break_even": _requests(self.pays_off(each))}
                for each in self.candidates.values()
            ],
            "more": self.more(),
        }


def _requests(found: Sampled | None) -> dict[str, float | str] | None:
    """A number of answers with its interval; "never", because JSON knows no infinity."""
    if found is None:
        return None
    return {key: "never" if value == math.inf else value for key, value in found._asdict().items()}


def cannot_run(candidates: Iterable[Candidate]) -> list[str]:
    """Which candidates cannot run, and the first sentence of each reason, once."""
    by_reason = dict[str, list[str]]()
    for each in candidates:
        if each.state is State.IMPOSSIBLE:
            by_reason.setdefault(each.why.partition(". ")[0].rstrip("."), []).append(each.title)
    return [f"{'; '.join(titles)} cannot run: {reason}." for reason, titles in by_reason.items()]


def in_words(gain: Sampled) -> str:
    """A gain with its interval and the number of questions."""
    return f"{gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f}, {gain.rows} sealed questions)"


def off_limits(
    values: Mapping[str, float], figures: Iterable[str], limits: Mapping[str, tuple[float, float]]
) -> str:
    """Why these figures are outside their limits.

    Args:
        limits: figure -> lowest and highest allowed value.
    """
    return "; ".join(off_limit(figure, values.get(figure), limits[figure]) for figure in figures)


def is_measured(value: float | None) -> bool:
    """Whether a figure has a value."""
    return value is not None and not math.isnan(value)


def off_limit(figure: str, value: float | None, limit: tuple[float, float]) -> str:
    """Why a figure refuses a candidate, with the digits that show that it is outside.

    Args:
        limit: lowest and highest allowed value.
    """
    if value is None or math.isnan(value):
        return f"{figure} was not measured"
    least, most = limit
    texts = [f"{value:.{digits}g}" for digits in range(3, 18)]
    text = next((each for each in texts if not least <= float(each) <= most), texts[-1])
    return f"{figure} is {text}, {f'at least {least:g}' if value < least else f'at most {most:g}'}"


def percent(share: float | None) -> str:
    """A share in percent."""
    return f"{100 * (share or 0.0):.3g}%"
