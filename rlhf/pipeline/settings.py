"""`launch.*` and `sweep.*`, without torch; values: conf/config.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

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
