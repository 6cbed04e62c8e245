"""The table of a sweep's trials, on the terminal and as sweep.md and sweep.json in the sweep's directory.
With `sweep.pareto` also their picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlhf.disk import naming, replace_text
from rlhf.pipeline.recipe import as_typed
from rlhf.pipeline.settings import SweepConfig
from rlhf.report.over_seeds import OverSeeds
from rlhf.report.pareto import Point, draw
from rlhf.report.policies import PICTURE as POLICIES
from rlhf.report.policies import picture_of
from rlhf.report.trial import Trial
from rlhf.tracking import tables
from rlhf.tracking.redaction import redacted, redacted_text
from rlhf.tracking.tables import Cells

MARK, PICTURE = "best", "pareto.png"
SEEDS_NOTE = (
    "Mean of the seeds, and from the lowest seed to the highest. One run's 95% interval is over its prompts."
)


@dataclass(frozen=True)
class SweepTable:
    """All trials of a sweep."""

    directory: Path
    """The sweep's directory, with the sweep's name."""
    config: SweepConfig
    trials: Sequence[Trial]

    @property
    def best(self) -> Trial | None:
        """The finished trial with the best `sweep.metric`."""
        metric = self.config.metric
        values = [
            (value, trial)
            for trial in self.trials
            if metric and trial.status == "done" and (value := trial.metric(metric)) is not None
        ]
        choose = max if self.config.direction == "maximize" else min
        return choose(values, key=lambda pair: pair[0])[1] if values else None

    @property
    def metrics(self) -> list[str]:
        """The metrics in sweep.json: those that `sweep.*` names, and without `sweep.metric` those with a
        gate."""
        gates = [name for trial in self.trials if trial.outcome for name in trial.outcome.gates]
        return list(dict.fromkeys([*self.config.metrics.values(), *([] if self.config.metric else gates)]))

    @property
    def shown_metrics(self) -> list[str]:
        """The metrics in the table: those of `metrics` that `sweep.*` names or that differ between trials."""
        named, trials = [*self.config.metrics.values()], self.trials
        return [
            name
            for name in self.metrics
            if name in named or len(trials) == 1 or len({shown(each.metric(name)) for each in trials}) > 1
        ]

    @property
    def ranked(self) -> list[Trial]:
        """The best trial first, then the others by number."""
        return sorted(self.trials, key=lambda trial: trial is not self.best)

    @property
    def lead(self) -> str:
        """A sentence on the best trial, with its interval; empty if there is none."""
        best, metric = self.best, self.config.metric
        if best is None or metric is None or best.outcome is None:
            return ""
        sampled = best.sampled(metric)
        interval = ""
        if sampled is not None:
            interval = f" (95%: {sampled.low:.4g} to {sampled.high:.4g}, {sampled.rows:,} rows)"
        values = " ".join(f"{as_typed(key)}={short(best.values[key])}" for key in self.keys)
        named = f"trial {best.number}" + (f" ({values})" if values else "")
        others = [each.sampled(metric) for each in self.trials if each is not best]
        alike = sum(
            other is not None and sampled is not None
            and other.low <= sampled.high and sampled.low <= other.high
            for other in others
        )  # fmt: skip
        apart = f" Its interval overlaps that of {alike} of the others." if alike else ""
        return f"Best: {named}, {metric} = {shown(best.metric(metric))}{interval}.{apart}"

    @property
    def left_out(self) -> str:
        """A sentence on metrics that the table does not show; empty if it shows all."""
        same = len(self.metrics) - len(self.shown_metrics)
        words = "1 figure that is" if same == 1 else f"{same} figures that are"
        return f"{words} the same in all trials: see sweep.json." if same else ""

    @property
    def keys(self) -> list[str]:
        """The overridden keys that differ between trials."""
        keys = dict.fromkeys(key for trial in self.trials for key in trial.values)
        return [
            key
            for key in keys
            if len(self.trials) == 1 or len({trial.values.get(key) for trial in self.trials}) > 1
        ]

    @property
    def points(self) -> list[Point]:
        """The picture's points: trials with both metrics."""
        pareto, points = self.config.pareto, []
        if pareto is None:
            return []
        for trial in self.trials:
            gain, loss = trial.metric(pareto.gain), trial.metric(pareto.loss)
            if gain is not None and loss is not None:
                name = " ".join(short(trial.values[key]) for key in self.keys)
                points.append(Point(name or str(trial.number), gain, loss))
        return points

    @property
    def is_transposed(self) -> bool:
        """Whether each trial is a column: few trials with many metrics would make a wide table."""
        return len(self.shown_metrics) > len(self.trials)

    def cells(self) -> Cells:
        """Headings and rows: one row or one column per trial."""
        best = self.best
        headings = [
            "trial",
            "run",
            *(as_typed(key).lstrip("+") for key in self.keys),
            "status",
            *self.shown_metrics,
        ]
        rows = []
        for trial in self.ranked:
            values = [shown(trial.metric(name)) for name in self.shown_metrics]
            if trial is best:
                values[0] += f" ({MARK})"
            overrides = [short(trial.values.get(key, "-")) for key in self.keys]
            rows.append([str(trial.number), str(trial.directory), *overrides, trial.status, *values])
        if self.is_transposed:
            headings, *rows = ([*each] for each in zip(headings, *rows, strict=True))
        return Cells(headings, rows)

    @property
    def over_seeds(self) -> OverSeeds:
        """The sweep's policies, if the trials differ only in their seed; else none."""
        done = [trial.directory for trial in self.trials if trial.status == "done"]
        return OverSeeds(done if self.keys == ["seed"] else [])

    def write(self) -> None:
        """Write sweep.md and sweep.json, and draw pareto.png and policies.png."""
        pareto, points = self.config.pareto, self.points
        picture = ""
        if pareto is not None and points:
            figure = draw(points, pareto.gain, pareto.loss)
            figure.savefig(self.directory / PICTURE, dpi=130, metadata={"Software": None})
            picture = f"\n![{pareto.gain} against {pareto.loss}]({PICTURE})\n"
        lead = f"{self.lead}\n\n" if self.lead else ""
        left_out = f"\n{self.left_out}\n" if self.left_out else ""
        text = f"# Sweep {self.directory.name}\n\n{lead}{self.cells().markdown()}\n{left_out}{picture}"
        seeds = self.over_seeds
        if seeds.titles:
            found, words = seeds.points()
            parts = ["## Policies", SEEDS_NOTE, seeds.cells().markdown()]
            parts += picture_of(found, words, self.directory / POLICIES)
            text = "\n\n".join([text.rstrip(), *parts]) + "\n"
        with naming(self.directory / "sweep.md"):
            (self.directory / "sweep.md").write_text(redacted_text(text), encoding="utf-8")
        best = self.best
        content = {
            "name": self.directory.name,
            "metric": self.config.metric,
            "direction": self.config.direction,
            "best": best.number if best else None,
            "trials": [
                {
                    "number": trial.number,
                    "run": str(trial.directory),
                    "overrides": dict(trial.values),
                    "status": trial.status,
                    "code": trial.outcome.code if trial.outcome else None,
                    "metrics": {name: trial.metric(name) for name in self.metrics},
                }
                for trial in self.trials
            ],
        }
        replace_text(self.directory / "sweep.json", json.dumps(redacted(content), indent=2))

    def show(self, console: Console) -> None:
        """Print the table."""
        headings, rows = self.cells()
        table = Table(box=box.SIMPLE_HEAD, title=f"Sweep {self.directory.name}", title_justify="left")
        colours = [self._colour(trial) for trial in self.ranked]
        columns, lines = [""] * len(headings), colours
        if self.is_transposed:
            columns, lines = ["", *colours], [""] * len(rows)
        for heading, style in zip(headings, columns, strict=True):
            table.add_column(escape(heading), overflow="fold", style=style)
        for cells, style in zip(rows, lines, strict=True):
            table.add_row(*map(escape, cells), style=style)
        console.print(table)
        for line in filter(None, (self.lead, self.left_out)):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        if (seeds := self.over_seeds).titles:
            policies = seeds.cells()
            right = range(1, len(policies.headings))
            console.print(tables.shown(policies, right=right), highlight=False)
            console.print(SEEDS_NOTE, highlight=False)

    def _colour(self, trial: Trial) -> str:
        return "green" if trial is self.best else "" if trial.status == "done" else "red"


def shown(value: float | None) -> str:
    """A metric, or a dash."""
    return "-" if value is None else f"{value:.4g}"


def short(text: str) -> str:
    """An override's value; long numbers are rounded."""
    try:
        return f"{float(text):.4g}" if len(text) > 8 else text
    except ValueError:
        return text
