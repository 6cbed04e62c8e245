"""The pictures of a decision: quality over cost, gains, and the budget as a timeline."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

from rlhf.printable import duration
from rlhf.report.decision_facts import (
    Candidate,
    Decision,
    decimals,
    estimate_of,
    known,
    ranking,
    share_words,
    titles_of,
)
from rlhf.report.page.drawings import Point, Scatter, Span, Timeline, plain, scatter, timeline
from rlhf.report.pareto import Point as Trial
from rlhf.report.pareto import pareto_front

SIZES = (("wide", 860.0, 400.0), ("narrow", 350.0, 400.0))
"""Class, width and height of each drawing; page.css shows the one that suits the window."""
DROPPED = ("worse", "cut", "refused", "cannot run", "failed")
"""States of candidates that are drawn paler."""
MIN_COST_SHARE = 0.5
"""Share of the candidates that need a cost. With fewer, the picture shows training time."""
COST = ("Quality over cost", "Better is higher, cheaper is further left.", "cost of 1000 answers")
TIME = ("Quality over training time", "Better is higher, less training is further left.", "training time")
"""Heading, note and axis of the picture."""
MAX_POINTS = 40
"""Most points of a picture."""


class Picture(NamedTuple):
    """Quality over cost."""

    drawings: list[tuple[str, Scatter]]
    """Class and drawing for each width of a window."""
    heading: str
    note: str
    """How to read it."""
    x: str
    y: str
    alt_text: str
    looks: set[str]
    """Classes of the points, for the legend."""
    missing: list[str]
    """Titles of the candidates that are not drawn."""


class Strip(NamedTuple):
    """A gain on the scale that all candidates share: positions from 0 to 100."""

    zero: float
    worth: float | None
    """Where a gain is worth having."""
    value: float
    interval: tuple[float, float] | None


class Budget(NamedTuple):
    """The budget as a timeline."""

    drawings: list[tuple[str, Timeline]]
    alt_text: str
    looks: set[str]


def picture_of(decision: Decision) -> Picture | None:
    """Quality over cost; None if no candidate has both."""
    measured = [each for each in ranking(decision) if estimate_of(each["quality"])]
    with_cost = [each for each in measured if known(each["cost_per_thousand"]) is not None]
    is_time = len(with_cost) <= MIN_COST_SHARE * len(measured)
    points = {
        each["name"]: _point(decision, each, cost)
        for each in measured
        if (cost := _training(each) if is_time else known(each["cost_per_thousand"])) is not None
    }
    drawn = dict(list(points.items())[:MAX_POINTS])
    if not drawn:
        return None
    trials = pareto_front([Trial(name, point.y, point.x) for name, point in drawn.items()])
    best, gain = points.get(decision["untrained"] or ""), known(decision["smallest_gain"])
    threshold = best.y + gain if best is not None and gain is not None else None
    values, front = list(drawn.values()), [drawn[each.name] for each in trials]
    place = partial(scatter, values, front, threshold=threshold, is_time=is_time)
    drawings = [(look, place(size=(width, height))) for look, width, height in SIZES]
    places = decimals(decision["smallest_gain"])
    told = [
        f"{point.title} {point.y:z.{places}f} at {duration(point.x) if is_time else plain(point.x)}"
        for point in values
    ]
    missing = [title for name, title in titles_of(decision["candidates"]).items() if name not in drawn]
    heading, note, x = TIME if is_time else COST
    looks = {look for point in values for look in point.look.split()}
    alt_text = f"{heading}: {'; '.join(told)}."
    return Picture(drawings, heading, note, x, decision["judge"], alt_text, looks, missing)


def _training(candidate: Candidate) -> float | None:
    return known(candidate["train_seconds"]) if candidate["trained"] else 0.0


def _point(decision: Decision, candidate: Candidate, x: float) -> Point:
    quality = estimate_of(candidate["quality"])
    assert quality is not None
    looks = ["trained" if candidate["trained"] else "untrained"]
    if candidate["name"] == decision["winner"]:
        looks.append("winner")
    elif candidate["state"] in DROPPED:
        looks.append("dropped")
    return Point(candidate["title"], x, *quality, " ".join(looks))


def strips_of(decision: Decision) -> dict[str, Strip]:
    """Candidate -> the drawing of its gain, for those that have one."""
    gains = {each["name"]: gain for each in decision["candidates"] if (gain := estimate_of(each["gain"]))}
    worth = known(decision["smallest_gain"])
    ends = [end for gain in gains.values() for end in gain if end is not None]
    ends += [0.0, *([] if worth is None else [worth])]
    margin = 0.12 * (max(ends) - min(ends)) or 1.0
    low, high = min(ends) - margin, max(ends) + margin

    def place(value: float) -> float:
        return round(100 * (value - low) / (high - low), 2)

    return {
        name: Strip(
            place(0.0),
            None if worth is None else place(worth),
            place(gain.value),
            None if gain.low is None or gain.high is None else (place(gain.low), place(gain.high)),
        )
        for name, gain in gains.items()
    }


def timeline_of(decision: Decision) -> Budget | None:
    """The pilots over time; None if none has begun."""
    has_ended = decision["outcome"] is not None
    budget, spent = (known(decision["budget"][key]) for key in ("seconds", "spent"))
    now = None if has_ended else spent
    titles = titles_of(ranking(decision))
    rows: dict[str, list[Span]] = {}
    for pilot in decision["pilots"]:
        if known(pilot["start"]) is not None:
            rows.setdefault(pilot["candidate"], []).append(_span(decision, pilot, titles, now))
    if not rows:
        return None
    order = [*titles, *(name for name in rows if name not in titles)]
    lines = [(titles.get(name, name), rows[name]) for name in order if name in rows]
    drawings = [(look, timeline(lines, width=width, budget=budget, now=now)) for look, width, _ in SIZES]
    told = "; ".join(span.title for _, spans in lines for span in spans)
    looks = {look for _, spans in lines for span in spans for look in span.look.split()}
    return Budget(drawings, f"Pilots over time: {told}.", looks)


def _span(decision: Decision, pilot: Mapping[str, Any], titles: Mapping[str, str], now: float | None) -> Span:
    seconds, start = known(pilot["seconds"]), pilot["start"]
    if seconds is None:
        seconds = max(0.0, (now or start) - start)
    ended = pilot["ended"] or "running"
    looks = ["sealed" if pilot["part"] == "sealed" else "choosing", *([ended] if ended != "done" else [])]
    texts = ["sealed" if pilot["part"] == "sealed" else share_words(pilot["share"])]
    if (decision["seeds"] or 1) > 1 and pilot["seed"] is not None:
        texts.insert(0, f"{texts[0]} #{pilot['seed']}".strip())
    title = f"{titles.get(pilot['candidate'], pilot['candidate'])}, {pilot_words(pilot)}: {duration(seconds)}"
    return Span(start, seconds, " ".join(looks), texts, f"{title}{'' if ended == 'done' else f', {ended}'}")


def pilot_words(pilot: Mapping[str, Any]) -> str:
    """Length and questions of a pilot."""
    share = share_words(pilot["share"])
    return ", ".join([*([f"{share} of its length"] if share else []), f"{pilot['part']} questions"])
