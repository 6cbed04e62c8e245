"""The base class of all stages: a typed, frozen config with one method, `run`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import PrivateAttr

from rlhf.config import Bound, Complaint, Strict
from rlhf.costs.setup import CostContext
from rlhf.costs.stage_cost import StageCost
from rlhf.data.mount import Mount
from rlhf.data.prepared import PreparedData
from rlhf.data.roles import Role
from rlhf.digests import DirectoryDigest
from rlhf.distributed.compute import Compute
from rlhf.models.base import BaseModelFiles
from rlhf.pipeline.fields import Mark, Reads, fields_of, optims_of, reads_of
from rlhf.pipeline.job import Job
from rlhf.pipeline.metrics import Metric


@dataclass(frozen=True)
class View:
    """What is known of a run when its stages are checked: first only their config, later the run's directory,
    then data and ranks."""

    chain: Mapping[str, Stage]
    """All stages, by their names."""
    directory: Path | None = None
    """The run's directory, before anything in it is replaced."""
    data: PreparedData | None = None
    """The prepared rows, as the stage reads them. With them `base` is known."""
    base: BaseModelFiles | None = None
    """The base model, whose weights may not be there yet."""
    compute: Compute | None = None
    """The ranks on which the stage will run; None also if the store has its artifact."""

    @property
    def prepared(self) -> tuple[PreparedData, BaseModelFiles] | None:
        """The rows and the base model, once they are known."""
        return None if self.data is None or self.base is None else (self.data, self.base)


class Stage(Strict, ABC):
    """One step of the chain. It reads artifacts and data sets and publishes one artifact.

    A subclass's fields are its knobs; their values live in conf/stages/NAME.yaml.
    """

    title: ClassVar[str] = ""
    """Name in tables of the model that it publishes, without the label of a named instance."""
    makes: ClassVar[Literal["policy", "reward"] | None] = None
    """A policy can be evaluated, compared and merged; a reward scores."""
    metrics: ClassVar[Mapping[str, Metric]] = {}
    """The metrics that it publishes and logs, by their names without the stage's; `a*` stands for all that
    begin with a."""
    repeats_keys: ClassVar[bool] = False
    """Whether its YAML repeats other stages' keys (`${ppo.reward}`): a complaint then names theirs first."""
    version: ClassVar[int] = 1
    """Raise it when the stage's code changes what it publishes: old artifacts are then not reused."""
    random: ClassVar[bool] = True
    """Whether the seed and the precision decide the result."""
    samples: ClassVar[bool] = False
    """Whether it samples from a policy, so that `generation` decides the result."""
    reads_weights: ClassVar[bool] = True
    """Whether it loads a model, or only what describes one."""
    in_chain: ClassVar[bool] = True
    """Whether `stage=all` runs it; other stages run only if they are named."""
    roles: ClassVar[Mapping[str, Role]] = {}
    """Data roles that it defines, by name: `prepare` reads, checks, splits and counts their rows."""
    _mount: Mount = PrivateAttr(Mount(""))
    gates: dict[str, Bound | None]
    """Summary metric -> the range it must lie in. Checked after every run and every reuse;
    null turns a bound off."""

    def model_post_init(self, context: Any) -> None:
        """Store the context of the validation: where the stage is mounted. A subclass that overrides this
        method must call it."""
        if isinstance(context, Mount):
            self._mount = context

    @property
    def mount(self) -> Mount:
        """Its place in the config, and what the other stages there offer it."""
        return self._mount

    @property
    def name(self) -> str:
        """Its section in the config, and its directory in the store."""
        return self._mount.name

    @property
    def full_title(self) -> str:
        """Name in tables of the model that it publishes."""
        return f"{self.title} {self._mount.label}".strip()

    def filled(self, words: str) -> str:
        """A text of `metrics` with this stage's title and label filled in."""
        label = self._mount.label
        return words.replace("{title}", self.full_title).replace("{label}", f" {label}" if label else "")

    def reads(self) -> Reads:
        """What it reads: by default what its fields name."""
        return reads_of(self)

    def needs(self, chain: Mapping[str, Stage]) -> tuple[str, ...]:
        """The roles that it reads and cannot do without: a run that lacks their data is refused."""
        return self.reads().roles

    def more_metrics(self) -> Iterable[str]:
        """Names of metrics that follow from its keys, in addition to those of `metrics`."""
        return ()

    def complaints(self, view: View) -> Iterator[Complaint]:
        """What does not fit, as far as it can be told from what is known. It is called again whenever more is
        known. By default: fields of the type `Batch` that the ranks cannot share equally. May raise
        ConfigError instead.

        Args:
            view: the other stages; later also the run's directory, the data, the base model and the ranks.
        """
        if view.compute is not None:
            for name in fields_of(type(self), Mark.BATCH):
                yield from view.compute.uneven_batch(f"{self.name}.{name}", getattr(self, name), self.unit())

    def unit(self) -> int:
        """Batch sizes must be multiples of it."""
        return 1

    def not_checked(self) -> dict[str, str]:
        """Gates that do not apply with these knobs, and why: they are not checked, and the run says so."""
        return {}

    def is_timed(self) -> bool:
        """Whether it publishes how long sampling took, so that `vllm.*` decide the result."""
        return False

    def unkeyed(self) -> tuple[str, ...]:
        """Knobs that decide nothing because other knobs turn them off, in addition to those of the type
        `Memory` and those that are `UNKEYED`."""
        return ()

    def has_open_end(self) -> bool:
        """Whether a longer training begins with the same steps, so that it can continue a shorter one. By
        default: one field has the mark `LENGTH`, and the rates of all optimizers have an open end. Override
        it if another setting spreads something over the length."""
        optims, lengths = [*optims_of(self)], fields_of(type(self), Mark.LENGTH)
        return bool(optims) and len(lengths) == 1 and all(each.has_open_end for each in optims)

    def external_digests(self, digest: DirectoryDigest, chain: Mapping[str, Stage]) -> dict[str, str]:
        """Digests of things outside the store that decide the result, in addition to the rewards and models
        that its fields name.

        Args:
            digest: computes the digest of a directory.
            chain: all stages.
        """
        return {}

    def cost(self, on: CostContext, chain: Mapping[str, Stage]) -> StageCost | None:
        """What it needs in memory, phase by phase, and the work it does, from its knobs alone.

        Returns:
            None: the cost follows from its fields. Each row of its first role is learned `epochs` times, in
            steps of its first `Batch` and passes of its first `Memory`, in tokens. Without fields of the
            types `Peft`, `Batch` and `Memory` the cost is empty.

        Args:
            on: model, hardware, and the lengths of its data.
            chain: all stages; other stages' knobs may matter too.
        """

    @abstractmethod
    def run(self, job: Job) -> Mapping[str, float]:
        """Do the work in `job.directory`.

        Returns:
            The summary metrics, by names without the stage's. The pipeline publishes them with the directory.
        """
