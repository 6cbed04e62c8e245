"""Sweepers for `python -m rlhf -m`: every combination of listed values, or proposals by optuna.

Both start trials through Hydra's launcher (one by one here, or as submitit jobs), continue when one fails,
and write a table of all trials. The same command continues an optuna study: see optuna_study.py.
"""

from __future__ import annotations

import itertools
import os
import queue
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from rich.console import Console
from rich.markup import escape

from rlhf.cli.sweep.trial import NOTE, is_main_process, read_note
from rlhf.config import ConfigError, validated
from rlhf.distributed.signals import Stopped, StopSignals
from rlhf.exit_codes import CONFIG_ERROR, CRASH, INTERRUPTED, STOPPED
from rlhf.pipeline.recipe import as_typed
from rlhf.pipeline.run import Run
from rlhf.pipeline.settings import SweepConfig
from rlhf.report.sweep_table import SweepTable
from rlhf.report.trial import Outcome, Trial
from rlhf.tracking.redaction import RedactingConsole, is_secret_name, redacted

if TYPE_CHECKING:  # `--help` needs neither of these
    from optuna.distributions import BaseDistribution

    from rlhf.pipeline.stage import Stage

SHARED_KEYS = ("sweep", "run_name", "runs_dir")
CHANGEABLE_OVERRIDES = ("sweep.trials", "sweep.parallel", "run_name")
"""Overrides that may change when a study continues."""


class GridSweep(Sweeper):
    """Every combination of the listed values."""

    hydra_context: HydraContext
    config: DictConfig
    launcher: Launcher
    directory: Path
    """Directory of the sweep, with the sweep's name."""
    knobs: SweepConfig
    fixed: dict[str, str]
    """Key -> its override, the same for all trials."""
    swept: dict[str, Override]
    """Key -> its override with several values."""

    def __init__(self, params: Mapping[str, str] | None) -> None:
        self.params = params or {}
        self.trials: list[Trial] = []

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run all trials; called by Hydra.

        Raises:
            SystemExit: with the highest exit code of the trials, unless all are done.
        """
        try:
            with StopSignals().installed():
                self.read(arguments)
                code = self.run()
        except ConfigError as error:
            print(f"Error: {error}", file=sys.stderr)
            code = CONFIG_ERROR
        except Stopped as stop:
            code = INTERRUPTED if stop.signum == signal.SIGINT else STOPPED
        if code:
            raise SystemExit(code)

    def read(self, arguments: Sequence[str]) -> None:
        """Read the command line, and check everything that can be checked before the first trial.

        Raises:
            ConfigError: a key of the sweep or of a trial is wrong.
        """
        given = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = {each.get_key_element(): each for each in parser.parse_overrides(given)}
        self.swept = {key: each for key, each in overrides.items() if each.is_sweep_override()}
        self.fixed = {key: str(each.input_line) for key, each in overrides.items() if key not in self.swept}
        for key, override in self.swept.items():
            if key.partition(".")[0] in SHARED_KEYS:
                raise ConfigError(f"{key}: a sweep's trials share it. Give it one value.")
            if redacted(override.input_line) != override.input_line or is_secret_name(key):
                raise ConfigError(
                    f"{key}: there is a secret among its values, and a sweep writes the values of its trials "
                    "to files. Give it one value, from the environment: '${oc.env:NAME}'."
                )
        resolved = self.compose([])
        name = resolved["run_name"] or datetime.now().strftime("%Y%m%d-%H%M%S")
        if not isinstance(name, str):
            raise ConfigError(f"run_name={name}: it must be a text. Put a letter in it.")
        self.fixed["run_name"] = f"run_name={name}"
        self.knobs = validated(SweepConfig, resolved["sweep"], "sweep")
        self.directory = Path(resolved["runs_dir"], name)
        from rlhf.pipeline.experiment import build_experiment

        stages: dict[str, Stage] = {}
        for trial in self.to_check():
            experiment = build_experiment(self.compose(trial.overrides))
            stages |= {name: experiment.stages[name] for name in experiment.needed()}
        self.knobs.check(stages)

    def trial(self, number: int, values: Mapping[str, str]) -> Trial:
        """The trial with this number, in RUNNAME-NUM."""
        return Trial(number, self.directory.with_name(f"{self.directory.name}-{number}"), values)

    def compose(self, overrides: Sequence[str]) -> dict[str, Any]:
        """The resolved config of a trial with these overrides."""
        all_overrides = [*self.fixed.values(), *overrides]
        node = self.hydra_context.config_loader.load_sweep_config(self.config, all_overrides)
        with read_write(node), open_dict(node):
            del node["hydra"]
        resolved = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
        assert isinstance(resolved, dict)
        return {str(key): value for key, value in resolved.items()}

    def to_check(self) -> list[Trial]:
        """Trials to check before the first one starts: here all.

        Raises:
            ConfigError: a key has an interval, which only optuna can search.
        """
        for key, override in self.swept.items():
            if override.is_interval_sweep():
                raise ConfigError(f"{key}={override.get_value_string()} needs hydra/sweeper=optuna.")
        lists = [list(override.sweep_string_iterator()) for override in self.swept.values()]
        for number, values in enumerate(itertools.product(*lists)):
            self.trials.append(self.trial(number, dict(zip(self.swept, values, strict=True))))
        return self.trials

    def begin(self) -> None:
        """Find what an earlier start left. Nothing to do here: finished stages are in the store."""

    def proposals(self) -> Iterator[Trial]:
        """The trials to run. The next one is taken when it can start."""
        yield from self.trials

    def ended(self, trial: Trial) -> None:
        """Called when a trial ended or was lost."""

    def run(self) -> int:
        """Run the trials and print their table. Returns the highest exit code."""
        codes, main = [0], is_main_process()
        console = RedactingConsole(quiet=not main)
        table = SweepTable(self.directory, self.knobs, self.trials)
        with Run(self.directory).locked() if main else nullcontext():
            self.begin()
            console.print(
                f"Sweep in {self.directory}; run_name={self.directory.name} continues it.", highlight=False
            )
            try:
                for trial in self.run_trials(console):
                    assert trial.outcome is not None
                    codes.append(CRASH if trial.outcome.code is None else trial.outcome.code)
                    if main:
                        table.write()
                    self.ended(trial)
            finally:
                if main:
                    table.write()
                    table.show(console)
        return max(codes)

    def run_trials(self, console: Console) -> Iterator[Trial]:
        """Keep as many trials running as the launcher can. Yields each trial when it has ended."""
        finished: queue.Queue[Trial] = queue.Queue()
        proposals = self.proposals()
        one_by_one = self.config.hydra.launcher._target_.endswith(".BasicLauncher")
        max_running, num_running = 1 if one_by_one else self.knobs.parallel, 0
        while True:
            while num_running < max_running and (proposal := next(proposals, None)):
                trial, shown_overrides = proposal, escape(as_typed(" ".join(proposal.overrides)))
                console.print(f"[bold]Trial {trial.number}[/]: {shown_overrides}", highlight=False)
                trial.outcome = Outcome()
                num_running += 1
                if one_by_one:
                    self.launch(trial, finished)
                else:  # a thread per trial, so that a lost job does not end the others
                    threading.Thread(target=self.launch, args=(trial, finished), daemon=True).start()
            if not num_running:
                return
            trial = finished.get()
            num_running -= 1
            assert trial.outcome is not None
            logs = self.config.hydra.launcher.get("submitit_folder") if trial.outcome.code else None
            where = f" (its output: {str(logs).replace('%j', '*')})" if logs else ""
            console.print(f"[bold]Trial {trial.number}[/]: {trial.outcome.status}{where}", highlight=False)
            yield trial
            if one_by_one and trial.outcome.code in (STOPPED, INTERRUPTED):
                return  # the signal was meant for the whole sweep

    def launch(self, trial: Trial, finished: queue.Queue[Trial]) -> None:
        """Run one trial and wait for its end."""
        overrides = [*self.fixed.values(), *trial.overrides]
        retries = self.config.hydra.launcher.get("max_num_timeout", 0)  # of submitit_slurm
        if is_main_process():
            (trial.directory / NOTE).unlink(missing_ok=True)
        for _ in range(1 + retries):
            try:
                results = self.launcher.launch([overrides], initial_job_idx=trial.number)
                trial.outcome = results[0].return_value
            except Exception as error:  # a job that was killed may have left a note
                print(f"Trial {trial.number} was lost: {error}", file=sys.stderr)
                trial.outcome = Outcome()
                with suppress(ConfigError):  # it cannot be read
                    trial.outcome = read_note(trial.directory) or Outcome()
            assert trial.outcome is not None
            if trial.outcome.code != STOPPED:  # by the scheduler: it continues from its checkpoint
                break
        finished.put(trial)


class OptunaSweep(GridSweep):
    """Values that optuna proposes from the results of earlier trials."""

    def to_check(self) -> list[Trial]:
        """Trials to check before the first one starts: the upper ends of intervals, and every listed value.

        Raises:
            ConfigError: no optuna, no metric, nothing to search, or several ranks.
        """
        if find_spec("optuna") is None:
            raise ConfigError("hydra/sweeper=optuna needs optuna: pip install -e '.[optuna]'.")
        if "RANK" in os.environ:
            raise ConfigError(
                "hydra/sweeper=optuna: start it as one process; launch.processes gives a trial several ranks."
            )
        if self.knobs.metric is None:
            raise ConfigError(
                "hydra/sweeper=optuna needs sweep.metric=STAGE/NAME, such as evaluate/gold_mean/ppo."
            )
        if not self.swept:
            raise ConfigError(
                "hydra/sweeper=optuna has nothing to search. Give a key an interval, a range or a list, "
                "such as 'ppo.optim.lr=tag(log,interval(1e-5,1e-3))'."
            )
        spaces = {key: space_of(key, override) for key, override in self.swept.items()}
        self.distributions = {key: distribution for key, (distribution, _) in spaces.items()}
        ends = {key: samples[-1] for key, (_, samples) in spaces.items()}
        value_sets = [{**ends, key: value} for key, (_, samples) in spaces.items() for value in samples]
        return [self.trial(0, values) for values in value_sets]

    def begin(self) -> None:
        """Open the study.

        Raises:
            ConfigError: the study in this directory is of another search.
        """
        from rlhf.cli.sweep.optuna_study import Study

        fixed = [redacted(text) for key, text in self.fixed.items() if key not in CHANGEABLE_OVERRIDES]
        swept = [str(override.input_line) for override in self.swept.values()]
        self.study = Study(self.directory, self.knobs, sorted([*fixed, *swept]), self.distributions)
        for number, values in self.study.known():
            trial = self.trial(number, values)
            trial.outcome = read_note(trial.directory)
            self.trials.append(trial)

    def proposals(self) -> Iterator[Trial]:
        """Trials that an earlier start left unfinished, then new ones."""
        yield from [self.trials[number] for number in self.study.unfinished()]
        while (asked := self.study.ask()) is not None:
            self.trials.append(self.trial(*asked))
            yield self.trials[-1]

    def ended(self, trial: Trial) -> None:
        """Report the result to the study."""
        assert trial.outcome is not None
        self.study.tell(trial.number, trial.outcome)


def space_of(key: str, override: Override) -> tuple[BaseDistribution, list[str]]:
    """The search space of a key, and values to check first: the end of an interval, or all values of a list.

    Raises:
        ConfigError: the space is empty, or a tag is unknown.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    sweep = override.value()
    tags = sweep.tags if isinstance(sweep, IntervalSweep | RangeSweep) else set()
    if tags - {"log"}:
        raise ConfigError(f"{key}: there is no tag {min(tags - {'log'})}. Known: log.")
    try:
        if isinstance(sweep, IntervalSweep):
            assert sweep.start is not None and sweep.end is not None
            if isinstance(sweep.start, int):  # int(interval(1,8))
                return IntDistribution(sweep.start, int(sweep.end), "log" in tags), [str(sweep.end)]
            return FloatDistribution(sweep.start, sweep.end, "log" in tags), [str(sweep.end)]
        values = [*override.sweep_string_iterator()]
        if isinstance(sweep, RangeSweep) and all(isinstance(value, int) for value in sweep.range()):
            numbers = sorted(map(int, values))
            step = abs(int(sweep.step))
            return IntDistribution(numbers[0], numbers[-1], "log" in tags, step), [str(numbers[-1])]
        return CategoricalDistribution(sorted(set(values))), values
    except (ValueError, IndexError) as error:
        raise ConfigError(
            f"{key}={override.get_value_string()}: {str(error).rstrip('.')}. Give an interval, a range or a "
            "list with values in it."
        ) from None


SWEEPERS = {f"rlhf.cli.sweep.sweepers.{sweeper.__name__}": sweeper for sweeper in (GridSweep, OptunaSweep)}
_is_hydra_plugin = Plugins.is_in_toplevel_plugins_module


def register() -> None:
    """Register the sweepers with Hydra. Call it before Hydra's main."""
    for sweeper in SWEEPERS.values():
        Plugins.instance().register(sweeper)
    # Hydra 1.3 instantiates only plugins in the package `hydra_plugins`, even if others are registered
    Plugins.is_in_toplevel_plugins_module = staticmethod(  # type: ignore[assignment]  # replaced on purpose
        lambda name: name in SWEEPERS or _is_hydra_plugin(name)
    )
