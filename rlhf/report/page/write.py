"""report.html: one file that needs no network, made from a run's files. `watch` serves the same page.

A model's text is untrusted: Jinja2 escapes it, JSON encodes every `<`, and the page's content security policy
lets only its own script and style run, by their digests.
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
    FORGETTING_METRICS,
    NUM_OPEN_CURVES,
    RunFacts,
    StageFacts,
    Table,
    calibrations,
    compared_table,
    comparison_table,
    over_kl,
    over_length,
    policy_table,
    read_run,
    stage_charts,
)
from rlhf.report.page.curves import MIN_CURVE_POINTS, Chart, points_each
from rlhf.report.page.size import Limits, clipped, embedded, first_of, fitting, html_bytes, json_bytes
from rlhf.tracking.position import read_position
from rlhf.tracking.progress import clock

NAME = "report.html"
NOT_ENDED = "This run has not ended."
EARLY_ENDS = {"failed": "failed", "stopped": "was stopped"}
"""How a run ended early -> in words."""
DOCS = Path(__file__).resolve().parents[3] / "docs"
DOCS_PAGE = re.compile(r"(docs/[\w/-]+\.md)")
ROW_HEIGHT = 60
"""Height of a row of the lineage, in pixels; page.css has the same value."""
CHART_HTML_BYTES = 800
"""Bytes of a chart's HTML elements, without their texts."""


def headline(run: RunFacts) -> str:
    """The heading for a run without an outcome."""
    if run.verdict is None:
        return unended_headline(run)
    return "The verdict" if run.verdict else NO_VERDICT


def unended_headline(run: RunFacts) -> str:
    """The heading for a run without a verdict: where it ended early, or that it has not ended."""
    ended = read_position(run.directory).get("ended")
    if ended not in EARLY_ENDS:
        return NOT_ENDED
    there = [f"in {stage.name}" for stage in run.stages if stage.status == ended]
    done = [f"after {stage.name}" for stage in run.stages if stage.status in ("ran", "reused")]
    return f"It {EARLY_ENDS[ended]} {(there or done or ['at its start'])[-1]}."


class GateDrawing(NamedTuple):
    """A drawing of a gate: positions from 0 to 100."""

    healthy: tuple[float, float]
    interval: tuple[float, float] | None
    value: float


class PlacedChart(NamedTuple):
    """A chart of the page, with the id by which the script finds it."""

    id: str
    chart: Chart


class Panel(NamedTuple):
    """The charts of a stage."""

    stage: str
    first: list[PlacedChart]
    more: list[PlacedChart]
    """Charts that are one click away."""
    left_out: int
    """Number of charts that are not on the page."""


class Charts:
    """The charts of a page, with ids, as many as fit.

    Args:
        beside: charts that belong to no stage; None is left out.
        stages: each stage's charts, the most informative first.
        limit: most bytes of all charts. Above it, curves get fewer points; then the least informative charts
            are left out.
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
        """Most points of a curve."""
        while True:
            kept = first_of(charts, limit, self._bytes)
            if len(kept) == len(charts) or self.points <= MIN_CURVE_POINTS:
                break
            self.points = max(MIN_CURVE_POINTS, self.points // 2)
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
            json_bytes(chart.as_json(self.points))
            + html_bytes([*4 * [chart.title], chart.alt_text], 0)
            + CHART_HTML_BYTES
        )

    def placed(self, chart: Chart | None) -> PlacedChart | None:
        """The chart with its id; None if it is not on the page."""
        name = self._ids.get(id(chart), "")
        return PlacedChart(name, self._kept[name]) if name in self._kept else None

    def panels(self) -> list[Panel]:
        """The stages that have charts."""
        panels = []
        for stage, charts in self._stages:
            placed = [each for each in map(self.placed, charts) if each is not None]
            left_out = len(charts) - len(placed)
            if charts:
                panels.append(Panel(stage, placed[:NUM_OPEN_CURVES], placed[NUM_OPEN_CURVES:], left_out))
        return panels

    def as_json(self) -> dict[str, Any]:
        """Chart id -> the chart for the script."""
        return {name: chart.as_json(self.points) for name, chart in self._kept.items()}


@dataclass(frozen=True)
class Live:
    """The live state of a run, from `watch`."""

    word: str
    """running, done, failed, stopped, dead or silent."""
    lines: Sequence[str]
    stamp: str
    """Version of the run's files; the page sends it when it asks for changes."""


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
    """The page that replaces one that is too large, whatever is left out."""
    blocks = {"title": clipped(title, 200), "live": live}
    return page("large.html", blocks, {"charts": {}, "answers": {}}, live=live is not None)


def write_page(directory: Path) -> Path:
    """Write report.html into the run's directory. For a run of stage=report, copy the page that it made.

    Raises:
        OSError: it cannot be written, or a file of the run cannot be read.
    """
    path, made = directory / NAME, directory / "artifacts" / "report" / NAME
    with naming(path):
        text = made.read_text(encoding="utf-8") if made.is_file() else run_page(read_run(directory))
        replace_text(path, text)
    return path


def run_page(run: RunFacts, live: Live | None = None) -> str:
    """The page of one run as HTML."""
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
        "policies": _within(compared_table(run), limits),
        "comparison": _within(comparison_table(run), limits),
        "forgetting": _within(policy_table(run, FORGETTING_METRICS), limits),
        "cost": _within(cost_of(run), limits),
        "figures": figures_of(run, limits),
    }
    return page(
        "run.html", blocks, {"charts": charts.as_json(), "answers": run.answers}, live=live is not None
    )


def _within(table: Table | None, limits: Limits) -> Table | None:
    return table and table.within(limits)


def figures_of(run: RunFacts, limits: Limits) -> list[tuple[str, Table]]:
    """Each stage's summary metrics with their intervals."""
    tables = []
    for stage in run.stages:
        rows = [[name, number(value), interval] for name, value, interval in stage.figures()]
        if rows:
            table = Table(["figure", "value", "95% interval"], rows).within(limits)
            limits = replace(limits, rows=limits.rows - table.bytes)
            tables.append((stage.name, table))
    return tables


def page(template: str, blocks: Mapping[str, Any], data: Mapping[str, Any], *, live: bool) -> str:
    """A page as HTML.

    Args:
        blocks: variables of the template.
        data: data of the script: `charts` and `answers`.
        live: whether it may ask its server for changes.
    """
    script, style = _file("uPlot.iife.min.js") + _file("page.js"), _file("uPlot.min.css") + _file("page.css")
    connect = "connect-src 'self'; " if live else ""
    policy = (
        f"default-src 'none'; {connect}script-src '{_digest(script)}'; style-src '{_digest(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return _templates().get_template(template).render(
        **blocks, policy=policy, script=script, style=style, data=embedded(data), row=ROW_HEIGHT
    )  # fmt: skip


def linked(advice: str, directory: Path | None) -> Markup:
    """Advice with links to pages of the documentation that are on this disk.

    Args:
        directory: the page's directory, for relative links; None for a served page, which gets no links.
    """
    parts = DOCS_PAGE.split(advice)
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
    """A value as text; a dash for None, which is a value that is not finite."""
    return "-" if value is None else f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:.4g}"


class Row(NamedTuple):
    """A stage in the lineage."""

    stage: StageFacts
    share: float
    """Its time, in percent of the longest stage's."""
    arcs: list[str]
    """SVG paths from the stages that it reads."""


def lineage(stages: Sequence[StageFacts]) -> list[Row]:
    """One row per stage, with arcs from all stages that it reads."""
    places = {stage.name: place for place, stage in enumerate(stages)}
    longest = max((stage.took or 0.0 for stage in stages), default=0.0)
    rows = []
    for stage in stages:
        arcs = [arc(places[name], places[stage.name]) for name in stage.reads if name in places]
        rows.append(Row(stage, 100 * (stage.took or 0.0) / longest if longest else 0.0, arcs))
    return rows


def arc(start: int, end: int) -> str:
    """The SVG path of an arc at the left of two rows; it is wider for rows that are farther apart."""
    top, bottom, right = start * ROW_HEIGHT + ROW_HEIGHT / 2, end * ROW_HEIGHT + ROW_HEIGHT / 2, 92.0
    left = right - min(84.0, 10.0 + 14.0 * (end - start))
    return f"M {right:g} {top:g} C {left:g} {top:g} {left:g} {bottom - 6:g} {right - 5:g} {bottom - 6:g}"


def strip(gate: Mapping[str, Any]) -> GateDrawing | None:
    """The drawing of a gate's value and its bound; None if one of them is missing."""
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
    return GateDrawing(healthy, interval, place(value))


def cost_of(run: RunFacts) -> Table | None:
    """Time, memory and hardware of each stage; also the price if it is known."""
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
