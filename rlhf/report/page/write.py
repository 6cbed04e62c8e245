"""report.html: one file that needs no network, made from a run's files. `watch` serves the same page.

What a model wrote is untrusted: Jinja2 escapes it, in JSON no `<` stands as it is, and the page's policy lets
only its own script and style run, by their digests.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from rlhf.disk import naming, replace_text
from rlhf.pipeline.run import NO_VERDICT, OUTCOMES
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
from rlhf.report.page.curves import FEWEST_POINTS, Chart, points_each
from rlhf.report.page.size import Limits, clipped, embedded, first_of, fitting, html_bytes, json_bytes
from rlhf.tracking.position import read_position
from rlhf.tracking.progress import clock

NAME = "report.html"
NOT_ENDED = "This run has not ended."
EARLY = {"failed": "failed", "stopped": "was stopped"}
"""How a run ended -> in words."""
DOCS = Path(__file__).resolve().parents[3] / "docs"
PAGE = re.compile(r"(docs/[\w/-]+\.md)")
ROW = 60
"""Height of a row of the lineage, in pixels; page.css has the same."""
CHART = 800
"""Bytes of a chart's elements, without their texts."""


def headline(run: RunFacts) -> str:
    """Of a run without an outcome."""
    if run.verdict is None:
        return unended(run)
    return "The verdict" if run.verdict else NO_VERDICT


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


class Panel(NamedTuple):
    """The charts of a stage."""

    stage: str
    first: list[Placed]
    more: list[Placed]
    """One click away."""
    left_out: int
    """How many are not on the page."""


class Charts:
    """The charts of a page, numbered, and those of them that it has room for.

    Args:
        beside: charts of no stage; None is left out.
        stages: each stage's charts, those first that tell most.
        limit: bytes of all. Over it curves get fewer points, then those charts are left out that tell least.
    """

    def __init__(
        self, beside: Iterable[Chart | None], stages: Sequence[tuple[str, Sequence[Chart]]], limit: int
    ) -> None:
        self._stages = stages
        order = [(place, chart) for _, charts in stages for place, chart in enumerate(charts)]
        order += [(-1, chart) for chart in beside if chart is not None]
        self._ids = {id(chart): f"chart-{number}" for number, (_, chart) in enumerate(order)}
        charts = [chart for _, chart in sorted(order, key=lambda each: each[0])]
        self.points = points_each(charts)
        """Of a curve, at most."""
        while True:
            kept = first_of(charts, limit, self._bytes)
            if len(kept) == len(charts) or self.points <= FEWEST_POINTS:
                break
            self.points = max(FEWEST_POINTS, self.points // 2)
        known = {id(chart) for chart in kept}
        self._kept = {
            name: chart
            for (_, chart), name in zip(order, self._ids.values(), strict=True)
            if id(chart) in known
        }
        longest = (len(curve.x) for chart in kept for curve in chart.curves)
        self.is_thinned = max(longest, default=0) > self.points

    def _bytes(self, chart: Chart) -> int:
        return (
            json_bytes(chart.as_json(self.points)) + html_bytes([*4 * [chart.title], chart.said], 0) + CHART
        )

    def placed(self, chart: Chart | None) -> Placed | None:
        """A chart with its id; None where it is not on the page."""
        name = self._ids.get(id(chart), "")
        return Placed(name, self._kept[name]) if name in self._kept else None

    def panels(self) -> list[Panel]:
        """The stages that have charts."""
        found = []
        for stage, charts in self._stages:
            placed = [each for each in map(self.placed, charts) if each is not None]
            left_out = len(charts) - len(placed)
            if charts:
                found.append(Panel(stage, placed[:SHOWN_CURVES], placed[SHOWN_CURVES:], left_out))
        return found

    def as_json(self) -> dict[str, Any]:
        """id -> what the script draws."""
        return {name: chart.as_json(self.points) for name, chart in self._kept.items()}


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

    def made(limits: Limits) -> str:
        cut = [RunLine(*(clipped(text, limits.characters) for text in row)) for row in rows]
        shown = first_of(cut, 4 * limits.rows, lambda row: html_bytes(row, 50))
        blocks = {"title": title, "rows": shown, "missing": len(rows) - len(shown), "live": live}
        return page("list.html", blocks, {"charts": {}, "answers": {}}, live=True)

    return fitting(made, lambda: large_page(title, live))


def large_page(title: str, live: Live | None = None) -> str:
    """A page for what has no room on one, whatever is left out."""
    blocks = {"title": clipped(title, 200), "live": live}
    return page("large.html", blocks, {"charts": {}, "answers": {}}, live=live is not None)


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
    return fitting(partial(_run_page, run, live), lambda: large_page(f"Run {run.name}", live))


def _run_page(run: RunFacts, live: Live | None, limits: Limits) -> str:
    run = run.within(limits)
    kl, length, calibrated = over_kl(run), over_length(run), [*calibrations(run)]
    beside = [kl, length and length[0], *(chart for _, chart in calibrated)]
    stages = [(stage.name, stage_charts(run, stage.name)) for stage in run.stages]
    charts = Charts(beside, stages, limits.charts)
    lengths = charts.placed(length[0]) if length else None
    failed = [gate for gate in run.gates if gate["outcome"] == "failed"]
    blocks: dict[str, Any] = {
        "title": f"Run {run.name}",
        "headline": OUTCOMES.get(run.outcome or "", headline(run)),
        "mood": (run.outcome or "").replace(" ", "-"),
        "run": run,
        "live": live,
        "failed": failed,
        "linked": partial(linked, directory=None if live else run.directory),
        "lineage": lineage(run.stages),
        "gates": [(gate, strip(gate)) for gate in run.gates],
        "charts": charts,
        "curves": charts.panels(),
        "over_kl": charts.placed(kl),
        "over_length": length and lengths and (lengths, length[1]),
        "calibrations": [(name, placed) for name, chart in calibrated if (placed := charts.placed(chart))],
        "policies": _within(policy_table(run, COMPARED), limits),
        "forgetting": _within(policy_table(run, FORGOTTEN), limits),
        "cost": _within(cost_of(run), limits),
        "figures": figures_of(run, limits),
    }
    return page(
        "run.html", blocks, {"charts": charts.as_json(), "answers": run.answers}, live=live is not None
    )


def _within(table: Table | None, limits: Limits) -> Table | None:
    return table and table.within(limits)


def figures_of(run: RunFacts, limits: Limits) -> list[tuple[str, Table]]:
    """Each stage's summary: its figures with their intervals."""
    found = []
    for stage in run.stages:
        rows = [[name, number(value), interval] for name, value, interval in stage.figures()]
        if rows:
            table = Table(["figure", "value", "95% interval"], rows).within(limits)
            limits = replace(limits, rows=limits.rows - table.bytes)
            found.append((stage.name, table))
    return found


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


def linked(advice: str, directory: Path | None) -> Markup:
    """Advice in which each page of the documentation is a link, where that page is on this disk.

    Args:
        directory: of the page, from which the link leads; None for a page that is served, which has no links.
    """
    parts = PAGE.split(advice)
    for place in range(1, len(parts), 2):
        file = DOCS.parent / parts[place]
        if directory is not None and file.is_file():
            address = quote(os.path.relpath(file, directory))
            parts[place] = Markup('<a href="{}">{}</a>').format(address, parts[place])
    return Markup("").join(parts)


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
