"""One trial of a sweep: it runs like any other run, and notes how it ended.

The note, trial.json in the trial's run directory, is how a sweep that is started again, on whatever node,
knows what its trials came to. The same is returned, and so comes back from a launcher's job.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from rlhf.cli.execute import DONE, GATE_FAILED, INTERRUPTED, STOPPED, execute
from rlhf.config import ConfigError, Strict, did_you_mean
from rlhf.locks import Lock

if TYPE_CHECKING:  # `--help` needs no torch
    from rlhf.pipeline.stage import Stage

NOTE = "trial.json"


Metric = Annotated[str, Field(pattern=r"^\w+/\S+$")]
"""A summary metric, `STAGE/NAME`."""


class ParetoConfig(Strict):
    """`sweep.pareto.*`: the two sides of a trade; of both, the base model has 0."""

    gain: Metric
    """Summary metric of which more is better."""
    loss: Metric
    """Summary metric of which less is better."""


class SweepConfig(Strict):
    """`sweep.*`: what `python -m rlhf -m` looks for. Values: conf/config.yaml."""

    metric: Metric | None
    """Summary metric that the sweep looks at, such as evaluate/win_rate; `hydra/sweeper=optuna` needs one."""
    direction: Literal["maximize", "minimize"]
    """Whether more of the metric is better, or less."""
    trials: PositiveInt
    """Trials of an optuna study in all."""
    parallel: PositiveInt
    """Trials at once, if the launcher can do that; Hydra's own launcher runs them one by one."""
    seed: NonNegativeInt
    """Seed of optuna's proposals."""
    pareto: ParetoConfig | None
    """Draw a picture of the trials' gain against their loss into the sweep's directory; null for none."""

    @property
    def metrics(self) -> dict[str, str]:
        """Key -> the metric that it names."""
        named = {} if self.metric is None else {"sweep.metric": self.metric}
        if self.pareto is not None:
            named |= {"sweep.pareto.gain": self.pareto.gain, "sweep.pareto.loss": self.pareto.loss}
        return named

    def check(self, stages: Mapping[str, Stage]) -> None:
        """The trials have the stages whose metrics are named, and these measure them; a picture can be drawn.

        Raises:
            ConfigError: if not.
        """
        for key, metric in self.metrics.items():
            stage, _, name = metric.partition("/")
            if stage not in stages:
                raise ConfigError(
                    f"{key}={metric}: the trials have no such stage.{did_you_mean(stage, stages)} "
                    f"Use STAGE/NAME with one of {', '.join(stages)}; a run's summary.json has the names."
                )
            stages[stage].check_metric(name, f"{key}={metric}")
        if self.pareto is not None and find_spec("matplotlib") is None:
            raise ConfigError("sweep.pareto draws with matplotlib: pip install -e '.[compare]'.")


@dataclass(frozen=True)
class Outcome:
    """How a trial ended."""

    code: int | None = None
    """Its exit code; None as long as it has not said."""
    status: str = "unfinished"
    """`done`, `failed in STAGE`, `stopped in STAGE`, or without a stage where none had begun; `unfinished` is
    running, or was killed."""
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    """Of all its stages, by `STAGE/NAME`; null where not finite."""
    gates: tuple[str, ...] = ()
    """The metrics that have a bound."""

    @property
    def goes_on(self) -> bool:
        """Whether the same command goes on with it."""
        return self.code in (None, STOPPED, INTERRUPTED)


@dataclass
class Trial:
    """A trial that was planned, and what became of it."""

    number: int
    directory: Path
    """Its run's."""
    values: Mapping[str, str]
    """Of the swept keys, in Hydra's grammar."""
    outcome: Outcome | None = None
    """None as long as it has not begun."""

    @property
    def overrides(self) -> list[str]:
        """As on the command line."""
        return [f"{key}={value}" for key, value in self.values.items()]

    @property
    def status(self) -> str:
        """In words."""
        return self.outcome.status if self.outcome else "not started"

    def metric(self, name: str) -> float | None:
        """None where it was not measured, or is not finite."""
        return self.outcome.metrics.get(name) if self.outcome else None


def is_main_process() -> bool:
    """Whether this is the only process, or the first of several that were started side by side."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0


def run_trial(resolved: Mapping[str, Any], run_name: str) -> Outcome:
    """Run one trial and note how it ended. One that was queued twice waits for its other self."""
    if not is_main_process():
        return outcome_of(execute(resolved, run_name), {})
    directory = Path(resolved["runs_dir"]) / run_name
    directory.mkdir(parents=True, exist_ok=True)

    def tell(holder: str) -> None:
        print(f"{run_name} waits: another process runs this trial ({holder})", flush=True)

    with Lock(directory / ".trial.lock").awaited(tell):
        write_note(directory, Outcome())
        summary = directory / "summary.json"
        summary.unlink(missing_ok=True)
        code = execute(resolved, run_name)
        outcome = outcome_of(code, json.loads(summary.read_bytes()) if summary.exists() else {})
        write_note(directory, outcome)
    return outcome


def outcome_of(code: int, summary: Mapping[str, Any]) -> Outcome:
    """From a run's exit code and its summary.json."""
    stages, gates = summary.get("stages", {}), summary.get("gates", [])
    word = "stopped" if code in (STOPPED, INTERRUPTED) else "failed"
    at = [name for name, stage in stages.items() if stage["status"] == word]
    if code == GATE_FAILED:
        at = [f"{gate['stage']}: gate {gate['name']}" for gate in gates if gate["outcome"] == "failed"]
    return Outcome(
        code=code,
        status="done" if code == DONE else " in ".join([word, *at[:1]]),
        metrics={name: value for stage in stages.values() for name, value in stage["metrics"].items()},
        gates=tuple(f"{gate['stage']}/{gate['name']}" for gate in gates),
    )


def write_note(directory: Path, outcome: Outcome) -> None:
    """Replace trial.json."""
    beside = directory / f".{NOTE}"
    beside.write_text(json.dumps(asdict(outcome), indent=2), encoding="utf-8")
    beside.rename(directory / NOTE)


def read_note(directory: Path) -> Outcome | None:
    """How the trial in this run directory ended; None if it never began.

    Raises:
        ConfigError: the note was cut off or changed.
    """
    if not directory.exists() or directory / NOTE not in [*directory.iterdir()]:  # see Store.find
        return None
    try:
        note = json.loads((directory / NOTE).read_bytes())
        return Outcome(note["code"], note["status"], note["metrics"], tuple(note["gates"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{directory / NOTE} cannot be read ({type(error).__name__}: {error}). Remove it: the table of "
            "trials then shows this one as not started."
        ) from None
