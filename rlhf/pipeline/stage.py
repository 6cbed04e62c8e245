"""What every stage is: a typed, frozen config with one method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args

from pydantic import PrivateAttr

from rlhf.config import Bound, ConfigError, Strict, did_you_mean
from rlhf.costs.setup import CostContext
from rlhf.costs.stage_cost import StageCost
from rlhf.data.prepared import LengthStats, PreparedData
from rlhf.data.roles import ROLES, Role
from rlhf.data.sources import Sources
from rlhf.digests import DirectoryDigest, directory_digest
from rlhf.distributed.compute import Compute
from rlhf.models.base import BaseModelFiles
from rlhf.models.peft.config import PeftConfig
from rlhf.models.start import IS_MODEL, directory_of, init_digest, init_in_key, inputs_of
from rlhf.pipeline.job import Job
from rlhf.pipeline.metrics import Metric
from rlhf.pipeline.recipe import kind_of
from rlhf.pipeline.store import Artifact
from rlhf.rewards.kinds import RewardMix, keyed_parts, reward_digest, stage_of
from rlhf.tracking.redaction import redacted


class Mount(NamedTuple):
    """Where a stage stands in the config."""

    name: str
    """Its section, and its directory in the store: `dpo`, or `dpo@2` of a named instance."""
    roles: Mapping[str, str] = {}
    """The roles that it reads from a source of its own, and what these are called in the table of roles: of a
    named instance, or of a stage derived from one that reads them."""

    @property
    def label(self) -> str:
        """Of a named instance: `2` of `dpo@2`."""
        return self.name.partition("@")[2]


class Stage(Strict, ABC):
    """One step of the chain. It reads artifacts and data sets and publishes one artifact.

    A subclass's fields are its knobs; their values live in conf/stages/NAME.yaml.
    """

    title: ClassVar[str] = ""
    """What tables call the model that it publishes, without the label of a named instance."""
    publishes: ClassVar[Literal["policy", "reward"] | None] = None
    """A policy can be evaluated, compared and merged; a reward scores."""
    metrics: ClassVar[Mapping[str, Metric]] = {}
    """The figures that it publishes and logs, by their names without the stage's; `a*` stands for all that
    begin with a. It decides no result, so it is in no key."""
    repeats_keys: ClassVar[bool] = False
    """Whether its YAML repeats keys of others (`${ppo.reward}`): a complaint shall name the others' first."""
    version: ClassVar[int] = 1
    """Raise it when the stage's code changes what it publishes: old artifacts are then not reused."""
    random: ClassVar[bool] = True
    """Whether the seed and the precision decide the result."""
    samples: ClassVar[bool] = False
    """Whether it samples from a policy, so that `generation` decides the result."""
    reads_weights: ClassVar[bool] = True
    """Whether it loads a model, or only what describes one."""
    in_chain: ClassVar[bool] = True
    """Whether `stage=all` runs it; others run only where they are named."""
    is_timed: ClassVar[bool] = False
    """Whether it says how long sampling took, so that `vllm.*` decide the result."""
    records: ClassVar[bool] = False
    """Whether it adds to a file outside the store while it runs. The digest of what it publishes of that
    (`recorded`) is in its key: taken before it runs, and again from the job when it is done."""
    cacheable: ClassVar[bool] = True
    """Whether its artifact is taken instead of running it again."""
    roles: ClassVar[Mapping[str, Role]] = {}
    """Data roles that it brings along, by name: `prepare` reads, checks, splits and counts their rows."""
    offers: ClassVar[Mapping[str, str]] = {}
    """Roles that may read what it makes, as `stage:NAME`: the file in its artifact with their rows."""
    divided: ClassVar[tuple[str, ...]] = ()
    """Its knobs that are sizes of batches over all ranks, which must be able to share them equally."""
    not_in_key: ClassVar[frozenset[str]] = frozenset()
    """Knobs that cannot change the result (micro-batch sizes, intervals). `gates` is always one."""

    _mount: Mount = PrivateAttr(Mount(""))
    _makers: tuple[str, ...] = PrivateAttr(())
    gates: dict[str, Bound | None]
    """Summary metric -> the range it must lie in. Checked after every run and every reuse;
    null turns a bound off."""

    def model_post_init(self, context: Any) -> None:
        """Where it is mounted is the context of its validation."""
        if isinstance(context, Mount):
            self._mount = context

    @property
    def name(self) -> str:
        """Where it is mounted: its section in the config, and its directory in the store."""
        return self._mount.name

    @property
    def is_instance(self) -> bool:
        """Whether it is a stage once more, under a label: `dpo@2`."""
        return bool(self._mount.label)

    @property
    def full_title(self) -> str:
        """What tables call the model that it publishes."""
        return f"{self.title} {self._mount.label}".strip()

    def filled(self, words: str) -> str:
        """Words of `metrics` as they are said of this stage."""
        label = self._mount.label
        return words.replace("{title}", self.full_title).replace("{label}", f" {label}" if label else "")

    def inputs(self) -> tuple[str, ...]:
        """The stages whose artifacts this one reads: by default all that its other hooks name."""
        return (
            *(("prepare",) if self.datasets() else ()),
            *(name for _, model in self.models() for name in inputs_of(model)),
            *(name for _, name in self.named_policies()),
            *self._makers,
            *filter(None, (stage_of(part.source) for _, part in keyed_parts(self.rewards()))),
            *(("generate",) if kind_of(self.name) != "generate" and any(self.normalized_rewards()) else ()),
        )

    def starts_from(self) -> tuple[str, str] | None:
        """The model that it trains or samples from, where a key names it: that key without the stage's name,
        and its value (a stage, `base` or a directory)."""
        return None

    def models(self) -> Iterator[tuple[str, str]]:
        """All models that its keys name: that of `starts_from`, and those of type `Init`. Keys without the
        stage's name, and values. What the models hold decides the result."""
        start = self.starts_from()
        if start:
            yield start
        for key, info in type(self).model_fields.items():
            marks = [*info.metadata]
            for each in get_args(info.annotation):  # of `Init | None`
                marks += getattr(each, "__metadata__", ())
            if IS_MODEL in marks and (model := getattr(self, key)) is not None and (key, model) != start:
                yield key, model

    def digest_name(self, key: str) -> str:
        """What the digest of a model that this key names is called in `external_digests`."""
        start = self.starts_from()
        return "init" if start and key == start[0] else key

    def datasets(self) -> tuple[str, ...]:
        """The roles whose prepared data this one reads: names in `rlhf.data.roles.ROLES`."""
        return ()

    @property
    def makers(self) -> tuple[str, ...]:
        """The stages that make rows which it reads: see rlhf/pipeline/made_rows.py."""
        return self._makers

    def know_makers(self, names: Iterable[str]) -> None:
        """These stages make rows that it reads."""
        self._makers = tuple(dict.fromkeys(names))

    def own_role(self, role: str) -> str:
        """What a role that it reads is called in the table of roles."""
        return self._mount.roles.get(role, role)

    def offer_advice(self) -> str:
        """How to have it make more rows for others, in the user's own keys."""
        raise NotImplementedError

    def check_offers(self, said: str, chain: Mapping[str, Stage]) -> None:
        """Refuse to make rows for others where the knobs are sure to give none.

        Args:
            said: the key that wants them, and its value.
            chain: all stages, where others' knobs decide too.

        Raises:
            ConfigError: in the user's own keys.
        """

    def offered_lengths(self, on: CostContext, chain: Mapping[str, Stage]) -> LengthStats:
        """How many rows it makes for others (`offers`), and how long, at most: for a cost."""
        raise NotImplementedError

    def recorded(self, inputs: Mapping[str, Artifact], external: Mapping[str, str]) -> str:
        """Of a stage that `records`: the digest of what it has recorded so far.

        Args:
            inputs: finished artifacts, with those that it reads.
            external: its `external_digests`.
        """
        raise NotImplementedError

    def suffices(self, metrics: Mapping[str, float]) -> bool:
        """Whether an artifact with these summary metrics is taken instead of running the stage again."""
        return True

    def needs(self, chain: Mapping[str, Stage]) -> tuple[str, ...]:
        """Those of `datasets` that it cannot do without: a run that lacks their data is refused."""
        return self.datasets()

    def named_policies(self) -> Iterator[tuple[str, str]]:
        """The stages whose policies it reads by name: a key, and the stage that it names."""
        yield from ()

    def rewards(self) -> Mapping[str, str | RewardMix]:
        """Key -> the reward that it names, such as `ppo.reward` -> `vader`; without those that are null."""
        return {}

    def normalized_rewards(self) -> Iterator[tuple[str, RewardMix]]:
        """Those whose parts are normalised as `generate` measured them."""
        for key, source in self.rewards().items():
            if not isinstance(source, str) and source.normalize:
                yield key, source

    def init_directory(self) -> Path | None:
        """A directory of the user's that holds the model it trains, instead of the base or the SFT model."""
        start = self.starts_from()
        return directory_of(start[1]) if start and self.peft_config() is not None else None

    def reads_base_model(self) -> bool:
        """Whether the base model itself (not only a stage's output) decides the result."""
        return any(model == "base" for _, model in self.models())

    def more_metrics(self) -> Iterable[str]:
        """Names of metrics that follow from its keys, beside those of `metrics`."""
        return ()

    def peft_config(self) -> PeftConfig | None:
        """Which parameters it trains; None where it trains none."""
        return None

    def check(self, chain: Mapping[str, Stage]) -> None:
        """Refuse what does not fit together with the other stages' knobs.

        Raises:
            ConfigError: in the user's own keys.
        """

    def check_run(self, directory: Path) -> None:
        """Refuse what does not fit the run's directory, before anything in it is replaced.

        Raises:
            ConfigError: in the user's own keys.
        """

    def check_data(self, data: PreparedData, base: BaseModelFiles) -> None:
        """Refuse prepared data that do not fit the knobs or the base model, whose weights may not be there
        yet; called before any stage trains.

        Raises:
            ConfigError: in the user's own keys.
        """

    def misfits(self, data: PreparedData, base: BaseModelFiles, chain: Mapping[str, Stage]) -> Iterator[str]:
        """Complaints about what does not fit the user's own models that it or the others start from, in the
        user's own keys; asked before any stage trains, where the store lacks what this one makes."""
        yield from ()

    def answering(self, chain: Mapping[str, Stage]) -> Iterator[tuple[str, str]]:
        """The models that it samples from: a key, and where their training began (`base` or a directory). By
        default the one that `starts_from` names, where it samples."""
        start = self.starts_from()
        if self.samples and start:
            yield root_of(f"{self.name}.{start[0]}", start[1], chain)

    def check_compute(self, compute: Compute) -> None:
        """Refuse what these ranks and this machine cannot do; called before any stage trains, where the store
        lacks what this one makes. By default: `divided` sizes that the ranks cannot share equally.

        Raises:
            ConfigError: with what they can.
        """
        for name in self.divided:
            compute.check_divides(f"{self.name}.{name}", getattr(self, name), self.unit())

    def unit(self) -> int:
        """Sizes in `divided` are multiples of it."""
        return 1

    def not_checked(self) -> dict[str, str]:
        """Gates that do not apply with these knobs, and why: they are not checked, and the run says so."""
        return {}

    def external_digests(self, digest: DirectoryDigest = directory_digest) -> dict[str, str]:
        """Digests of what lies outside the store and decides the result: by default those of the rewards that
        it names, and of the user's models that it reads.

        Args:
            digest: takes those of directories; by default everything is read.
        """
        found: dict[str, str] = {}
        for source in self.rewards().values():
            found |= reward_digest(source, digest)
        for key, model in self.models():
            found |= init_digest(f"{self.name}.{key}", model, digest, name=self.digest_name(key))
        return found

    def knobs(self) -> dict[str, Any]:
        """The knobs that decide the result, as plain JSON values: part of the artifact's key. Of a model's
        directory the content decides, not the place."""
        knobs = self.model_dump(mode="json", exclude={"gates", *self.not_in_key})
        return knobs | {key: init_in_key(model) for key, model in self.models()}

    @abstractmethod
    def cost(self, on: CostContext, chain: Mapping[str, Stage]) -> StageCost:
        """What it needs in memory, phase by phase, and the work it does, from its knobs alone.

        Args:
            on: model, hardware, and the lengths of its data.
            chain: all stages, where others' knobs decide too.
        """

    @abstractmethod
    def run(self, job: Job) -> Mapping[str, float]:
        """Do the work in `job.directory`.

        Returns:
            The summary metrics, by names without the stage's. The pipeline publishes them with the directory.
        """


def root_of(key: str, init: str, chain: Mapping[str, Stage]) -> tuple[str, str]:
    """Where the training of a model began, however many stages there are between: the key that says so, and
    `base` or a directory.

    Args:
        key: what names `init`: a stage that makes a policy, `base` or a directory.
    """
    while init in chain:
        name, start = init, chain[init].starts_from()
        key, init = (f"{name}.{start[0]}", start[1]) if start else (key, "base")
    return key, init


def chain_of(name: str, chain: Mapping[str, Stage]) -> set[str]:
    """A stage and all that it is made from; nothing of what is no stage."""
    if name not in chain:
        return set()
    return {name}.union(*(chain_of(other, chain) for other in chain[name].inputs()))


def users_words(stage: Stage, base: BaseModelFiles | None = None) -> dict[str, str]:
    """What complaints from inside a stage call a thing -> what the user wrote: see `rlhf.config.said_as`.

    Args:
        base: the base model's files, once they are known.
    """
    words = {"STAGE": stage.name}
    for key, part in keyed_parts(stage.rewards()):
        if ":" in part.source:  # others are usual words
            said = redacted(part.source)
            words.setdefault(said, f"{key}={said}")
            words.setdefault(part.source.removeprefix("model:"), f"{key}={said}")
    if (directory := stage.init_directory()) is not None:
        words[str(directory)] = f"{stage.name}.init={directory}"
    if base is not None:
        words.setdefault(str(base.directory), base.config.said)
    return words


def in_order(stages: Mapping[str, Stage]) -> dict[str, Stage]:
    """The stages, every one behind those that it reads, else as they are mounted.

    Raises:
        ConfigError: a stage reads what is not there, or what is made from it.
    """
    found: dict[str, Stage] = {}

    def visit(name: str, readers: tuple[str, ...]) -> None:
        if name in readers:
            circle = " reads ".join((*readers[readers.index(name) :], name))
            raise ConfigError(
                f"{circle}: they read each other, so none can run first. Let one of them read another stage."
            )
        if name in found:
            return
        if name not in stages:
            add = (
                f"`{name}: {{}}` to `instances`"
                if "@" in name
                else f"`- stages@{name}: {name}` to the defaults"
            )
            raise ConfigError(
                f"{readers[-1]}: it reads {name}, and there is no such stage.{did_you_mean(name, stages)} "
                f"Add {add}, or let it read another stage."
            )
        for other in stages[name].inputs():
            visit(other, (*readers, name))
        found[name] = stages[name]

    for name in stages:
        visit(name, ())
    return found


def named_sources(chain: Mapping[str, Stage]) -> Sources:
    """What each role's key names, in the stages' own configs.

    Raises:
        ConfigError: a role's key is none of theirs.
    """
    return {name: named_source(chain, name) for name in ROLES}


def named_source(chain: Mapping[str, Stage], role: str) -> Any:
    """What the key of one role names.

    Raises:
        ConfigError: the key is none of these stages'.
    """
    key = ROLES[role].key
    section, *names = key.split(".")
    try:
        found: Any = chain[section]
        for name in names:
            found = dict(found)[name]
    except KeyError:
        raise ConfigError(
            f"{key}: the role {role} is read from there, and there is no such key. Add it to the stage, or "
            "change the role's key."
        ) from None
    return found
