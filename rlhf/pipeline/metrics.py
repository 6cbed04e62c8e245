"""What is known of a stage's figures: from one table follow reports, gates, shades and verdicts."""

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
"""The end of a name that tells a figure's interval, or on how many rows it stands."""


class Healthy(NamedTuple):
    """Where a curve of a stage is healthy; the stage's page of the documentation says why."""

    min: float | None = None
    """The smallest healthy value; None for no end."""
    max: float | None = None
    """The largest healthy value; None for no end."""
    gate: str | None = None
    """The gate whose bound holds instead, as it is set. Where it is turned off, nothing is said."""
    from_start: bool = False
    """Whether the ends are changes since the curve's value at step 0, before anything is learned."""


class Metric(NamedTuple):
    """A figure of a stage. The words may have `{title}`, what tables call the stage's model, and `{label}`,
    the label of a named instance."""

    words: str = ""
    """What the table of stages calls it; empty: it is not shown there."""
    format: str = ""
    """How that table shows it, such as `.2f`."""
    is_shown_at_zero: bool = True
    """False: that table shows it only where there is some."""
    better: Literal["higher", "lower"] | None = None
    """Of the metric that tells, with its interval, whether the stage did what it is for. 0 is no change."""
    purpose: str = ""
    """What the verdict calls that metric, such as `{title}'s loss on held-out answers`."""
    failed: str = ""
    """What the verdict says where it is not better, such as `it learned nothing of its examples`."""
    healthy: Healthy | None = None
    """Of the curve of this name: where it is healthy. The run's page shades it. A curve with the name of a
    gate has the gate's bound."""
    is_curve: bool = False
    """Whether it is logged by step alone: no summary has it, so no gate can bound it."""


SIZES: Mapping[str, Metric] = {
    "trained_parameters": Metric("trained parameters", ",.0f"),
    "artifact_bytes": Metric("artifact MB", ".2f"),
    "adapter_bytes": Metric("adapter MB", ".2f"),
}
"""Of every stage that trains."""
TUNED: Mapping[str, Metric] = {
    **SIZES,
    "token_seconds": Metric("ms per token", ".1f"),
    "token_seconds_base": Metric("without adapter", ".1f"),
}
"""Of every stage that trains a policy: what its method of tuning costs."""


def named(*names: str) -> dict[str, Metric]:
    """Metrics of which no more is known than their names."""
    return dict.fromkeys(names, Metric())


def summary_names(stage: Stage) -> list[str]:
    """The summary metrics that a stage may publish, which gates and sweeps may name; `a*` stands for all that
    begin with a. None are said: any may be named."""
    return [*(name for name, each in stage.metrics.items() if not each.is_curve), *stage.more_metrics()]


def check_shown(said: str, metric: object) -> None:
    """Refuse what is no metric, or cannot be shown.

    Args:
        said: where it stands.

    Raises:
        ConfigError: why.
    """
    if not isinstance(metric, Metric):
        raise ConfigError(f"{said} is {metric!r}. Write a Metric, such as Metric('loss', '.2f').")
    try:
        format(1.0, metric.format)
    except ValueError as error:
        raise ConfigError(f"{said}: its format {metric.format!r}: {error}. Use one such as '.2f'.") from None


def as_summary(stage: Stage, returned: object) -> dict[str, float]:
    """What a stage's `run` returned, as numbers.

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
    """Those that a stage published, though its `metrics` names some and not them."""
    known = summary_names(stage)

    def is_known(name: str) -> bool:
        return any(fnmatchcase(each, pattern) for each in (name, INTERVAL.sub("", name)) for pattern in known)

    return [name for name in names if known and not is_known(name)]


def check_metric(stage: Stage, name: str, key: str) -> None:
    """Refuse the name of a metric that a stage never publishes.

    Args:
        key: where the name stands.

    Raises:
        ConfigError: with the names that are near.
    """
    known = summary_names(stage)
    if undeclared(stage, [name]):
        raise ConfigError(
            f"{key}: {stage.name} has no metric {name}.{did_you_mean(name, known)} "
            f"It measures {', '.join(known)}."
        )


def purpose(stage: Stage) -> tuple[str, Metric] | None:
    """The metric that tells whether the stage did what it is for, with its words filled in."""
    for name, metric in stage.metrics.items():
        if metric.better is not None:
            purpose, failed = stage.filled(metric.purpose), stage.filled(metric.failed)
            return name, metric._replace(purpose=purpose, failed=failed)
    return None


def healthy_curves(stage: Stage) -> dict[str, Healthy]:
    """Where the stage's curves are healthy, with the bounds of its gates as they are set."""
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
