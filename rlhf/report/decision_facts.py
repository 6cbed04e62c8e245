"""The figures of a decision in words: its candidates in order, and their table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from rlhf.printable import duration
from rlhf.report.page.collect import Table, cleaned
from rlhf.report.page.drawings import plain
from rlhf.tracking.tables import Cells

Decision = Mapping[str, Any]
"""The content of decision.json."""
Candidate = Mapping[str, Any]
"""One of its candidates."""
HEADLINES = {
    "ship": "Ship the winner.",
    "no training": "No training is worth it.",
    "cannot be told": "It cannot be told.",
}
"""Outcome -> the headline of a decision without sentences."""
STATES = (
    "winner", "finalist", "no finalist", "running", "late", "compared", "worse", "cut", "waiting",
    "refused",
    "cannot run", "failed",
)  # fmt: skip
"""States of a candidate, in the order of the table."""


class Cell(NamedTuple):
    """A cell of the table of candidates."""

    text: str
    """Empty if nothing is known."""
    more: str = ""
    """A second line: an interval, or another figure."""

    def __str__(self) -> str:
        return f"{self.text} ({self.more})" if self.more else self.text


class Estimate(NamedTuple):
    """A value and its interval."""

    value: float
    low: float | None
    high: float | None


def known(value: float | None) -> float | None:
    """A finite value; else None."""
    return value if value is not None and math.isfinite(value) else None


def estimate_of(given: Mapping[str, Any] | None) -> Estimate | None:
    """An estimate; None if its value is not finite, without ends if one of them is not."""
    if given is None or known(given["value"]) is None:
        return None
    low, high = known(given["low"]), known(given["high"])
    ends = (low, high) if low is not None and high is not None else (None, None)
    return Estimate(given["value"], *ends)


def sentences(decision: Decision) -> list[str]:
    """The result in words."""
    given = [each for each in decision["sentences"] if each]
    not_yet = "Not decided." if decision["ended"] else "Not decided yet."
    return given or [HEADLINES.get(decision["outcome"] or "", not_yet)]


def budget_words(decision: Decision) -> str:
    """How much of the budget is spent."""
    seconds, spent = (known(decision["budget"][key]) for key in ("seconds", "spent"))
    if seconds is None or spent is None:
        return "" if seconds is None else duration(seconds)
    return f"{duration(spent)} of {duration(seconds)} spent"


def counts_of(decision: Decision) -> str:
    """How many candidates are in each state."""
    names = [state_words(each) for each in ranking(decision)]
    counts = {name: names.count(name) for name in dict.fromkeys(names)}
    plural = {name: f"{name}s" for name in ("winner", "finalist") if counts.get(name, 0) > 1}
    counted = ", ".join(f"{count} {plural.get(name, name)}" for name, count in counts.items())
    return f"{len(names)} candidate{'' if len(names) == 1 else 's'}: {counted}." if names else ""


def ranking(decision: Decision) -> list[Candidate]:
    """The candidates: the winner first, then by state, then by gain or quality."""

    def place(candidate: Candidate) -> tuple[bool, int, float]:
        state = STATES.index(candidate["state"]) if candidate["state"] in STATES else len(STATES)
        value = estimate_of(candidate["gain"]) or estimate_of(candidate["quality"])
        return candidate["name"] != decision["winner"], state, math.inf if value is None else -value.value

    return sorted(decision["candidates"], key=place)


def state_words(candidate: Candidate) -> str:
    """A candidate's state as the table calls it."""
    return "untrained" if candidate["state"] == "compared" else str(candidate["state"])


def reasons(decision: Decision, candidate: Candidate) -> list[str]:
    """Why a candidate is in its state, and which limits it breaks."""
    limits = ", ".join(name.replace("_", " ") for name in candidate["limits_over"])
    best = candidate["name"] == decision["untrained"] and candidate["state"] != "winner"
    lines = [
        "the best without training" if best else "",
        candidate["why"],
        f"over its limit: {limits}" if limits and candidate["state"] != "refused" else "",
    ]
    return [line for line in lines if line]


def columns_of(decision: Decision) -> dict[str, Callable[[Candidate], Cell]]:
    """Heading -> what makes its cell. Only columns for which a candidate has a value."""
    places = decimals(decision["smallest_gain"])
    made: dict[str, Callable[[Candidate], Cell]] = {
        "trained": lambda each: Cell(share_words(each["share"])),
        "quality": lambda each: _quality(decision, each, f"z.{places}f"),
        "gain": lambda each: interval_cell(each["gain"], f"+z.{places}f"),
        "forgets": _forgotten,
        "latency": _latency,
        "cost of 1000": lambda each: Cell(_text(each["cost_per_thousand"], plain)),
        "training": lambda each: Cell(_text(each["train_seconds"], duration)),
    }
    return {
        heading: partial(_dashed, make)
        for heading, make in made.items()
        if any(make(each).text for each in decision["candidates"])
    }


def _quality(decision: Decision, candidate: Candidate, form: str) -> Cell:
    cell, questions = interval_cell(candidate["quality"], form), decision["questions"]["choosing"]
    rows = known(candidate["quality"]["rows"]) if candidate["quality"] else None
    if rows is None or not questions or rows >= questions:
        return cell
    return cell._replace(more=f"{cell.more}, {rows:g} of {questions} questions".removeprefix(", "))


def _dashed(make: Callable[[Candidate], Cell], candidate: Candidate) -> Cell:
    cell = make(candidate)
    return cell if cell.text else Cell("-")


def details_of(decision: Decision) -> Table | None:
    """The figures that the first table leaves out; None if there are none."""
    places = decimals(decision["smallest_gain"])

    made: dict[str, Callable[[Candidate], str]] = {
        "gain over base": lambda each: str(interval_cell(each["gain_over_base"], f"+z.{places}f")),
        "answer length": lambda each: _text(each["length_ratio"], lambda ratio: f"{ratio:.2f} of base"),
        "ends by itself": lambda each: share_words(each["stop_rate"]),
        "peak memory": lambda each: _text(each["memory_bytes"], lambda size: f"{size / 1e6:,.0f} MB"),
        "pays off after (answers)": lambda each: _pays_off(each["break_even"]),
    }
    ranked = ranking(decision)
    kept = {heading: make for heading, make in made.items() if any(make(each) for each in ranked)}
    rows = [[each["title"], *(make(each) or "-" for make in kept.values())] for each in ranked]
    return Table(["candidate", *kept], rows) if kept else None


def _pays_off(given: Mapping[str, Any] | None) -> str:
    """After how many answers training has paid off, with the interval. Each end may be "never"."""
    if given is None:
        return ""
    ends = (given[key] for key in ("value", "low", "high"))
    value, low, high = (end if isinstance(end, str) else f"{math.ceil(end):,}" for end in ends)
    return value if value == low == high else f"{value} ({low} to {high})"


def decision_cells(decision: Decision) -> Cells:
    """The table of candidates for a terminal: one row each."""
    decision = cleaned(dict(decision))
    columns, rows = columns_of(decision), []
    for each in ranking(decision):
        why = "; ".join(reasons(decision, each))
        state = f"{state_words(each)}: {why}" if why else state_words(each)
        texts = [each["title"], state, *(str(make(each)) for make in columns.values())]
        rows.append([" ".join(text.split()) for text in texts])
    return Cells(["candidate", "state", *columns], rows)


def decimals(smallest_gain: float | None) -> int:
    """Digits after the point that show a tenth of the smallest gain worth having."""
    if not smallest_gain or not math.isfinite(smallest_gain):
        return 3
    return min(4, max(1, 1 - math.floor(math.log10(abs(smallest_gain)) + 1e-9)))


def interval_cell(given: Mapping[str, Any] | None, form: str) -> Cell:
    """An estimate with its interval on a second line."""
    estimate = estimate_of(given)
    if estimate is None:
        return Cell("")
    value, low, high = estimate
    ends = "" if low is None or high is None else f"{format(low, form)} to {format(high, form)}"
    return Cell(format(value, form), ends)


def share_words(value: float | None) -> str:
    """A share in percent; empty if it is not known."""
    return _text(value, lambda share: f"{100 * share:.3g}%")


def _text(value: float | None, make: Callable[[float], str]) -> str:
    finite = known(value)
    return "" if finite is None else make(finite)


def _latency(candidate: Candidate) -> Cell:
    return _joined(
        _text(candidate["seconds_p50"], duration),
        _text(candidate["seconds_p95"], lambda seconds: f"p95 {duration(seconds)}"),
    )


def _forgotten(candidate: Candidate) -> Cell:
    """How much worse it got on general texts, and how many more or fewer questions it knows."""
    return _joined(
        _text(
            candidate["retention_perplexity_ratio"], lambda ratio: f"perplexity {100 * (ratio - 1):+z.1f}%"
        ),
        _text(candidate["question_accuracy_change"], lambda change: f"accuracy {100 * change:+z.1f}%"),
    )


def _joined(*texts: str) -> Cell:
    return Cell(*([text for text in texts if text] or [""]))


def titles_of(candidates: Sequence[Candidate]) -> dict[str, str]:
    """Name -> title."""
    return {each["name"]: each["title"] for each in candidates}
