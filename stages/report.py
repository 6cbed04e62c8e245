"""Several runs in one page: overlaid curves, and differences between their settings and results.

Reads   the directories of finished runs.
Writes  report.html, which also becomes the run's own page: runs/NAME/report.html.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

from rlhf.config import Complaint, ConfigError, did_you_mean
from rlhf.pipeline.abilities import TellsOfRuns
from rlhf.pipeline.job import Job
from rlhf.pipeline.metrics import Metric
from rlhf.pipeline.stage import View


class ReportStage(TellsOfRuns):
    """The keys `report.*`. Values: conf/stages/report.yaml."""

    metrics: ClassVar[Mapping[str, Metric]] = {"runs": Metric("runs", ".0f")}

    runs: list[str]
    """The runs of the page, in this order: names in runs_dir, or directories elsewhere. A sweep's name means
    all its trials."""

    def complaints(self, view: View) -> Iterator[Complaint]:
        """The runs exist, and none of them is this run, whose files would be replaced."""
        if not self.runs:
            yield Complaint("report.runs=[]", "nothing to show.", "Name runs: report.runs=[first,second].")
        if view.directory is None:
            return
        for name in self.runs:
            if view.directory.resolve() in [
                each.resolve() for each in run_directories(name, view.directory.parent)
            ]:
                yield Complaint(
                    f"report.runs={name} with run_name={view.directory.name}",
                    "the page's run would replace that run's files.",
                    "Use another run_name.",
                )

    def run(self, job: Job) -> Mapping[str, float]:
        """Write the page."""
        from rlhf.report.page.collect import read_run
        from rlhf.report.page.compared import runs_page

        directories = [each for name in self.runs for each in run_directories(name, job.run_directory.parent)]
        if job.compute.is_main:
            page = runs_page([read_run(directory) for directory in dict.fromkeys(directories)])
            (job.directory / "report.html").write_text(page, encoding="utf-8")
        return {"runs": float(len(dict.fromkeys(directories)))}


def run_directories(name: str, runs_dir: Path) -> list[Path]:
    """The directories of the runs that a name means: of one run, or of a sweep's trials.

    Raises:
        ConfigError: there is no such run.
    """
    for directory in (runs_dir / name, Path(name)):
        if (directory / "summary.json").is_file():
            return [directory]
    runs = [path.parent for path in runs_dir.glob("*/summary.json")]
    trials = [path for path in runs if (path / "trial.json").is_file()]
    sweep = [path for path in trials if path.name.rpartition("-")[0] == name]
    if not sweep:
        sweeps = [path.name.rpartition("-")[0] for path in trials]
        near = did_you_mean(name, sorted({*(path.name for path in runs), *sweeps}))
        raise ConfigError(f"report.runs={name}: there is no such run in {runs_dir}.{near}")
    return sorted(sweep, key=lambda path: (len(path.name), path.name))
