"""Checks before any model is loaded: memory, disk, context length, and what the ranks can share."""

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
from rlhf.costs.hardware import GIB, local_machine, quick_speed, saved_speed
from rlhf.costs.memory import SAMPLING, Allocation, MemoryPhase, amount, over, vllm_row, weight_bytes
from rlhf.costs.model_shape import ModelShape, shape_of_model
from rlhf.costs.setup import CostContext, LocalSampling, Sizes, pads_rows
from rlhf.costs.stage_cost import StageCost, Task
from rlhf.data.prepared import PreparedData
from rlhf.distributed.compute import Compute
from rlhf.models.base import BaseModelFiles, UnknownShapeError, load_tokenizer, skeleton
from rlhf.models.peft.config import PeftConfig
from rlhf.models.peft.methods import METHODS
from rlhf.models.peft.saved import check_publishable
from rlhf.models.start import directory_of, is_base_tokenizer
from rlhf.pipeline.checks import complaints
from rlhf.pipeline.costing import cost_of
from rlhf.pipeline.experiment import Experiment
from rlhf.pipeline.fields import peft_of
from rlhf.pipeline.forecast import Prediction
from rlhf.pipeline.graph import init_directory, sampled_models
from rlhf.pipeline.made_rows import context_of
from rlhf.pipeline.stage import Stage, View
from rlhf.tracking.progress import clock
from rlhf.training.checkpoint import CheckpointConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlhf.pipeline.experiment import Settings

MAX_MEMORY_SHARE = 0.9
"""Largest share of the memory that counts as fitting: the rest is for predictions that are too low. The run
warns of a stage that needs more."""
MAX_OVERESTIMATE = 1.15
"""Factor by which a prediction may be too high: a run is refused only if it would not fit even then."""


class RunEstimate(NamedTuple):
    """What the stages that will run need, as far as it is known in advance."""

    sampling_modes: Mapping[str, LocalSampling] = {}
    """Stage -> how the local engine samples from sharded weights; by layers if missing. Same on all ranks."""
    stages: Mapping[str, Prediction] = {}
    """Stage -> how long it takes."""
    longest: int | None = None
    """The result of `longest_sampled` for all stages of the run."""


class Attempt(NamedTuple):
    """What an earlier attempt at a stage left."""

    bytes: float = 0.0
    """Bytes of its checkpoints."""
    seconds: float = 0.0
    """Seconds of work that the newest checkpoint holds."""
    share: float = 0.0
    """Share of the steps that it holds."""


def check_before_loading(
    experiment: Experiment,
    pending: Mapping[str, Attempt],
    base: BaseModelFiles,
    compute: Compute,
    data: PreparedData,
    console: Console,
) -> RunEstimate:
    """Check what the stages that will run need, and print approximately how much memory and time that is.

    Args:
        pending: those stages -> what an earlier attempt left.

    Returns:
        An empty estimate if the shape of a model is not known.

    Raises:
        ConfigError: this machine cannot run them.
    """
    stages, settings = [experiment.stages[name] for name in pending], experiment.settings
    if not any(stage.reads_weights for stage in stages):
        return RunEstimate()
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
            check_tuning(stage, models[stage.name], check_attachable if is_known else check_publishable)
        for line in adapter_notes(stages, models):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        on = cost_context(settings, shape_of_model(model), compute, data.size)
    except UnknownShapeError as unknown:
        unchecked = f"Memory, time, disk and context are not checked: {unknown}."
        console.print(unchecked, style="yellow", highlight=False)
        return RunEstimate()  # they sample layer by layer, which needs least
    modes: dict[str, LocalSampling] = {}
    for stage in stages:
        if has_sampling_choice(stage, on):
            way = with_sampling_choice(stage, experiment.stages, on)
            by_layers = float(compute.global_max(torch.tensor(float(way.local_sampling == "layers"))))
            modes[stage.name] = "layers" if by_layers else "whole"
            line = sampling_note(stage, experiment.stages, on, modes[stage.name])
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    store = Path(settings.store_dir)
    disk = Disk(store, shutil.disk_usage(store).free)
    needed = [experiment.stages[name] for name in experiment.needed()]
    longest = None if on.vllm is None else longest_sampled(needed, experiment.stages, on, base)
    teaches = any("sft" in stage.reads().roles for stage in needed)
    checked = preflight(
        stages, experiment.stages, on, disk, settings.checkpoint, attempts=pending, sampling_modes=modes,
        longest=longest, answer_tokens=data.mean_answer("sft") if teaches else None,
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
    return RunEstimate(modes, predictions(checked.costs, pending), longest)


def has_sampling_choice(stage: Stage, on: CostContext) -> bool:
    """Whether the stage samples from sharded weights with the local engine, which has two ways to do so."""
    return stage.samples and on.shards_weights and on.vllm is None


def with_sampling_choice(stage: Stage, chain: Mapping[str, Stage], on: CostContext) -> CostContext:
    """The context with the stage's way of sampling: weights gathered whole if they fit, else by layers."""
    if not has_sampling_choice(stage, on):
        return on
    whole, layers = (replace(on, local_sampling=way) for way in ("whole", "layers"))
    return whole if shortage(while_sampling(stage, chain, whole), whole) <= MAX_MEMORY_SHARE else layers


def while_sampling(stage: Stage, chain: Mapping[str, Stage], on: CostContext) -> StageCost:
    """What the stage needs while it samples."""
    cost = cost_of(stage, context_of(stage, chain, on), chain)
    phases = [phase for phase in cost.phases if phase.name == SAMPLING]
    return replace(cost, phases=phases or cost.phases or [MemoryPhase(SAMPLING)])


def sampling_note(stage: Stage, chain: Mapping[str, Stage], on: CostContext, way: LocalSampling) -> str:
    """How the stage samples from sharded weights, and the arithmetic behind it."""
    needs: dict[LocalSampling, str] = {}
    for each in ("whole", "layers"):
        context = replace(on, local_sampling=each)
        cost = while_sampling(stage, chain, context)
        phase, on_host, _ = tightest(cost, context)
        used = 0.0 if on_host else on.machine.used
        needs[each] = f"{(phase.size(on_host=on_host) + used) / GIB:.1f} GiB ({by_kind(phase, on_host)})"
    have = f"{on.machine.memory / GIB:.1f} GiB"
    if way == "whole":
        return f"{stage.name} samples from weights gathered whole: that needs {needs['whole']} of {have}."
    return (
        f"{stage.name} samples layer by layer, all ranks in step: that needs {needs['layers']} of {have}. "
        f"With weights gathered whole it would need {needs['whole']}. It is slow; generation=vllm is not."
    )


def check_tuning(
    stage: Stage, base: PreTrainedModel, check: Callable[[PreTrainedModel, PeftConfig], None]
) -> None:
    """Refuse a method of tuning that does not work with the model.

    Args:
        base: the model on the meta device.
        check: `check_attachable`; or `check_publishable`, which takes longer and finds more.

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
    from rlhf.models.peft.target_modules import targets_summary

    lines: dict[str, list[str]] = {}
    for stage in stages:
        peft = peft_of(stage)
        line = None if peft is None else targets_summary(models[stage.name], peft)
        if line is not None:
            lines.setdefault(line, []).append(stage.name)
    yield from (f"{', '.join(names)}: {line}" for line, names in lines.items())


def eager_notes(base: PreTrainedModel, attention: str) -> Iterator[str]:
    """A line if `attention=auto` finds nothing better than eager attention.

    Args:
        base: the model on the meta device.
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
class PreflightResult:
    """What the stages that will run need, and the complaints."""

    costs: dict[str, StageCost]
    refused: list[str]
    """Complaints in the user's own keys."""
    warned: list[str]
    """Complaints about what may not fit."""


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
    attempts: Mapping[str, Attempt],
    sampling_modes: Mapping[str, LocalSampling] | None = None,
    longest: int | None = None,
    answer_tokens: float | None = None,
) -> PreflightResult:
    """Compare what these stages need with what this machine has. No model is loaded.

    Args:
        attempts: stage -> what an earlier attempt left.
        sampling_modes: as in `RunEstimate`, if they are decided.
        longest: result of `longest_sampled` for all stages of the run; None: for these stages only.
        answer_tokens: tokens of a mean sampled answer, for the predicted time; None for the longest that is
            allowed, as in all checks.
    """
    costs: dict[str, StageCost] = {}
    mean_work: dict[str, list[Task]] = {}
    refused: list[str] = []
    warned: list[str] = []
    for stage in stages:
        way = (sampling_modes or {}).get(stage.name)
        context = with_sampling_choice(stage, chain, on) if way is None else replace(on, local_sampling=way)
        context = context_of(stage, chain, context)
        mean_work[stage.name] = cost_of(stage, replace(context, answer_tokens=answer_tokens), chain).work
        cost = costs[stage.name] = with_checkpoint_copy(cost_of(stage, context, chain), context, checkpoints)
        if not cost.phases:
            continue
        need = shortage(cost, on)
        if need > MAX_OVERESTIMATE:
            refused.append(
                f"{need_text(stage, cost, on)} {memory_advice(stage, chain, on)}{vllm_advice(stage, on)}"
            )
        elif need > MAX_MEMORY_SHARE:
            spare = "" if need > 1.0 else f" It may fail: less than {1 - MAX_MEMORY_SHARE:.0%} is left."
            warned.append(f"{need_text(stage, cost, on)}{spare}")
        on = replace(on, has_sampled=on.has_sampled or stage.samples)
    refused += disk_complaints(costs, disk, checkpoints, attempts)
    sampled = longest or max((cost.sampled for cost in costs.values()), default=0)
    too_long = context_complaints(stages, costs, chain, on)
    predicted = {name: replace(cost, work=mean_work[name]) for name, cost in costs.items()}
    return PreflightResult(predicted, [*cache_complaints(sampled, on), *too_long, *refused], warned)


def tightest(cost: StageCost, on: CostContext) -> tuple[MemoryPhase, bool | None, float]:
    """The phase with the largest share of its memory, whether it is the host's (None: no GPU), the share."""
    machine = on.machine
    if machine.kind == "cpu":
        phase = cost.peak()
        return phase, None, (phase.size() + machine.used) / machine.memory
    device, host = cost.peak(on_host=False), cost.peak(on_host=True)
    on_device = (device.size(on_host=False) + machine.used) / machine.memory
    on_host = (host.size(on_host=True) + machine.host_used) / machine.host_memory
    return (host, True, on_host) if on_host > on_device else (device, False, on_device)


def shortage(cost: StageCost, on: CostContext) -> float:
    """The largest share of the available memory that any phase needs; at most `MAX_MEMORY_SHARE` fits."""
    return tightest(cost, on)[2]


def peak_memory(cost: StageCost, on: CostContext) -> tuple[MemoryPhase, float]:
    """The phase that needs most GPU memory (without a GPU: host memory), and its bytes with the process."""
    on_host = None if on.on_cpu else False
    phase = cost.peak(on_host=on_host)
    return phase, phase.size(on_host=on_host) + on.machine.used


def need_text(stage: Stage, cost: StageCost, on: CostContext) -> str:
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


def memory_advice(stage: Stage, chain: Mapping[str, Stage], on: CostContext) -> str:
    """Advice with the keys that would make the stage fit, found by trying them: each alone, then together."""
    keys = []
    knobs = list(savings(stage, on))
    for key, change, where in knobs:
        if fits(stage, chain, on, change, where):
            keys.append(key)
    if keys:
        return f"It would fit with {' or with '.join(keys)}."
    zeros = [knob for knob in knobs if knob[2]]
    for zero, left_out in product((None, *zeros), (None, *knobs)):
        tried = [knob for knob in knobs if knob is not left_out and (knob is zero or knob not in zeros)]
        for together in list(accumulate(([knob] for knob in tried), lambda done, new: [*done, *new]))[1:]:
            change = {name: value for _, changes, _ in together for name, value in changes.items()}
            if fits(stage, chain, on, change, zero[2] if zero and zero in together else {}):
                return f"It would fit with {' '.join(key for key, _, _ in together)}."
    return "No knob here would make it fit: take a smaller model or more memory."


def vllm_advice(stage: Stage, on: CostContext) -> str:
    """Advice to sample with vLLM from a model that no rank can hold: over the fewest ranks on which its
    weights take at most a quarter of a rank's memory, or else over as many as there are here."""
    if not has_sampling_choice(stage, on):
        return ""
    parts = [count for count in range(1, on.machine.ranks_here + 1) if on.ranks % count == 0]
    enough = [count for count in parts if weight_bytes(on) / count <= on.machine.memory / 4]
    return f" Or sample with generation=vllm vllm.tensor_parallel={(enough or parts[-1:])[0]}."


def savings(stage: Stage, on: CostContext) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Changes that save memory, the cheapest first: (the text to type, keys of the stage, of the context)."""
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
    if not is_accepted(changed, changed_chain, setting):
        return False
    setting = with_sampling_choice(changed, changed_chain, setting)
    cost = cost_of(changed, context_of(changed, changed_chain, setting), changed_chain)
    return shortage(cost, setting) <= MAX_MEMORY_SHARE


def is_accepted(stage: Stage, chain: Mapping[str, Stage], on: CostContext) -> bool:
    """Whether the stage can run on these ranks."""
    compute = Compute(on.machine.kind, "bfloat16", on.zero, world_size=on.ranks)
    return peft_of(stage) is None or not complaints(stage, View(chain, compute=compute))


def context_complaints(
    stages: Sequence[Stage], costs: Mapping[str, StageCost], chain: Mapping[str, Stage], on: CostContext
) -> Iterator[str]:
    """Complain about sequences that are too long for the model, or for vLLM if it samples them: once for each
    key that the user would lower, for the stage with the longest one."""
    limit = None if on.vllm is None else on.vllm.max_model_len
    excess: dict[str, float] = {}
    by_key: dict[str, str] = {}
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
            by_key[name] = (
                f"{name}={value}: the longest sequence could have {cost.longest} tokens, and the "
                f"model's context has {context:.0f}. Lower it by {more:.0f}."
            )
    yield from by_key.values()


def cache_complaints(sampled: int, on: CostContext) -> Iterator[str]:
    """Complain if vLLM's cache has no room for one row.

    Args:
        sampled: tokens of the longest row that is sampled; 0 if none is.
    """
    if on.vllm is None or not sampled:
        return
    tokens, cache_gib = on.vllm.max_model_len or sampled, on.vllm.kv_cache_gib
    needed = vllm_row(on, on.vllm, tokens)
    if needed > cache_gib * GIB:
        lower = " or lower vllm.max_model_len" if on.vllm.max_model_len else ""
        yield (
            f"vllm.kv_cache_gib={cache_gib:g}: one row of {tokens} tokens needs {amount(needed)} of keys and "
            f"values on each rank. Use {math.ceil(needed / GIB)} or more{lower}."
        )


def longest_sampled(
    stages: Iterable[Stage], chain: Mapping[str, Stage], on: CostContext, base: BaseModelFiles
) -> int | None:
    """Tokens of the longest prompt and answer that these stages sample: vLLM is built for rows of this
    length if `vllm.max_model_len` is null. None if it is not known: a stage does not say, or a model of the
    user's own counts tokens differently from `prepare`."""
    sampling = [stage for stage in stages if stage.samples]
    costs = [cost_of(stage, context_of(stage, chain, on), chain) for stage in sampling]
    if not costs or any(not cost.sampled for cost in costs):
        return None
    own = {directory_of(init) for stage in sampling for _, init in sampled_models(stage, chain)} - {None}
    if any(not is_base_tokenizer(load_tokenizer(each, base.config), base) for each in own if each):
        return None
    return round(max(min(cost.sampled, cost.context, on.shape.context) for cost in costs))


def _owner(stage: Stage, key: str, chain: Mapping[str, Stage]) -> str:
    """The stage whose key the user types: stages of the chain that train nothing repeat the key of one that
    trains (`generate.max_new_tokens: ${ppo.max_new_tokens}`)."""
    if stage.in_chain and not stage.mount.label and peft_of(stage) is None:
        for other in chain.values():
            if peft_of(other) is not None and other.model_dump().get(key) == stage.model_dump()[key]:
                return other.name
    return stage.name


def with_checkpoint_copy(cost: StageCost, on: CostContext, config: CheckpointConfig) -> StageCost:
    """The cost plus the copy of the state on the host from which `checkpoint.background=true` writes. `auto`
    makes a copy only if there is memory for it; DeepSpeed makes none."""
    if (
        config.background is not True
        or on.sharding.library == "deepspeed"
        or not checkpoint_bytes(cost, config)
    ):
        return cost
    size = cost.checkpoint / on.shard_ranks  # if nothing is sharded, rank 0 has all of it
    how = f"what checkpoint.background=true writes from: {amount(cost.checkpoint)}{over(on.shard_ranks)}"
    copy = Allocation("optimizer", size, how, on_host=True)
    return replace(cost, phases=[replace(each, parts=[*each.parts, copy]) for each in cost.phases])


def disk_complaints(
    costs: Mapping[str, StageCost], disk: Disk, checkpoints: CheckpointConfig, attempts: Mapping[str, Attempt]
) -> Iterator[str]:
    """Complain if the store's disk has no room for the artifacts, for checkpoints that stay, for the weights
    from which one is written, and for the checkpoints of the stage that needs most, besides existing ones."""
    published = sum(cost.artifact + cost.keeps_last * cost.checkpoint for cost in costs.values())
    published += max((cost.artifact for cost in costs.values()), default=0.0)  # its trained or merged weights
    missing = [checkpoint_bytes(cost, checkpoints) - attempts[name].bytes for name, cost in costs.items()]
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


def predictions(costs: Mapping[str, StageCost], attempts: Mapping[str, Attempt]) -> dict[str, Prediction]:
    """Stage -> how long it takes, and how much of that its newest checkpoint holds."""
    return {
        name: Prediction(cost.seconds, attempts[name].seconds, attempts[name].share)
        for name, cost in costs.items()
    }


def expectations(costs: Mapping[str, StageCost], on: CostContext, attempts: Mapping[str, Attempt]) -> str:
    """`About 5:10 to go: sft 2:00, 3.1 GiB; ...`, from where each stage's newest checkpoint is."""
    left = {name: each.left() for name, each in predictions(costs, attempts).items()}
    parts = [
        f"{name} {clock(left[name])} ({peak_memory(cost, on)[1] / GIB:.1f} GiB{checkpoint_note(cost, on)})"
        for name, cost in costs.items()
        if cost.phases
    ]
    return f"About {clock(sum(left.values()))} to go: {', '.join(parts)}."


def checkpoint_note(cost: StageCost, on: CostContext) -> str:
    """The time of a checkpoint, as text; empty below a second."""
    seconds = cost.checkpoint_seconds(on.machine)
    return f", {seconds:.0f} s a checkpoint" if seconds >= 1 else ""


def cost_context(settings: Settings, shape: ModelShape, compute: Compute, sizes: Sizes) -> CostContext:
    """The context of this run's costs, with the base model's shape."""
    speed = saved_speed(compute, Path(settings.store_dir)) or quick_speed(compute)
    return CostContext(
        shape=shape,
        dtype_bytes=compute.dtype.itemsize,
        zero=settings.zero,
        machine=local_machine(compute, speed),
        sizes=sizes,
        vllm=settings.vllm if settings.generation == "vllm" else None,
        pads=pads_rows(settings.model, shape),
    )
