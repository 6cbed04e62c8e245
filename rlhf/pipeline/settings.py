"""`launch.*`, `sweep.*` and `decide.*`, without torch; values: conf/config.yaml."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from rlhf.config import ConfigError, Strict, did_you_mean
from rlhf.pipeline.metrics import check_metric

if TYPE_CHECKING:
    from rlhf.pipeline.stage import Stage


Metric = Annotated[str, Field(pattern=r"^\w+(@\w+)?/\S+$")]
"""A summary metric, `STAGE/NAME`."""


class ParetoConfig(Strict):
    """`sweep.pareto.*`: the two metrics of a trade-off; both are 0 for the base model."""

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
    """Number of all trials of an optuna study."""
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
        """Check that the trials measure the named metrics, and that a picture can be drawn if it is wanted.

        Raises:
            ConfigError: they do not, or it cannot.
        """
        for key, metric in self.metrics.items():
            stage, _, name = metric.partition("/")
            if stage not in stages:
                raise ConfigError(
                    f"{key}={metric}: the trials have no such stage.{did_you_mean(stage, stages)} "
                    f"Use STAGE/NAME with one of {', '.join(stages)}; a run's summary.json has the names."
                )
            check_metric(stages[stage], name, f"{key}={metric}")
        if self.pareto is not None and find_spec("matplotlib") is None:
            raise ConfigError("sweep.pareto draws with matplotlib: pip install -e '.[compare]'.")


class LaunchConfig(Strict):
    """`launch.*`: the ranks that `python -m rlhf` starts by itself."""

    processes: PositiveInt | None
    """Ranks on this machine; null uses one for each visible GPU, or one without a GPU."""


class LimitConfig(Strict):
    """The range of a figure in which a finalist may be shipped; null is no limit."""

    min: float | None = None
    """Lowest allowed value."""
    max: float | None = None
    """Highest allowed value."""

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min={self.min:g} is above max={self.max:g}; give a min that is not above it")
        return self


class LimitsConfig(Strict):
    """`decide.limits`: figures of the final evaluation, as on docs/stages/evaluate.md."""

    seconds_p50: LimitConfig
    seconds_p95: LimitConfig
    cost_per_thousand: LimitConfig
    memory_bytes: LimitConfig
    retention_perplexity_ratio: LimitConfig
    question_accuracy_change: LimitConfig
    length_ratio: LimitConfig
    stop_rate: LimitConfig

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Figure with a limit -> lowest and highest allowed value."""
        return {
            figure: (-math.inf if each.min is None else each.min, math.inf if each.max is None else each.max)
            for figure, each in self
            if each != LimitConfig()
        }


class CandidateConfig(Strict):
    """`decide.candidates.NAME`: a way to get better answers. Values: conf/decide/."""

    title: str
    """What tables call it."""
    asks: str
    """Who answers, as in evaluate.policies: `base+few_shot`, `sft`, `sft+retrieval`, `ppo`."""
    set: tuple[str, ...] = ()
    """Keys of its runs, as on the command line, such as `sft.peft=lora`."""
    length: str | None = None
    """The key that says how long it trains, such as `sft.epochs`. Pilots train a share of it. Null: it always
    trains to its end."""
    needs: tuple[Literal["verifier"], ...] = ()
    """`verifier`: only if its policy learns from a verifier, which checks answers against right ones."""
    slow: bool = False
    """It may look bad in its first steps: it is not dropped for its quality before its full length."""


def _shares(shares: list[float]) -> list[float]:
    if shares != sorted({*shares}) or shares[-1] != 1.0:
        raise ValueError("give rising shares, of which the last is 1, such as [0.25,0.5,1]")
    return shares


class DecideConfig(Strict):
    """`decide.*`: which way to tune, if any, is worth it: only read by `recipe=decide`."""

    candidates: dict[str, CandidateConfig]
    """What can be tried: name -> how. `'~decide.candidates.NAME'` leaves one out."""
    only: list[str] | None
    """The candidates that are tried, such as `[base,few_shot,sft]`; null tries all."""
    set: list[str]
    """Keys of all runs, as on the command line. A constant rate lets longer pilots continue shorter ones."""
    shares: Annotated[list[PositiveFloat], Field(min_length=1), AfterValidator(_shares)]
    """Share of a candidate's length that it has trained after each rung."""
    finalists: PositiveInt
    """Largest number of candidates that the sealed questions judge."""
    smallest_gain: NonNegativeFloat
    """The smallest gain worth training for, in units of the judge's score. With 0, `do not train` is only
    said of candidates that are worse."""
    limits: LimitsConfig
    """Figure of the final evaluation -> the range in which a finalist may be shipped, such as
    `decide.limits.retention_perplexity_ratio.max=1.15`."""
    seeds: PositiveInt
    """1: the winner is the very model that was judged. More: each finalist is trained with so many seeds, and
    the winner is a method."""
    num_timed: NonNegativeInt
    """Number of sealed questions that finalists are asked one at a time, for latency and cost."""
    requests: NonNegativeFloat
    """Number of answers that training must pay off for: of equal finalists, the one whose training and
    answers cost less is the winner."""

    @model_validator(mode="after")
    def _only_known_ones(self) -> Self:
        if self.only == []:
            raise ValueError("decide.only=[]: name at least one candidate, or null to try all of them")
        for name in self.only or []:
            if name not in self.candidates:
                near = did_you_mean(name, self.candidates)
                raise ValueError(
                    f"decide.only: there is no candidate {name}.{near} Known: {', '.join(self.candidates)}"
                )
        return self

    @property
    def tried(self) -> dict[str, CandidateConfig]:
        """The candidates that are tried."""
        return {
            name: each for name, each in self.candidates.items() if self.only is None or name in self.only
        }
