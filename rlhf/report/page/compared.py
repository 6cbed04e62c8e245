"""The page of several runs: overlaid curves, and differences between settings and results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from rlhf.pipeline.run import NO_VERDICT, OUTCOMES
from rlhf.report.page.collect import RunFacts, Table, over_kl, stage_charts
from rlhf.report.page.curves import Chart
from rlhf.report.page.size import Limits, clipped, first_of, fitting, html_bytes
from rlhf.report.page.write import Charts, large_page, number, page


def runs_page(runs: Sequence[RunFacts]) -> str:
    """The page as HTML."""
    names = names_of(runs)
    stages = dict.fromkeys(stage.name for run in runs for stage in run.stages)
    charts = [(stage, [*overlaid(runs, names, stage)]) for stage in stages]
    kl = joined([over_kl(run) for run in runs], names)
    tables = {
        "settings": settings(runs, names),
        "results": results(runs, names, gated=True),
        "figures": results(runs, names, gated=False),
    }
    title = f"{len(runs)} runs compared"
    verdicts = [
        (name, OUTCOMES.get(run.outcome or "", ""), run.outcome or "",
         "It has not reached its end." if run.verdict is None else run.verdict or NO_VERDICT)
        for name, run in zip(names, runs, strict=True)
    ]  # fmt: skip
    make = partial(_page, title, verdicts, tables, kl, charts)
    return fitting(make, lambda: large_page(title))


def _page(
    title: str,
    verdicts: Sequence[tuple[str, ...]],
    tables: Mapping[str, Table | None],
    kl: Chart | None,
    stages: Sequence[tuple[str, Sequence[Chart]]],
    limits: Limits,
) -> str:
    limits = replace(limits, rows=limits.rows + limits.answers // 5)  # this page has no answers
    charts = Charts([kl], stages, limits.charts)
    cut = [tuple(clipped(text, limits.characters) for text in each) for each in verdicts]
    shown = first_of(cut, limits.rows, lambda texts: html_bytes(texts, 50))
    blocks: dict[str, Any] = {
        "title": title,
        "live": None,
        "verdicts": shown,
        "verdicts_left_out": len(verdicts) - len(shown),
        **{name: table and table.within(limits) for name, table in tables.items()},
        "charts": charts,
        "over_kl": charts.placed(kl),
        "curves": charts.panels(),
    }
    return page("compared.html", blocks, {"charts": charts.as_json(), "answers": {}}, live=False)


def names_of(runs: Sequence[RunFacts]) -> list[str]:
    """The runs' names; for runs that share a name, their directories."""
    names = [run.name for run in runs]
    return [
        name if names.count(name) == 1 else str(run.directory) for name, run in zip(names, runs, strict=True)
    ]


def overlaid(runs: Sequence[RunFacts], names: Sequence[str], stage: str) -> Iterator[Chart]:
    """A stage's charts, each with the curves of all runs that logged it."""
    per_run = [{chart.title: chart for chart in stage_charts(run, stage)} for run in runs]
    for title in dict.fromkeys(title for charts in per_run for title in charts):
        chart = joined([charts.get(title) for charts in per_run], names)
        assert chart is not None
        yield chart


def joined(charts: Sequence[Chart | None], names: Sequence[str]) -> Chart | None:
    """One chart with the curves of all runs; None if no run has it."""
    found = [(name, chart) for name, chart in zip(names, charts, strict=True) if chart is not None]
    if not found:
        return None
    curves = [
        replace(curve, name=name if len(chart.curves) == 1 else f"{name}: {curve.name}")
        for name, chart in found
        for curve in chart.curves
    ]
    first = found[0][1]
    same = all(chart.bounds == first.bounds for _, chart in found)
    return replace(first, curves=curves, bounds=first.bounds if same else (None, None))


def settings(runs: Sequence[RunFacts], names: Sequence[str]) -> Table | None:
    """The keys whose values differ between the runs."""
    changes = [{each["key"]: each for each in run.changed or ()} for run in runs]
    rows = []
    for key in sorted({key for each in changes for key in each}):
        default = next(each[key]["default"] for each in changes if key in each)
        values = [each[key]["value"] if key in each else default for each in changes]
        if len(set(values)) > 1:
            rows.append([key, *values])
    return Table(["key", *names], rows) if rows else None


def results(runs: Sequence[RunFacts], names: Sequence[str], *, gated: bool) -> Table | None:
    """One row per metric, one column per run.

    Args:
        gated: only metrics with a gate.
    """
    figures = [
        {
            f"{stage.name}/{metric}": (value, interval)
            for stage in run.stages
            for metric, value, interval in stage.figures()
        }
        for run in runs
    ]
    bounded = dict.fromkeys(f"{gate['stage']}/{gate['name']}" for run in runs for gate in run.gates)
    wanted = bounded if gated else dict.fromkeys(name for each in figures for name in each)
    rows = []
    for name in wanted:
        cells = []
        for each in figures:
            value, interval = each.get(name, (None, ""))
            cells.append(f"{number(value)} ({interval.partition(' (')[0]})" if interval else number(value))
        rows.append([name, *cells])
    return Table(["figure", *names], rows) if rows else None
