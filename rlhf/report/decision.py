"""The page of a decision: which way to tune a model, if any, is worth it. Made from decision.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import quote

from rlhf.printable import duration
from rlhf.report.decision_facts import (
    Cell,
    Decision,
    budget_words,
    columns_of,
    counts_of,
    decision_cells,
    details_of,
    known,
    ranking,
    reasons,
    sentences,
    share_words,
    state_words,
    titles_of,
)
from rlhf.report.decision_pictures import Strip, picture_of, strips_of, timeline_of
from rlhf.report.page.collect import cleaned
from rlhf.report.page.size import Limits, clipped, first_of, fitting, html_bytes
from rlhf.report.page.write import large_page, page

MOODS = {"ship": "worked", "no training": "settled", "cannot be told": "cannot-be-told"}
"""Outcome -> its class in page.css."""
MARKS = {
    "winner": "passed", "finalist": "finalist", "running": "running", "cut": "stopped", "refused": "stopped",
    "cannot run": "stopped", "failed": "failed",
}  # fmt: skip
"""State -> the class of its mark in page.css."""
ENDS = {"done": "passed", "stopped": "stopped", "failed": "failed"}
"""How a pilot ended -> the class of its mark in page.css."""
TEXTS = ("sentences", "more")
"""Keys of lists of texts."""
CANDIDATE_BYTES = 4_000
"""Bytes of a candidate's HTML elements in the table and in the pictures, without its texts."""
PILOT_BYTES = 1_500
"""Bytes of a pilot's HTML elements in the list and in the pictures, without its texts."""


class Row(NamedTuple):
    """A candidate in the table."""

    title: str
    state: str
    mark: str
    """Class of the state's mark."""
    is_winner: bool
    lines: list[str]
    """Why it is in this state."""
    cells: list[tuple[str, Cell, Strip | None]]
    """Heading, text and drawing of each cell."""


class PilotLine(NamedTuple):
    """A pilot in the list."""

    run: str
    address: str
    """Of its page; empty if it has no run."""
    candidate: str
    trained: str
    questions: str
    seed: str
    took: str
    predicted: str
    ended: str
    mark: str


def decision_page(decision: Mapping[str, Any]) -> str:
    """The page of a decision as HTML, finished or not. It lies in the decision's run directory.

    Args:
        decision: the content of decision.json.
    """
    decision = cleaned(dict(decision))
    title = f"Decision {decision['name']}"
    return fitting(partial(_page, decision, title), lambda: large_page(title))


def decision_markdown(decision: Mapping[str, Any]) -> str:
    """The decision as Markdown: the result in words, the command, and the table of candidates.

    Args:
        decision: the content of decision.json.
    """
    decision = cleaned(dict(decision))
    headline, *others = sentences(decision)
    parts = [f"**{headline}**", *others]
    if decision["command"]:
        fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall("`+", decision["command"]))])
        parts.append(f"{fence}\n{decision['command']}\n{fence}")
    cells = decision_cells(decision)
    parts += [cells.markdown()] if cells.rows else []
    if decision["more"]:
        parts.append("\n".join(["What more budget could change:", "", *(f"- {x}" for x in decision["more"])]))
    return "\n\n".join(parts) + "\n"


def _page(decision: Decision, title: str, limits: Limits) -> str:
    whole, decision = decision, within(decision, limits)
    headline, *others = sentences(decision)
    details = details_of(decision)
    blocks: dict[str, Any] = {
        "title": title,
        "live": None,
        "decision": decision,
        "headline": headline,
        "sentences": others,
        "mood": MOODS.get(decision["outcome"] or "", ""),
        "spent": spent_percent(decision),
        "budget": budget_words(decision),
        "ended": decision["ended"],
        "facts": facts_of(decision),
        "counts": counts_of(whole),
        "headings": list(columns_of(decision)),
        "rows": rows_of(decision),
        "details": details and details.within(limits),
        "picture": picture_of(decision),
        "timeline": timeline_of(decision),
        "pilots": pilots_of(decision),
        "left_out_counts": {
            key: len(whole[key]) - len(decision[key]) for key in ("candidates", "pilots", "more")
        },
    }
    return page("decision.html", blocks, {"charts": {}, "answers": {}}, live=False)


def within(decision: Decision, limits: Limits) -> Decision:
    """The decision with what fits on the page: the best candidates, the first pilots, texts cut off."""
    cut = _clipped(decision, limits.characters)
    ranked = first_of(ranking(cut), 2 * limits.rows, lambda each: CANDIDATE_BYTES + 5 * _bytes(each))
    pilots = first_of(cut["pilots"], 2 * limits.rows, lambda each: PILOT_BYTES + 4 * _bytes(each))
    lists = {key: first_of(cut[key], limits.rows, lambda text: html_bytes([text])) for key in TEXTS}
    return {**cut, "candidates": ranked, "pilots": pilots, **lists}


def _bytes(item: Mapping[str, Any]) -> int:
    return html_bytes([str(value) for value in item.values()], 0)


def _clipped(value: Any, most: int) -> Any:
    if isinstance(value, str):
        return clipped(value, most)
    if isinstance(value, Mapping):
        return {key: _clipped(item, most) for key, item in value.items()}
    return [_clipped(item, most) for item in value] if isinstance(value, list) else value


def spent_percent(decision: Decision) -> float | None:
    """How much of the budget is spent, in percent; None if that is not known."""
    seconds, spent = (known(decision["budget"][key]) for key in ("seconds", "spent"))
    return None if not seconds or spent is None else round(min(100.0, 100 * spent / seconds), 1)


def facts_of(decision: Decision) -> list[tuple[str, str]]:
    """What the decision rests on: (name, value)."""
    choosing, sealed = (decision["questions"][key] for key in ("choosing", "sealed"))
    counts = [
        f"{count:,} {what}" for count, what in ((choosing, "choose"), (sealed, "sealed")) if count is not None
    ]
    gain, seeds = known(decision["smallest_gain"]), decision["seeds"]
    facts = {
        "Judge": decision["judge"] or "",
        "Questions": ", ".join(counts),
        "Gain worth having": "" if gain is None else f"at least {gain:g}",
        "Seeds": "" if seeds is None else str(seeds),
        "Budget": budget_words(decision),
    }
    return [(name, value) for name, value in facts.items() if value]


def rows_of(decision: Decision) -> list[Row]:
    """The table of candidates, the winner first."""
    columns, strips = columns_of(decision), strips_of(decision)
    rows = []
    for each in ranking(decision):
        cells = [
            (heading, make(each), strips.get(each["name"]) if heading == "gain" else None)
            for heading, make in columns.items()
        ]
        is_winner, mark = each["name"] == decision["winner"], MARKS.get(each["state"], "")
        rows.append(Row(each["title"], state_words(each), mark, is_winner, reasons(decision, each), cells))
    return rows


def pilots_of(decision: Decision) -> list[PilotLine]:
    """The pilots, in the order in which they began."""
    titles, lines = titles_of(decision["candidates"]), []
    for each in decision["pilots"]:
        ended = each["ended"] or "running"
        seconds, predicted = known(each["seconds"]), known(each["predicted"])
        lines.append(PilotLine(
            run=each["run"] or "-",
            address=f"../{quote(each['run'])}/report.html" if each["run"] else "",
            candidate=titles.get(each["candidate"], each["candidate"]),
            trained=share_words(each["share"]) or "-",
            questions=each["part"],
            seed="-" if each["seed"] is None else str(each["seed"]),
            took="-" if seconds is None else duration(seconds),
            predicted="-" if predicted is None else duration(predicted),
            ended=ended,
            mark=ENDS.get(ended, "running"),
        ))  # fmt: skip
    return lines
