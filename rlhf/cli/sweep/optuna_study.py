"""A sweep's optuna study, in a file that may be on a shared file system. Only this module imports optuna.

A trial without a reported result stays open. The next start runs it again with the same values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from rlhf.config import ConfigError
from rlhf.exit_codes import DONE
from rlhf.pipeline.settings import SweepConfig
from rlhf.report.trial import Outcome

JOURNAL = "study.journal"


class Study:
    """Proposes values for trials and gets their results."""

    def __init__(
        self,
        directory: Path,
        knobs: SweepConfig,
        overrides: Sequence[str],
        distributions: Mapping[str, BaseDistribution],
    ) -> None:
        """Begin the study, or continue the existing one.

        Raises:
            ConfigError: the existing study is of another search.
        """
        self._knobs, self._distributions = knobs, dict(distributions)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        journal = (directory / JOURNAL).resolve()  # absolute: optuna's lock is a symbolic link to it
        if journal.exists():
            lines = journal.read_bytes()
            journal.write_bytes(lines[: lines.rfind(b"\n") + 1])  # a killed process may have left half a line
        self._study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(journal))),
            study_name=directory.name,
            direction=knobs.direction,
            load_if_exists=True,
        )
        search = [*overrides, f"sweep.metric={knobs.metric}", knobs.direction, f"sweep.seed={knobs.seed}"]
        known = self._study.user_attrs.get("search", search)
        if known != search:
            before, now = sorted({*known} - {*search}), sorted({*search} - {*known})
            raise ConfigError(
                f"run_name={directory.name} is a study with another search: it had "
                f"{', '.join(before) or '-'}, this one has {', '.join(now) or '-'}. Choose another run_name."
            )
        self._study.set_user_attr("search", search)

    def known(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Number and values of each trial so far."""
        for trial in self._study.get_trials(deepcopy=False):
            yield trial.number, {key: _text(value) for key, value in trial.params.items()}

    def unfinished(self) -> list[int]:
        """Numbers of trials that were killed or stopped."""
        numbers = []
        for trial in self._study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            if trial.params.keys() == self._distributions.keys():
                numbers.append(trial.number)
            else:  # killed while its values were proposed: nothing is lost
                self._study.tell(trial.number, state=TrialState.FAIL)
        return numbers

    def ask(self) -> tuple[int, dict[str, str]] | None:
        """Number and values of a new trial; None if there are `sweep.trials` of them.

        The sampler's seed depends on the number, so that an interruption changes no proposal.
        """
        number = len(self._study.get_trials(deepcopy=False))
        if number >= self._knobs.trials:
            return None
        self._study.sampler = TPESampler(seed=10_000 * self._knobs.seed + number)
        trial = self._study.ask(self._distributions)
        return trial.number, {key: _text(value) for key, value in trial.params.items()}

    def tell(self, number: int, outcome: Outcome) -> None:
        """Report a trial's result.

        Raises:
            ConfigError: the trial is done, but has no metric `sweep.metric`.
        """
        assert self._knobs.metric is not None
        if outcome.can_continue:
            return
        if outcome.code == DONE and self._knobs.metric not in outcome.metrics:
            stage = self._knobs.metric.partition("/")[0]
            names = ", ".join(name for name in outcome.metrics if name.startswith(f"{stage}/"))
            raise ConfigError(
                f"sweep.metric={self._knobs.metric}: trial {number} has no such metric. Use one of {names}."
            )
        value = outcome.metrics.get(self._knobs.metric)
        if outcome.code == DONE and value is not None and math.isfinite(value):
            self._study.tell(number, value)
        else:
            self._study.tell(number, state=TrialState.FAIL)


def _text(value: str | float) -> str:
    return value if isinstance(value, str) else repr(value)
