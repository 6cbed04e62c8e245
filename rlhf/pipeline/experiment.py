"""The composed config as typed objects: everything is checked before anything runs."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt
from pydantic.errors import PydanticUserError

from rlhf.config import ConfigError, Strict, did_you_mean, validated
from rlhf.data.mount import Mount
from rlhf.data.roles import ROLES, Roles
from rlhf.data.sources import SourceConfig, SourceList
from rlhf.distributed.compute import DistributedConfig, Zero
from rlhf.distributed.device import Precision, has_gpu
from rlhf.distributed.signals import uninterrupted
from rlhf.generation.vllm import VllmConfig
from rlhf.models.base import ATTENTION, ModelConfig
from rlhf.models.peft.methods import METHODS
from rlhf.pipeline.auto import with_judge, without_auto
from rlhf.pipeline.checks import check
from rlhf.pipeline.defaults import packaged_values
from rlhf.pipeline.fields import peft_of
from rlhf.pipeline.graph import in_order, inputs, named_sources, normalized_rewards, starts_from
from rlhf.pipeline.made_rows import check_made_rows, check_row_makers
from rlhf.pipeline.metrics import check_declared, check_metric
from rlhf.pipeline.recipe import (
    BEST_OF_N,
    RecipeConfig,
    check_recipe_sources,
    check_typed_instances,
    with_instances,
    with_own_roles,
)
from rlhf.pipeline.sampling_engine import unusable_by_vllm
from rlhf.pipeline.settings import DecideConfig, LaunchConfig, SweepConfig
from rlhf.pipeline.stage import Stage, View
from rlhf.rewards.code import import_code
from rlhf.rewards.http import RewardServerConfig
from rlhf.rewards.kinds import RewardSource
from rlhf.tracking.redaction import redacted
from rlhf.tracking.tracker import TrackerConfig
from rlhf.training.checkpoint import CheckpointConfig

Names = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]


class DemoConfig(Strict):
    """What `auto` uses as long as none of the data is yours: the packaged sets in `data/`."""

    sft: SourceConfig
    """What `sft.data=auto` uses."""
    pairs: SourceConfig
    """What `reward.pairs=auto` uses."""
    ppo: SourceConfig
    """What `ppo.prompts=auto` uses."""
    evaluate: SourceConfig
    """What `evaluate.prompts=auto` uses."""
    retention: SourceList
    """What `evaluate.retention=auto` uses."""
    gold: RewardSource | None
    """What `evaluate.gold=auto` uses."""


RUN_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$"
"""What a run may be called."""


class Settings(Strict):
    """The keys outside the stages' sections. Values: conf/config.yaml."""

    stage: Names
    """`all`, one stage, or a list. Stages that these need and that are not in the store run too."""
    run_name: str | None = Field(pattern=RUN_NAME)
    """Name of the run's directory. null: the time."""
    runs_dir: str
    """Directory of all runs."""
    store_dir: str
    """Directory of the store, which all runs share."""
    seed: NonNegativeInt
    """Seed of all random numbers in the run."""
    device: Literal["auto", "cpu"]
    """auto uses a GPU if there is one."""
    precision: Precision
    """Precision of weights and activations. auto uses bf16 if this hardware multiplies it faster, else fp32.
    fp16 is refused, because it would need loss scaling."""
    zero: Zero
    """What DeepSpeed shards over the ranks: nothing, the optimizer (1), also gradients (2), also weights (3).
    fsdp2 is torch's own and shards all three. hsdp does so over the ranks of a node, and each node has a
    full model."""
    generation: Literal["auto", "local", "vllm"]
    """The engine that samples responses: the trained model itself, or vLLM with a copy of its weights. auto
    uses vLLM on a GPU, if it is installed and can run every model of the config."""
    vllm: VllmConfig
    reward_server: RewardServerConfig
    launch: LaunchConfig
    distributed: DistributedConfig
    checkpoint: CheckpointConfig
    why: bool
    """Explain why each stage is reused or run, down to the changed key."""
    force: Names
    """Stages to run again, even if the store has their artifact; their checkpoints are deleted."""
    gates: Literal["enforce", "warn"]
    """Whether a failing gate ends the run (exit code 3) or is only reported."""
    preflight: Literal["enforce", "warn"]
    """enforce refuses a run before a model is loaded, if memory, disk or context are too small for it; warn
    only says so."""
    sweep: SweepConfig
    recipe: RecipeConfig
    budget: str | float | None
    """What `recipe=decide` may use; null: an ordinary run. A time (`90s`, `30m`, `2h`), GPU hours (`16gpuh`),
    or an amount of money in the currency of evaluate.price_per_hour (`20`)."""
    decide: DecideConfig
    instances: dict[str, dict[str, Any]]
    """Named instances: STAGE@LABEL, with its keys that differ from the stage's own. A name with {round} makes
    one instance for each round of the recipe after the first."""
    model: ModelConfig
    tracker: TrackerConfig
    demo: DemoConfig


@dataclass(frozen=True)
class Experiment:
    """A whole experiment; `settings.stage` says which part of it to run."""

    settings: Settings
    stages: Mapping[str, Stage]
    """In the chain's order: every stage comes after those that it reads."""
    resolved: Mapping[str, Any]
    """The composed config with every interpolation and every `auto` resolved, as plain values."""
    notes: tuple[str, ...] = ()
    """Lines that the run prints first: what `auto` means together with the user's own data."""
    composed: Mapping[str, Any] = field(default_factory=dict)
    """The config as composed: every `auto` is still there, and named instances have no sections yet."""

    def default_stages(self) -> set[str]:
        """The stages of `stage=all`: the recipe's; without a recipe those of the chain. A model that no other
        stage reads is then left out, unless it is the last one."""
        if self.settings.recipe.stages is not None:
            return set(self.settings.recipe.stages)
        chain = [name for name, stage in self.stages.items() if stage.in_chain and not stage.mount.label]
        last = [name for name in chain if peft_of(self.stages[name]) is not None][-1]
        names: set[str] = set()
        for name in reversed(chain):
            is_read = any(name in inputs(self.stages[later], self.stages) for later in names)
            if peft_of(self.stages[name]) is None or name == last or is_read:
                names.add(name)
        return names

    def needed(self) -> list[str]:
        """The requested stages and all stages that they read, in the chain's order."""
        wanted = set(self.settings.stage)
        if "all" in wanted:
            wanted |= self.default_stages()
        for name in reversed(list(self.stages)):
            if name in wanted:
                wanted |= set(inputs(self.stages[name], self.stages))
        return [name for name in self.stages if name in wanted]


def check_normalization(stage: Stage, chain: Mapping[str, Stage]) -> None:
    """Refuse `normalize=true` for rewards that `generate` does not measure.

    Raises:
        ConfigError: in the user's own keys.
    """
    for key, source in normalized_rewards(stage):
        if source not in chain["generate"].reads().rewards.values():
            raise ConfigError(
                f"{key}={source}: normalize=true takes each reward's mean and deviation from `generate`, so "
                f"generate.reward must be the same. Set generate.reward to it, or use normalize=false."
            )


def build_settings(resolved: Mapping[str, Any]) -> Settings:
    """Check the keys outside the stages' sections.

    Args:
        resolved: the config, with a section for every named instance.

    Raises:
        ConfigError: their complaints.
    """
    check_sections(resolved)
    return validated(Settings, {key: each for key, each in resolved.items() if not _is_stage(each)}, "")


def build_experiment(resolved: Mapping[str, Any]) -> Experiment:
    """Check the whole config.

    Raises:
        ConfigError: all complaints of the first section that has any.
    """
    composed = resolved
    judged, judge_notes = with_judge(resolved)
    resolved = with_instances(judged)
    settings = build_settings(resolved)
    sections = {name: each for name, each in resolved.items() if _is_stage(each)}
    if not settings.stage:
        raise ConfigError(f"stage=[]: nothing to do. Use all, or some of {', '.join(sections)}.")
    for key, names, extra in (
        ("stage", settings.stage, ["all"]),
        ("force", settings.force, []),
        ("recipe.stages", settings.recipe.stages or [], []),
    ):
        for name in names:
            if name not in sections and name not in extra:
                known = [*extra, *sections]
                hint = f" A named instance needs a key of its own, such as {name}.KEY=VALUE." * ("@" in name)
                if "@" in name and any("{round}" in each for each in composed["instances"] or {}):
                    hint += f" Those with {{round}} begin with round 2 of {settings.recipe.rounds}."

                raise ConfigError(
                    f"{key}={name}: there is no such stage.{did_you_mean(name, known)} "
                    f"Known: {', '.join(known)}.{hint}"
                )
    for key in ("run_name", "runs_dir", "store_dir"):
        if redacted(resolved[key]) != resolved[key]:
            raise ConfigError(f"{key}: there is a secret in it, and it names a directory. Use another name.")
    instances = settings.instances
    classes = {name: stage_class(name, section["_target_"]) for name, section in sections.items()}
    mounted = {name: each for name, each in classes.items() if name not in instances}
    roles, own_roles = with_own_roles(collect_roles(mounted), instances, mounted)
    makers = [name for name, each in classes.items() if each.makes == "policy"]
    resolved, own, notes = without_auto(resolved, roles, makers)
    checked: dict[str, Stage] = {}
    for name in sorted(sections, key=lambda name: classes[name].repeats_keys):
        values = {key: value for key, value in resolved[name].items() if key != "_target_"}
        mount = Mount(name, roles, own_roles.get(name, {}), makers)
        checked[name] = validated(classes[name], values, name, mount)
    for stage in checked.values():
        models = stage.reads().models.items()
        named = [(f"{stage.name}.{key}", model) for key, model in models if model in makers]
        check_policies(stage, named, checked)
        check_roles(stage)
    for stage in checked.values():  # after the models: `evaluate.policies=auto` follows from them
        check_policies(stage, stage.reads().policies, checked)
    check_row_makers(checked)
    stages = in_order({name: checked[name] for name in sections})
    for name, stage in stages.items():
        for gate, bound in stage.gates.items():
            if bound is not None:
                check_metric(stage, gate, f"{name}.gates.{gate}")
    experiment = Experiment(settings, stages, resolved, (*notes, *judge_notes), composed)
    check_typed_instances(composed, experiment.needed())
    check_recipe_sources(composed, experiment.needed())
    check_sources(experiment, own)
    for name in experiment.needed():
        check(stages[name], View(stages))
        check_normalization(stages[name], stages)
        check_made_rows(stages[name], stages)
        check_method(stages[name], experiment)
        peft = peft_of(stages[name])
        if peft is not None and peft.method == "qlora":
            check_qlora(f"{name}.peft=qlora", settings.device)
    return replace(experiment, notes=(*experiment.notes, *unused_instances(experiment)))


def check_sections(resolved: Mapping[str, Any]) -> None:
    """Refuse a value where a section belongs.

    Raises:
        ConfigError: in the user's own keys.
    """
    if "experiment" in resolved:
        raise ConfigError(
            "experiment: its keys stand below `experiment`, and not at the top. Write `# @package _global_` "
            "as the first line of your file, or name it by its path: +experiment=DIRECTORY/FILE.yaml."
        )
    packaged = packaged_values()
    for name, value in resolved.items():
        if isinstance(packaged.get(name), Mapping) and value is not None and not isinstance(value, Mapping):
            raise ConfigError(
                f"{name}={value}: {name} is a section of keys. Set them one by one, such as "
                f"{name}.KEY={value}."
            )


def unused_instances(experiment: Experiment) -> Iterator[str]:
    """A note on named instances that `stage=all` does not run."""
    needed, asked = experiment.needed(), experiment.settings.stage
    names = [name for name in experiment.settings.instances if name not in needed]
    if "all" in asked and names:
        yield (
            f"Not run: {', '.join(names)}. Nothing that stage=all means reads it. To run it: "
            f"stage=[{','.join([*asked, *names])}]."
        )


def collect_roles(classes: Mapping[str, type[Stage]]) -> Roles:
    """The packaged roles, and those that the stages define.

    Raises:
        ConfigError: two roles have the same name.
    """
    roles = dict(ROLES)
    for name, stage in classes.items():
        for role, entry in stage.roles.items():
            if roles.setdefault(role, entry) is not entry:
                raise ConfigError(
                    f"{name}: it brings a role {role} along, and there is one already. Rename it."
                )
    return roles


def check_roles(stage: Stage) -> None:
    """Refuse a stage that reads a role which does not exist.

    Raises:
        ConfigError: it names the roles that do.
    """
    known = stage.mount.roles
    for role in stage.reads().roles:
        if role not in known:
            raise ConfigError(
                f"{stage.name}: it reads the data of {role}, and there is no such role."
                f"{did_you_mean(role, known)} Known: {', '.join(known)}."
            )


def check_policies(stage: Stage, named: Iterable[tuple[str, str]], stages: Mapping[str, Stage]) -> None:
    """Refuse keys that name a stage which makes no policy.

    Args:
        named: (key, the model that it names) of the stage.

    Raises:
        ConfigError: it names the stages that make one.
    """
    known = [name for name, each in stages.items() if each.makes == "policy" and each is not stage]
    for key, name in named:
        if name == stage.name:
            raise ConfigError(f"{key}={name}: a stage cannot read what it makes itself. Name another model.")
        if name not in known:
            offered = [*known, "base", "init", BEST_OF_N] if key == "evaluate.policies" else known
            raise ConfigError(
                f"{key}={name}: no stage of that name makes a policy.{did_you_mean(name, offered)} "
                f"Known: {', '.join(offered)}."
                + f" A named instance needs a key of its own, such as {name}.KEY=VALUE."
                * ("@" in name)
            )


def check_sources(experiment: Experiment, own: Sequence[str]) -> None:
    """Refuse a run that lacks data. The error names all missing sources, and the stages that read them.

    Args:
        own: keys that name the user's own data.

    Raises:
        ConfigError: in the user's own keys.
    """
    sources, needed = named_sources(experiment.stages), experiment.needed()
    readers: dict[str, list[str]] = {}
    for name in needed:
        stage = experiment.stages[name]
        for role in map(stage.mount.own_role, stage.needs(experiment.stages)):
            if not sources.named[role]:
                readers.setdefault(role, []).append(name)
    if not readers:
        return
    roles = sources.roles
    missing = [f"{roles[role].key} (for {' and '.join(names)})" for role, names in readers.items()]
    why = f" No packaged set is used beside your own data ({', '.join(own)})." if own else ""
    advice = "".join(f" {roles[role].advice}" for role in readers if roles[role].advice)
    unread = [("init", name) for name in readers.get("sft", ())]
    without = [f"{name}.init=base" for name in needed if starts_from(experiment.stages[name]) in unread]
    if without:
        advice += f" Without SFT: {' '.join(without)}."
    raise ConfigError(
        f"No data for {', '.join(missing)}.{why} Name a source for each: a path, hub:ID or samples:NAME; or "
        f"choose stages that need none, with stage=.{advice}"
    )


def check_method(stage: Stage, experiment: Experiment) -> None:
    """Refuse a method of tuning that cannot work with this config, or was never tested with it.

    Raises:
        ConfigError: why, and what works instead.
    """
    peft, settings = peft_of(stage), experiment.settings
    if peft is None:
        return
    method, key = METHODS[peft.method], f"{stage.name}.peft={peft.method}"
    merging = " or ".join(name for name, each in METHODS.items() if each.merges)
    sources = (experiment.stages[name] for name in inputs(stage, experiment.stages))
    for start in (each for each in sources if each.makes == "policy"):
        before = peft_of(start)
        if before is not None and not METHODS[before.method].merges:
            raise ConfigError(
                f"{start.name}.peft={before.method}: it is not merged into the weights, so {stage.name}, "
                f"which trains on the {start.full_title} model, would have to publish two adapters. Use "
                f"{start.name}.peft={merging}; or run only stages that do not need {stage.name}, such as "
                f"stage={start.name}."
            )
    if method.pads and settings.model.attention == ATTENTION:
        raise ConfigError(
            f"model.attention={ATTENTION}: it puts rows end to end, and with {key} only the first would see "
            "the virtual tokens. Use model.attention=auto, which pads these rows, or another "
            f"{stage.name}.peft."
        )
    if settings.generation == "vllm" and (reason := unusable_by_vllm(stage)):
        usable = " or ".join(name for name, each in METHODS.items() if each.samples_by_vllm)
        other = usable if stage.samples else merging
        raise ConfigError(f"generation=vllm: {reason}. Use generation=local, or {stage.name}.peft={other}.")
    if settings.zero != "none" and not method.shards:
        tested = " or ".join(name for name, each in METHODS.items() if each.shards)
        raise ConfigError(
            f"zero={settings.zero}: {key} is not tested with sharded weights. Use zero=none, or "
            f"{stage.name}.peft={tested}."
        )


def check_qlora(key: str, device: str) -> None:
    """Refuse 4-bit weights if there is no GPU for them.

    Raises:
        ConfigError: what is missing.
    """
    if device == "cpu" or not has_gpu():
        other = key.replace("=qlora", "=lora")
        raise ConfigError(f"{key}: 4-bit weights need a GPU, and this run has none. Use {other}.")
    if find_spec("bitsandbytes") is None:
        raise ConfigError(f"{key} needs bitsandbytes: pip install -e '.[qlora]'.")


def _is_stage(value: Any) -> bool:
    return isinstance(value, dict) and "_target_" in value


def stage_class(name: str, target: str) -> type[Stage]:
    """The class that a section's `_target_` names.

    Args:
        name: of the section.

    Raises:
        ConfigError: there is no such class, or it is no stage.
    """
    key = f"{name}._target_={target}"
    module, _, attribute = str(target).rpartition(".")
    if not module:
        raise ConfigError(f"{key}: write MODULE.CLASS, such as my_stages.DpoStage.")
    try:
        with uninterrupted():
            found = getattr(import_code(module, key), attribute, None)
    except ImportError as error:
        package, _, missing = (error.name or module).rpartition(".")
        is_missing = isinstance(error, ModuleNotFoundError)
        near = did_you_mean(missing, modules_of(package)) if is_missing else ""
        raise ConfigError(
            f"{key}: {error}.{near} Searched: {', '.join(path or '.' for path in sys.path)}. Start in the "
            "module's directory, install it, or put its directory on PYTHONPATH."
        ) from None
    except PydanticUserError as error:
        reason = str(error.message).partition("\n")[0]
        raise ConfigError(
            f"{key}: {reason} A stage is called as it is mounted, so it sets no name."
        ) from None
    except SyntaxError as error:
        raise ConfigError(f"{key}: {error.filename}:{error.lineno}: {error.msg}. Fix that line.") from None
    if found is None:
        near = did_you_mean(attribute, [each for each in vars(sys.modules[module]) if each.endswith("Stage")])
        raise ConfigError(
            f"{key}: {sys.modules[module].__file__} has no {attribute}.{near} Name a class of that file."
        )
    if not (isinstance(found, type) and issubclass(found, Stage)):
        raise ConfigError(
            f"{key}: {attribute} is not a subclass of rlhf.pipeline.stage.Stage. Derive it from that."
        )
    if lacks := " and ".join(sorted(found.__abstractmethods__)):
        raise ConfigError(f"{key}: a stage needs its own {lacks}, and {attribute} has none. Write it.")
    if found.makes not in (None, "policy", "reward"):
        raise ConfigError(
            f"{key}: {attribute}.makes is {found.makes!r}. It must be 'policy', 'reward' or None."
        )
    for metric, about in found.metrics.items():
        check_declared(f"{key}: {attribute}.metrics[{metric!r}]", about)
    if "name" in found.model_fields or not isinstance(found.name, property):
        raise ConfigError(f"{key}: a stage is called as it is mounted, {name} here. Remove {attribute}.name.")
    if found.makes and not found.title:
        raise ConfigError(f"{key}: it publishes a {found.makes}, so give it a title, which tables show.")
    return found


def modules_of(package: str) -> list[str]:
    """The modules of a package; without a package, all top-level modules."""
    paths = getattr(import_module(package), "__path__", []) if package else None
    return [each.name for each in iter_modules(paths)]
