"""What is checked before any model is loaded: memory, disk, context length, and what the ranks can share."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.markup import escape

from rlhf.config import ConfigError, in_user_keys
from rlhf.costs.hardware import GIB, found_machine, kept_speed, quick_speed
from rlhf.costs.memory import SAMPLING, Allocation, MemoryPhase, amount, over, vllm_row, weight_bytes
from rlhf.costs.model_shape import ModelShape, counted
from rlhf.costs.setup import CostContext, LocalSampling, Sizes, pads_rows
from rlhf.costs.stage_cost import StageCost, Task
from rlhf.data.prepared import PreparedData
from rlhf.distributed.compute import Compute
from rlhf.models.base import BaseModelFiles, UnknownShapeError, load_tokenizer, skeleton
from rlhf.models.peft.config import PeftConfig
from rlhf.models.peft.methods import METHODS
from rlhf.models.peft.saved import rehearse
from rlhf.models.start import counts_alike, directory_of
from rlhf.pipeline.checks import complaints
from rlhf.pipeline.costing import cost_of
from rlhf.pipeline.experiment import Experiment
from rlhf.pipeline.fields import peft_of
from rlhf.pipeline.forecast import Prediction
from rlhf.pipeline.graph import answering, init_directory
from rlhf.pipeline.made_rows import context_of
from rlhf.pipeline.stage import Stage, View
from rlhf.tracking.progress import clock
from rlhf.training.checkpoint import CheckpointConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlhf.pipeline.experiment import Settings

FITS = 0.9
"""Share of the memory up to which something fits: a prediction may be too low by the rest."""
MARGIN = 1.15
"""A prediction may be too high by this factor; a run is refused only if it would not fit even then."""


class Expected(NamedTuple):
    """What the stages that will run need, as far as it is known before."""

    ways: Mapping[str, LocalSampling] = {}
    """Stage -> how it samples from sharded weights by the local engine; where it is not named, by layers. All
    ranks have the same."""
    stages: Mapping[str, Prediction] = {}
    """How long each takes."""
    longest: int | None = None
    """As of `longest_sampled`, of all stages of the run."""


class Begun(NamedTuple):
    """What an earlier attempt at a stage left."""

    bytes: float = 0.0
    """Bytes of its checkpoints."""
    seconds: float = 0.0
    """Seconds of work that the newest checkpoint holds."""
    share: float = 0.0
    """Share of the steps that it holds."""


def check_before_loading(
    experiment: Experiment,
    pending: Mapping[str, Begun],
    base: BaseModelFiles,
    compute: Compute,
    data: PreparedData,
    console: Console,
) -> Expected:
    """Check what the stages that will run need, and print about how much memory and time that is.

    Args:
        pending: those stages, and what an earlier attempt left of each.

    Returns:
        Of models whose shape is not known, nothing.

    Raises:
        ConfigError: this machine cannot run them.
    """
    stages, settings = [experiment.stages[name] for name in pending], experiment.settings
    if not any(stage.reads_weights for stage in stages):
        return Expected()
    import torch

    from rlhf.models.peft.attach import check_attachable

    try:
        model = skeleton(base.architecture, trust_remote_code=settings.model.trust_remote_code)
        for line in eager_notes(model, settings.model.attention):
            console.print(line, highlight=False, markup=False, style="yellow")
        models = {stage.name: own_skeleton(stage, base) or model for stage in stages}
        for index, stage in enumerate(stages):
            is_known = (peft_of(stage), init_directory(stage)) in [
                (peft_of(before), init_directory(before)) for before in stages[:index]
            ]
            check_tunes(stage, models[stage.name], check_attachable if is_known else rehearse)
        for line in adapter_notes(stages, models):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        on = found_context(settings, counted(model), compute, data.size)
    except UnknownShapeError as unknown:
        unchecked = f"Memory, time, disk and context are not checked: {unknown}."
        console.print(unchecked, style="yellow", highlight=False)
        return Expected()  # they sample layer by layer, which needs least
    ways: dict[str, LocalSampling] = {}
    for stage in stages:
        if chooses(stage, on):
            way = chosen(stage, experiment.stages, on)
            by_layers = float(compute.global_max(torch.tensor(float(way.local_sampling == "layers"))))
            ways[stage.name] = "layers" if by_layers else "whole"
            line = sampling_note(stage, experiment.stages, on, ways[stage.name])
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    store = Path(settings.store_dir)
    disk = Disk(store, shutil.disk_usage(store).free)
    needed = [experiment.stages[name] for name in experiment.needed()]
    longest = None if on.vllm is None else longest_sampled(needed, experiment.stages, on, base)
    teaches = any("sft" in stage.reads().roles for stage in needed)
    checked = preflight(
        stages, experiment.stages, on, disk, settings.checkpoint, begun=pending, ways=ways, longest=longest,
        answer_tokens=data.mean_answer("sft") if teaches else None,
    )  # fmt: skip
    lines = [*padding_notes(stages, settings.model.attention), *checked.warned, *checked.refused]
    refused = float(compute.global_max(torch.tensor(float(bool(checked.refused)))))
    if refused and settings.preflight == "enforce":
        lines = checked.refused or ["Another rank has too little memory or disk: see its output."]
        raise ConfigError("\n".join([*lines, "Nothing was loaded. preflight=warn continues anyway."]))
    for line in lines:
        console.print(f"[yellow]preflight:[/] {escape(line)}", highlight=False)
    if any(cost.phases for cost in checked.costs.values()):
        console.print(expectations(checked.costs, on, pending), highlight=False)
    return Expected(ways, predictions(checked.costs, pending), longest)


def chooses(stage: Stage, on: CostContext) -> bool:
    """Whether the stage samples from sharded weights by the local engine, which can be done in two ways."""
    return stage.samples and on.shards_weights and on.vllm is None


def chosen(stage: Stage, chain: Mapping[str, Stage], on: CostContext) -> CostContext:
    """The context, with the way in which the stage samples: whole if there is memory for it while it does."""
    if not chooses(stage, on):
        return on
    whole, layers = (replace(on, local_sampling=way) for way in ("whole", "layers"))
    return whole if shortage(while_sampling(stage, chain, whole), whole) <= FITS else layers


def while_sampling(stage: Stage, chain: Mapping[str, Stage], on: CostContext) -> StageCost:
    """What the stage needs while it samples."""
    cost = cost_of(stage, context_of(stage, chain, on), chain)
    phases = [phase for phase in cost.phases if phase.name == SAMPLING]
    return replace(cost, phases=phases or cost.phases or [MemoryPhase(SAMPLING)])


def sampling_note(stage: Stage, chain: Mapping[str, Stage], on: CostContext, way: LocalSampling) -> str:
    """How the stage samples from sharded weights, and the arithmetic behind it."""
    needs: dict[LocalSampling, str] = {}
    for each in ("whole", "layers"):
        there = replace(on, local_sampling=each)
        cost = while_sampling(stage, chain, there)
        phase, on_host, _ = tightest(cost, there)
        used = 0.0 if on_host else on.machine.used
        needs[each] = f"{(phase.size(on_host=on_host) + used) / GIB:.1f} GiB ({by_kind(phase, on_host)})"
    have = f"{on.machine.memory / GIB:.1f} GiB"
    if way == "whole":
        return f"{stage.name} samples from weights gathered whole: that needs {needs['whole']} of {have}."
    return (
        f"{stage.name} samples layer by layer, all ranks in step: that needs {needs['layers']} of {have}. "
        f"With weights gathered whole it would need {needs['whole']}. It is slow; generation=vllm is not."
    )


def check_tunes(
    stage: Stage, base: PreTrainedModel, check: Callable[[PreTrainedModel, PeftConfig], None]
) -> None:
    """Refuse a method of tuning that does not work with the model.

    Args:
        base: the model on the meta device.
        check: `check_attachable`; or `rehearse`, which takes longer and finds more.

    Raises:
        ConfigError: why.
    """
    peft = peft_of(stage)
    if peft is None:
        return
    with in_user_keys({}, stage.name):
        check(base, peft)


def own_skeleton(stage: Stage, base: BaseModelFiles) -> PreTrainedModel | None:
    """The user's own model that a stage trains, on the meta device; None if it trains the base model."""
    directory = init_directory(stage)
    if directory is None:
        return None
    files = replace(base, directory=directory)
    return skeleton(files.architecture, trust_remote_code=base.config.trust_remote_code)


def adapter_notes(stages: Sequence[Stage], models: Mapping[str, PreTrainedModel]) -> Iterator[str]:
    """Lines that say which layers `all-linear` adapts, and which not.

    Args:
        models: stage -> the model that it trains, on the meta device.
    """
    from rlhf.models.peft.target_modules import described_targets

    lines: dict[str, list[str]] = {}
    for stage in stages:
        peft = peft_of(stage)
        line = None if peft is None else described_targets(models[stage.name], peft)
        if line is not None:
            lines.setdefault(line, []).append(stage.name)
    yield from (f"{', '.join(names)}: {line}" for line, names in lines.items())


def eager_notes(base: PreTrainedModel, attention: str) -> Iterator[str]:
    """A line if `attention=auto` finds nothing better than eager attention.

    Args:
        base: its skeleton.
    """
    if attention == "auto" and base.config._attn_implementation == "eager":
        yield (
            f"model.attention=auto: {type(base).__name__} has eager attention only: rows are padded, and "
            "long ones need much memory."
        )


def padding_notes(stages: Sequence[Stage], attention: str) -> Iterator[str]:
    """A line if a method of tuning pads rows that would otherwise be packed."""
    for stage in stages:
        peft = peft_of(stage)
        if peft is not None and METHODS[peft.method].pads and attention == "auto":
            yield (
                f"{stage.name}.peft={peft.method}: rows are padded, one sequence a row: laid end to end only "
                "the first would see the virtual tokens."
            )


@dataclass(frozen=True)
class Checked:
    """What the stages that will run need, and the complaints."""

    costs: dict[str, StageCost]
    refused: list[str]
    """Complaints in the user's own keys."""
    warned: list[str]
    """What perhaps does not fit."""


@dataclass(frozen=True)
class Disk:
    """Where the store is, and how many bytes are free there."""

    store: Path
    free: float


def preflight(
    stages: Sequence[Stage],
    chain: Mapping[str, Stage],
    on: CostContext,
    disk: Disk,
    checkpoints: CheckpointConfig,
    begun: Mapping[str, Begun],
    ways: Mapping[str, LocalSampling] | None = None,
    longest: int | None = None,
    answer_tokens: float | None = None,
) -> Checked:
    """Compare what these stages need with what this machine has. No model is loaded.

    Args:
        begun: what an earlier attempt left of each stage.
        ways: how stages sample from sharded weights by the local engine, where that is decided.
        longest: as of `longest_sampled`, of all stages of the run; None for these stages' own.
        answer_tokens: of a mean sampled answer, for the time that is told; None for the longest that is
            allowed, for which everything is checked.
    """
    costs: dict[str, StageCost] = {}
    usual: dict[str, list[Task]] = {}
    refused: list[str] = []
    warned: list[str] = []
    for stage in stages:
        way = (ways or {}).get(stage.name)
        there = chosen(stage, chain, on) if way is None else replace(on, local_sampling=way)
        there = context_of(stage, chain, there)
        usual[stage.name] = cost_of(stage, replace(there, answer_tokens=answer_tokens), chain).work
        cost = costs[stage.name] = with_copy(cost_of(stage, there, chain), there, checkpoints)
        if not cost.phases:
            continue
        need = shortage(cost, on)
        if need > MARGIN:
            refused.append(f"{said(stage, cost, on)} {advice(stage, chain, on)}{vllm_advice(stage, on)}")
        elif need > FITS:
            spare = "" if need > 1.0 else f" It may fail: less than {1 - FITS:.0%} is left."
            warned.append(f"{said(stage, cost, on)}{spare}")
        on = replace(on, has_sampled=on.has_sampled or stage.samples)
    refused += disk_complaints(costs, disk, checkpoints, begun)
    sampled = longest or max((cost.sampled for cost in costs.values()), default=0)
    too_long = context_complaints(stages, costs, chain, on)
    told = {name: replace(cost, work=usual[name]) for name, cost in costs.items()}
    return Checked(told, [*cache_complaints(sampled, on), *too_long, *refused], warned)


def tightest(cost: StageCost, on: CostContext) -> tuple[MemoryPhase, bool | None, float]:
    """The phase that needs the largest share of the available memory, whether that is the host's (None
    without a GPU), and the share."""
    machine = on.machine
    if machine.kind == "cpu":
        phase = cost.peak()
        return phase, None, (phase.size() + machine.used) / machine.memory
    device, host = cost.peak(on_host=False), cost.peak(on_host=True)
    on_device = (device.size(on_host=False) + machine.used) / machine.memory
    on_host = (host.size(on_host=True) + machine.host_used) / machine.host_memory
    return (host, True, on_host) if on_host > on_device else (device, False, on_device)


def shortage(cost: StageCost, on: CostContext) -> float:
    """The largest share of the available memory that any phase needs. It fits up to `FITS`."""
    return tightest(cost, on)[2]


def most(cost: StageCost, on: CostContext) -> tuple[MemoryPhase, float]:
    """The phase that needs most memory of the GPU (without a GPU: of the host), and its bytes together with
    what the process holds anyway."""
    on_host = None if on.on_cpu else False
    phase = cost.peak(on_host=on_host)
    return phase, phase.size(on_host=on_host) + on.machine.used


def said(stage: Stage, cost: StageCost, on: CostContext) -> str:
    """`ppo needs about 31.0 GiB (learning: weights 15.0, ...), and there are 24.0 GiB.`"""
    machine = on.machine
    phase, on_host, _ = tightest(cost, on)
    have, used = machine.memory, machine.used
    if on_host:
        have, used = machine.host_memory, machine.host_used
    where = {None: "", True: " in the host's memory", False: " on each GPU"}[on_host]
    total = phase.size(on_host=on_host) + used
    return (
        f"{stage.name} needs about {total / GIB:.1f} GiB{where} ({phase.name}: {by_kind(phase, on_host)}), "
        f"and there are {have / GIB:.1f} GiB."
    )


def by_kind(phase: MemoryPhase, on_host: bool | None = None) -> str:
    """`weights 1.2, optimizer 3.0`, in GiB."""
    sizes: dict[str, float] = {}
    for part in phase.parts:
        if on_host is None or part.on_host == on_host:
            sizes[part.kind] = sizes.get(part.kind, 0.0) + part.size
    return ", ".join(f"{kind} {size / GIB:.1f}" for kind, size in sizes.items())


def advice(stage: Stage, chain: Mapping[str, Stage], on: CostContext) -> str:
    """The keys that would make it fit, found by trying them: each alone, then together."""
    found = []
    knobs = list(savings(stage, on))
    for key, change, where in knobs:
        if fits(stage, chain, on, change, where):
            found.append(key)
    if found:
        return f"It would fit with {' or with '.join(found)}."
    zeros = [knob for knob in knobs if knob[2]]
    for zero, left_out in product((None, *zeros), (None, *knobs)):
        chosen = [knob for knob in knobs if knob is not left_out and (knob is zero or knob not in zeros)]
        for together in list(accumulate(([knob] for knob in chosen), lambda done, new: [*done, *new]))[1:]:
            change = {name: value for _, changes, _ in together for name, value in changes.items()}
            if fits(stage, chain, on, change, zero[2] if zero and zero in together else {}):
                return f"It would fit with {' '.join(key for key, _, _ in together)}."
    return "No knob here would make it fit: take a smaller model or more memory."


def vllm_advice(stage: Stage, on: CostContext) -> str:
    """What else samples from a model that no rank can hold: vLLM, over so many ranks that its part of the
    weights takes at most a quarter of a rank's memory; over all ranks here if that is never so."""
    if not chooses(stage, on):
        return ""
    parts = [count for count in range(1, on.machine.ranks_here + 1) if on.ranks % count == 0]
    enough = [count for count in parts if weight_bytes(on) / count <= on.machine.memory / 4]
    return f" Or sample with generation=vllm vllm.tensor_parallel={(enough or parts[-1:])[0]}."


def savings(stage: Stage, on: CostContext) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(what the user would type, changed keys of the stage, changes of the context), the cheapest first."""
    name, fields = stage.name, type(stage).model_fields
    knobs = stage.model_dump()
    for key in ("micro_batch_tokens", *(["batch_rows"] if stage.samples else [])):
        if key in fields:
            # without a number all rows of a rollout are decoded together
            together = knobs[key] or max(knobs["batch_episodes"], knobs["evaluate_prompts"]) // on.ranks
            smaller = max(1, together // 4)
            yield f"{name}.{key}={smaller}", {key: smaller}, {}
    if "activation_checkpointing" in fields and not knobs["activation_checkpointing"]:
        yield f"{name}.activation_checkpointing=true", {"activation_checkpointing": True}, {}
    shards = "peft" not in fields or METHODS[knobs["peft"]["method"]].shards
    if shards and on.ranks > 1 and on.zero == "none":
        yield "zero=zero2", {}, {"zero": "zero2"}
    if shards and not on.shards_weights and (on.ranks > 1 or not on.on_cpu):
        for kind in ("zero3", "fsdp2") if on.ranks > 1 else ("zero3_offload",):
            yield f"zero={kind}", {}, {"zero": kind}
    if "frozen_placement" in fields and on.zero != "none" and not on.shards_weights:
        yield f"{name}.frozen_placement=sharded", {"frozen_placement": "sharded"}, {}
    elif "frozen_placement" in fields and not on.on_cpu and knobs["peft"]["method"] == "none":
        yield f"{name}.frozen_placement=offloaded", {"frozen_placement": "offloaded"}, {}
    if stage.samples and on.vllm is not None:
        yield "generation=local", {}, {"vllm": None}
    if "peft" in fields and knobs["peft"]["method"] == "none":
        yield f"{name}.peft=lora", {"peft": PeftConfig(method="lora")}, {}


def fits(
    stage: Stage,
    chain: Mapping[str, Stage],
    on: CostContext,
    change: Mapping[str, Any],
    where: Mapping[str, Any],
) -> bool:
    """Whether the stage fits into memory with these changes, and accepts them."""
    changed = stage.model_copy(update=dict(change))
    setting = replace(on, **where)
    changed_chain = {**chain, stage.name: changed}
    if not is_taken(changed, changed_chain, setting):
        return False
    setting = chosen(changed, changed_chain, setting)
    cost = cost_of(changed, context_of(changed, changed_chain, setting), changed_chain)
    return shortage(cost, setting) <= FITS


def is_taken(stage: Stage, chain: Mapping[str, Stage], on: CostContext) -> bool:
    """Whether the stage can run on these ranks."""
    compute = Compute(on.machine.kind, "bfloat16", on.zero, world_size=on.ranks)
    return peft_of(stage) is None or not complaints(stage, View(chain, compute=compute))


def context_complaints(
    stages: Sequence[Stage], costs: Mapping[str, StageCost], chain: Mapping[str, Stage], on: CostContext
) -> Iterator[str]:
    """A sequence that is longer than the model, or vLLM where that samples it, can read: for each key that
    the user would lower, what the stage says that has the longest."""
    limit = None if on.vllm is None else on.vllm.max_model_len
    excess: dict[str, float] = {}
    complaints: dict[str, str] = {}
    for stage in stages:
        cost = costs[stage.name]
        if limit is not None and limit < cost.sampled <= on.shape.context:
            yield (
                f"{stage.name}: the longest prompt and its answer are {cost.sampled} tokens, and "
                f"vllm.max_model_len={limit}. Use {cost.sampled} or more."
            )
        context = min(cost.context, on.shape.context)
        if cost.longest <= context:
            continue
        key = next(key for key in ("max_new_tokens", "max_tokens") if key in type(stage).model_fields)
        value = stage.model_dump()[key]
        name = f"{_owner(stage, key, chain)}.{key}"
        more = max(value, cost.longest) - context
        if more > excess.get(name, 0.0):
            excess[name] = more
            complaints[name] = (
                f"{name}={value}: the longest sequence could have {cost.longest} tokens, and the "
                f"model's context has {context:.0f}. Lower it by {more:.0f}."
            )
    yield from complaints.values()


def cache_complaints(sampled: int, on: CostContext) -> Iterator[str]:
    """vLLM's cache has no room for one row.

    Args:
        sampled: tokens of the longest one that is sampled; 0 if none is.
    """
    if on.vllm is None or not sampled:
        return
    tokens, given = on.vllm.max_model_len or sampled, on.vllm.kv_cache_gib
    needed = vllm_row(on, on.vllm, tokens)
    if needed > given * GIB:
        lower = " or lower vllm.max_model_len" if on.vllm.max_model_len else ""
        yield (
            f"vllm.kv_cache_gib={given:g}: one row of {tokens} tokens needs {amount(needed)} of keys and "
            f"values on each rank. Use {math.ceil(needed / GIB)} or more{lower}."
        )


def longest_sampled(
    stages: Iterable[Stage], chain: Mapping[str, Stage], on: CostContext, base: BaseModelFiles
) -> int | None:
    """Tokens of the longest prompt with its answer that these stages sample; None if that is not known: a
    stage does not say, or a model of the user's own counts tokens in another way than `prepare` did. So long
    are the rows that vLLM is built for, where `vllm.max_model_len` is null."""
    sampling = [stage for stage in stages if stage.samples]
    costs = [cost_of(stage, context_of(stage, chain, on), chain) for stage in sampling]
    if not costs or any(not cost.sampled for cost in costs):
        return None
    own = {directory_of(init) for stage in sampling for _, init in answering(stage, chain)} - {None}
    if any(not counts_alike(load_tokenizer(each, base.config), base) for each in own if each):
        return None
    return round(max(min(cost.sampled, cost.context, on.shape.context) for cost in costs))


def _owner(stage: Stage, key: str, chain: Mapping[str, Stage]) -> str:
    """The stage whose key the user types: stages of the chain that train nothing repeat that of one that
    does (`generate.max_new_tokens: ${ppo.max_new_tokens}`)."""
    if stage.in_chain and not stage.mount.label and peft_of(stage) is None:
        for other in chain.values():
            if peft_of(other) is not None and other.model_dump().get(key) == stage.model_dump()[key]:
                return other.name
    return stage.name


def with_copy(cost: StageCost, on: CostContext, config: CheckpointConfig) -> StageCost:
    """The cost with the copy of the state that `checkpoint.background=true` writes from, on the host. With
    `auto` there is only one where there is memory for it; DeepSpeed makes none."""
    if config.background is not True or on.zero.startswith("zero") or not checkpoint_bytes(cost, config):
        return cost
    size = cost.checkpoint / on.shard_ranks  # else rank 0 has it all
    how = f"what checkpoint.background=true writes from: {amount(cost.checkpoint)}{over(on.shard_ranks)}"
    copy = Allocation("optimizer", size, how, on_host=True)
    return replace(cost, phases=[replace(each, parts=[*each.parts, copy]) for each in cost.phases])


def disk_complaints(
    costs: Mapping[str, StageCost], disk: Disk, checkpoints: CheckpointConfig, begun: Mapping[str, Begun]
) -> Iterator[str]:
    """The artifacts, what one is made from while it is written, and the checkpoints of the stage that needs
    most, must fit on the store's disk, beside the checkpoints that are there."""
    published = sum(cost.artifact for cost in costs.values())
    published += max((cost.artifact for cost in costs.values()), default=0.0)  # what was trained, or merged
    missing = [checkpoint_bytes(cost, checkpoints) - begun[name].bytes for name, cost in costs.items()]
    largest = max(0.0, *missing)
    if published + largest > disk.free:
        yield (
            f"store_dir={disk.store}: the artifacts need about {amount(published)} and the checkpoints "
            f"{amount(largest)}, and {amount(disk.free)} are free. Make room, choose another store_dir, "
            "or lower checkpoint.keep."
        )


def checkpoint_bytes(cost: StageCost, config: CheckpointConfig) -> float:
    """Bytes of all kept checkpoints and of the one being written; 0 if the stage ends before the first."""
    minutes = config.every_minutes
    is_written = config.every_steps is not None or (minutes is not None and cost.seconds > 60 * minutes)
    return (config.keep + 1) * cost.checkpoint if is_written else 0.0


def predictions(costs: Mapping[str, StageCost], begun: Mapping[str, Begun]) -> dict[str, Prediction]:
    """How long each stage takes, and what its newest checkpoint holds of that."""
    return {
        name: Prediction(cost.seconds, begun[name].seconds, begun[name].share) for name, cost in costs.items()
    }


def expectations(costs: Mapping[str, StageCost], on: CostContext, begun: Mapping[str, Begun]) -> str:
    """`About 5:10 to go: sft 2:00, 3.1 GiB; ...`, from where each stage's newest checkpoint is."""
    left = {name: each.left() for name, each in predictions(costs, begun).items()}
    parts = [
        f"{name} {clock(left[name])} ({most(cost, on)[1] / GIB:.1f} GiB{saving(cost, on)})"
        for name, cost in costs.items()
        if cost.phases
    ]
    return f"About {clock(sum(left.values()))} to go: {', '.join(parts)}."


def saving(cost: StageCost, on: CostContext) -> str:
    """What a checkpoint takes, where it takes seconds."""
    seconds = cost.checkpoint_seconds(on.machine)
    return f", {seconds:.0f} s a checkpoint" if seconds >= 1 else ""


def found_context(settings: Settings, shape: ModelShape, compute: Compute, sizes: Sizes) -> CostContext:
    """The context of this run's costs, with the base model's shape."""
    speed = kept_speed(compute, Path(settings.store_dir)) or quick_speed(compute)
    return CostContext(
        shape=shape,
        dtype_bytes=compute.dtype.itemsize,
        zero=settings.zero,
        machine=found_machine(compute, speed),
        sizes=sizes,
        vllm=settings.vllm if settings.generation == "vllm" else None,
        pads=pads_rows(settings.model, shape),
    )
