"""The metrics of stages: one table from which reports, gates, shaded plots and verdicts are made."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal, NamedTuple

from rlhf.config import ConfigError, did_you_mean
from rlhf.evaluation.sampled import INTERVAL_SUFFIXES

if TYPE_CHECKING:
    from rlhf.pipeline.stage import Stage

INTERVAL = re.compile(rf"({'|'.join(filter(None, INTERVAL_SUFFIXES))})(?=/|$)")
"""The suffix in the name of a metric that is an end of another metric's interval, or its number of rows."""


class Healthy(NamedTuple):
    """The healthy range of a stage's curve; the stage's page of the documentation says why."""

    min: float | None = None
    """The smallest healthy value; None for no limit."""
    max: float | None = None
    """The largest healthy value; None for no limit."""
    gate: str | None = None
    """The gate whose bound is used instead, as it is set. If it is turned off, there is no healthy range."""
    from_start: bool = False
    """Whether the limits are changes since the curve's value at step 0, before anything is learned."""


class Metric(NamedTuple):
    """A metric of a stage. The texts may contain `{title}`, the stage's model as tables name it, and
    `{label}`, the label of a named instance."""

    words: str = ""
    """Its name in the table of stages; empty: it is not shown there."""
    format: str = ""
    """Its number format in that table, such as `.2f`."""
    is_shown_at_zero: bool = True
    """False: that table leaves it out if it is 0."""
    better: Literal["higher", "lower"] | None = None
    """Set for the metric that tells, with its interval, whether the stage reached its purpose. 0 is no
    change."""
    purpose: str = ""
    """Name of that metric in the verdict, such as `{title}'s loss on held-out answers`."""
    healthy: Healthy | None = None
    """Healthy range of the curve of this name, which the run's page shades. A curve with the name of a gate
    has the gate's bound."""
    is_curve: bool = False
    """Whether it is only logged by step: no summary has it, so no gate can bound it."""


SIZES: Mapping[str, Metric] = {
    "trained_parameters": Metric("trained parameters", ",.0f"),
    "artifact_bytes": Metric("artifact MB", ".2f"),
    "adapter_bytes": Metric("adapter MB", ".2f"),
}
"""Metrics of every stage that trains."""
TUNED: Mapping[str, Metric] = {
    **SIZES,
    "token_seconds": Metric("ms per token", ".1f"),
    "token_seconds_base": Metric("without adapter", ".1f"),
}
"""Metrics of every stage that trains a policy: what its method of tuning costs."""


def named(*names: str) -> dict[str, Metric]:
    """Metrics that have nothing but a name."""
    return dict.fromkeys(names, Metric())


def summary_names(stage: Stage) -> list[str]:
    """The summary metrics that a stage may publish, which gates and sweeps may name; `a*` stands for all that
    begin with a. Empty: the stage declares none, and any may be named."""
    return [*(name for name, each in stage.metrics.items() if not each.is_curve), *stage.more_metrics()]


def check_declared(where: str, metric: object) -> None:
    """Refuse a declared metric that is no `Metric`, or has a wrong format.

    Args:
        where: the place of the declaration, for the message.

    Raises:
        ConfigError: why.
    """
    if not isinstance(metric, Metric):
        raise ConfigError(f"{where} is {metric!r}. Write a Metric, such as Metric('loss', '.2f').")
    try:
        format(1.0, metric.format)
    except ValueError as error:
        raise ConfigError(f"{where}: its format {metric.format!r}: {error}. Use one such as '.2f'.") from None


def as_summary(stage: Stage, returned: object) -> dict[str, float]:
    """The summary metrics that a stage's `run` returned, as numbers.

    Raises:
        ConfigError: it is no mapping of numbers.
    """
    try:
        if not isinstance(returned, Mapping):
            raise TypeError
        return {str(name): float(value) for name, value in returned.items()}
    except (TypeError, ValueError):
        raise ConfigError(
            f"{stage.name}: {type(stage).__name__}.run returned {reprlib.repr(returned)}. Return its summary "
            'metrics, numbers by their names, such as {"loss": 0.5}; none are {}.'
        ) from None


def undeclared(stage: Stage, names: Iterable[str]) -> list[str]:
    """The names that a stage published and did not declare; none if it declares no metrics."""
    known = summary_names(stage)

    def is_known(name: str) -> bool:
        return any(fnmatchcase(each, pattern) for each in (name, INTERVAL.sub("", name)) for pattern in known)

    return [name for name in names if known and not is_known(name)]


def check_metric(stage: Stage, name: str, key: str) -> None:
    """Refuse the name of a metric that a stage never publishes.

    Args:
        key: the key that has the name.

    Raises:
        ConfigError: it suggests similar names.
    """
    known = summary_names(stage)
    if undeclared(stage, [name]):
        raise ConfigError(
            f"{key}: {stage.name} has no metric {name}.{did_you_mean(name, known)} "
            f"It measures {', '.join(known)}."
        )


def purpose_metric(stage: Stage) -> tuple[str, Metric] | None:
    """The metric that tells whether the stage reached its purpose: its name, and its entry with texts filled
    in; None if there is none."""
    for name, metric in stage.metrics.items():
        if metric.better is not None:
            return name, metric._replace(purpose=stage.filled(metric.purpose))
    return None


def healthy_curves(stage: Stage) -> dict[str, Healthy]:
    """Curve -> its healthy range, with the bounds of the stage's gates as they are set."""
    return dict(_healthy_curves(stage))


def _healthy_curves(stage: Stage) -> Iterator[tuple[str, Healthy]]:
    for curve, metric in stage.metrics.items():
        if (healthy := metric.healthy) is None:
            continue
        bound = stage.gates.get(healthy.gate) if healthy.gate else None
        if bound is not None:
            yield curve, healthy._replace(min=bound.min, max=bound.max)
        elif healthy.gate is None:
            yield curve, healthy
