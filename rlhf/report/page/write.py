"""report.html: one file that needs no network, made from a run's files. `watch` serves the same page.

What a model wrote is untrusted: Jinja2 escapes it, in JSON no `<` stands as it is, and the page's policy lets
only its own script and style run, by their digests.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FunctionLoader, StrictUndefined

from rlhf.disk import naming, replace_text
from rlhf.report.page.collect import (
    COMPARED,
    FORGOTTEN,
    SHOWN_CURVES,
    RunFacts,
    StageFacts,
    Table,
    calibrations,
    over_kl,
    over_length,
    policy_table,
    read_run,
    stage_charts,
)
from rlhf.report.page.curves import Chart, points_each
from rlhf.tracking.position import read_position
from rlhf.tracking.progress import clock

NAME = "report.html"
OUTCOMES = {
    "worked": "It worked.",
    "did not work": "It did not work.",
    "cannot be told": "Whether it worked cannot be told.",
}
NOT_ENDED = "This run has not ended."
EARLY = {"failed": "failed", "stopped": "was stopped"}
"""How a run ended -> in words."""
ROW = 60
"""Height of a row of the lineage, in pixels; page.css has the same."""


def unended(run: RunFacts) -> str:
    """Of a run without a verdict: where it ended early, or that it goes on."""
    ended = read_position(run.directory).get("ended")
    if ended not in EARLY:
        return NOT_ENDED
    there = [f"in {stage.name}" for stage in run.stages if stage.status == ended]
    done = [f"after {stage.name}" for stage in run.stages if stage.status in ("ran", "reused")]
    return f"It {EARLY[ended]} {(there or done or ['at its start'])[-1]}."


class Strip(NamedTuple):
    """A gate drawn: places from 0 to 100."""

    healthy: tuple[float, float]
    interval: tuple[float, float] | None
    value: float


class Placed(NamedTuple):
    """A chart of the page, under the name that the script knows it by."""

    id: str
    chart: Chart


@dataclass
class Charts:
    """All charts of a page, numbered."""

    placed: list[Placed] = field(default_factory=list)

    def add(self, chart: Chart) -> Placed:
        """One more; the ids are the same when the page is made again, as long as its charts are."""
        found = Placed(f"chart-{len(self.placed)}", chart)
        self.placed.append(found)
        return found

    def as_json(self) -> dict[str, Any]:
        """id -> what the script draws."""
        most = points_each(each.chart for each in self.placed)
        return {each.id: each.chart.as_json(most) for each in self.placed}


@dataclass(frozen=True)
class Live:
    """What `watch` knows of a run beside its files."""

    word: str
    """running, done, failed, stopped, dead or silent."""
    lines: Sequence[str]
    stamp: str
    """Of the files: the page asks again with it."""


class RunLine(NamedTuple):
    """One run in a list."""

    name: str
    address: str
    word: str
    written: str
    stages: str
    said: str


def list_page(title: str, rows: Sequence[RunLine], live: Live) -> str:
    """A list of runs with links to their pages."""
    blocks: dict[str, Any] = {"title": title, "rows": rows, "live": live}
    return page("list.html", blocks, {"charts": {}, "answers": {}}, live=True)


def write_page(directory: Path) -> Path:
    """Write report.html beside the run's other files: of a run of stage=report, the page that it made.

    Raises:
        OSError: it cannot be written, or a file of the run cannot be read.
    """
    path, made = directory / NAME, directory / "artifacts" / "report" / NAME
    with naming(path):
        text = made.read_text(encoding="utf-8") if made.is_file() else run_page(read_run(directory))
        replace_text(path, text)
    return path


def run_page(run: RunFacts, live: Live | None = None) -> str:
    """The whole page of one run."""
    charts = Charts()
    curves = []
    for stage in run.stages:
        placed = [charts.add(chart) for chart in stage_charts(run, stage.name)]
        if placed:
            curves.append((stage.name, placed[:SHOWN_CURVES], placed[SHOWN_CURVES:]))
    kl, length = over_kl(run), over_length(run)
    failed = [gate for gate in run.gates if gate["outcome"] == "failed"]
    blocks: dict[str, Any] = {
        "title": f"Run {run.name}",
        "headline": OUTCOMES.get(run.outcome or "", unended(run) if run.verdict is None else "The verdict"),
        "mood": (run.outcome or "").replace(" ", "-"),
        "run": run,
        "live": live,
        "failed": failed,
        "lineage": lineage(run.stages),
        "gates": [(gate, strip(gate)) for gate in run.gates],
        "curves": curves,
        "over_kl": kl and charts.add(kl),
        "over_length": length and (charts.add(length[0]), length[1]),
        "calibrations": [(name, charts.add(chart)) for name, chart in calibrations(run)],
        "policies": policy_table(run, COMPARED),
        "forgetting": policy_table(run, FORGOTTEN),
        "cost": cost_of(run),
    }
    return page(
        "run.html", blocks, {"charts": charts.as_json(), "answers": run.answers}, live=live is not None
    )


def page(template: str, blocks: Mapping[str, Any], data: Mapping[str, Any], *, live: bool) -> str:
    """A whole page.

    Args:
        blocks: what the template reads.
        data: what the script reads: `charts` and `answers`.
        live: whether it may ask the server that it came from for more.
    """
    script, style = _file("uPlot.iife.min.js") + _file("page.js"), _file("uPlot.min.css") + _file("page.css")
    connect = "connect-src 'self'; " if live else ""
    policy = (
        f"default-src 'none'; {connect}script-src '{_digest(script)}'; style-src '{_digest(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return _templates().get_template(template).render(
        **blocks, policy=policy, script=script, style=style, data=embedded(data), row=ROW
    )  # fmt: skip


def embedded(data: Any) -> str:
    """JSON that can stand in a script element: nothing in it ends the element or a line."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


@cache
def _templates() -> Environment:
    made = Environment(
        loader=FunctionLoader(_file), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    made.filters |= {"clock": clock, "number": number}
    return made


@cache
def _file(name: str) -> str:
    return (resources.files("rlhf.report.page") / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def number(value: float | None) -> str:
    """A figure as a reader wants it; a dash for one that is not finite."""
    return "-" if value is None else f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:.4g}"


class Row(NamedTuple):
    """A stage in the lineage."""

    stage: StageFacts
    share: float
    """Of the longest stage's time, in percent."""
    arcs: list[str]
    """SVG paths from what it reads."""


def lineage(stages: Sequence[StageFacts]) -> list[Row]:
    """The stages one below the other, with an arc to each from all that it reads."""
    places = {stage.name: place for place, stage in enumerate(stages)}
    longest = max((stage.took or 0.0 for stage in stages), default=0.0)
    rows = []
    for stage in stages:
        arcs = [arc(places[name], places[stage.name]) for name in stage.reads if name in places]
        rows.append(Row(stage, 100 * (stage.took or 0.0) / longest if longest else 0.0, arcs))
    return rows


def arc(start: int, end: int) -> str:
    """The path of an arc at the left of two rows; the farther they are apart, the wider it is."""
    top, bottom, right = start * ROW + ROW / 2, end * ROW + ROW / 2, 92.0
    left = right - min(84.0, 10.0 + 14.0 * (end - start))
    return f"M {right:g} {top:g} C {left:g} {top:g} {left:g} {bottom - 6:g} {right - 5:g} {bottom - 6:g}"


def strip(gate: Mapping[str, Any]) -> Strip | None:
    """A gate's figure beside its bound; None where a figure is missing."""
    value, low, high = gate["value"], gate["low"], gate["high"]
    least, most = gate.get("min"), gate.get("max")
    known = [each for each in (value, low, high, least, most) if each is not None]
    if value is None or (least is None and most is None):
        return None
    start, end = min(known), max(known)
    margin = 0.15 * ((end - start) or abs(end) or 1.0)
    start, end = start - margin, end + margin

    def place(figure: float) -> float:
        return round(float(100 * (figure - start) / (end - start)), 2)

    healthy = (0.0 if least is None else place(least), 100.0 if most is None else place(most))
    interval = None if low is None or high is None else (place(low), place(high))
    return Strip(healthy, interval, place(value))


def cost_of(run: RunFacts) -> Table | None:
    """Time, memory and hardware of each stage; money where its price is known."""
    rows = []
    for stage in run.stages:
        if stage.took is None:
            continue
        ranks = hardware_ranks(stage.hardware)
        money = [f"{stage.took / 3600 * ranks * run.price:,.2f}"] if run.price is not None else []
        rows.append([
            stage.name,
            clock(stage.seconds) if stage.status == "ran" else stage.status,
            clock(stage.took),
            "-" if stage.peak_gib is None else f"{stage.peak_gib:.2f}",
            *money,
            stage.hardware or "-",
            stage.made or "-",
            stage.revision or "-",
        ])  # fmt: skip
    money = ["price"] if run.price is not None else []
    headings = [
        "stage",
        "in this run",
        "to make it",
        "peak memory, GiB",
        *money,
        "made on",
        "made",
        "revision",
    ]
    return Table(headings, rows) if rows else None


def hardware_ranks(text: str) -> int:
    """How many ranks a manifest's line of hardware names."""
    words = text.rpartition(", ")[2].split()
    return int(words[0]) if len(words) == 2 and words[1] == "ranks" and words[0].isdigit() else 1
