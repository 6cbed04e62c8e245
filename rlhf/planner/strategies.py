"""The strategies to adapt a model, with their costs and objections, the fastest first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from rlhf.config import ConfigError
from rlhf.costs.hardware import GIB
from rlhf.costs.memory import MemoryPhase, frozen_weights, sampling, vllm_row
from rlhf.costs.peft_costs import COSTS
from rlhf.costs.setup import CostContext, LocalSampling
from rlhf.costs.stage_cost import LAYER_SECONDS, StageCost, ThroughputModel, sequential_cost
from rlhf.distributed.compute import Compute, Zero
from rlhf.generation.vllm import VllmConfig
from rlhf.models.peft.attach import check_attachable
from rlhf.models.peft.config import PeftConfig
from rlhf.models.peft.methods import METHODS, MethodName
from rlhf.pipeline.checks import complaints
from rlhf.pipeline.costing import cost_of
from rlhf.pipeline.experiment import Experiment, check_method
from rlhf.pipeline.fields import Mark, fields_of, peft_of
from rlhf.pipeline.preflight import MAX_MEMORY_SHARE, check_tuning, shortage, tightest
from rlhf.pipeline.stage import Stage, View
from rlhf.planner.report import BATCH_FACTOR, DOES_NOT_FIT, time_of
from rlhf.printable import duration, quantity

RATE_RATIO = 10.0
"""Ratio of an adapter's learning rate to that of full tuning (Schulman 2025, "LoRA Without Regret")."""
BYTES_PER_TOKEN = 4
"""Bytes of text per token."""
MAX_TIME_RATIO = 0.98
"""A configuration that saves more memory replaces a simpler one that fits only if its time is at most this
share of the simpler one's."""
TIME_ERROR = 0.27
"""Largest error of a predicted time of training, as measured: docs/planner.md."""
GPUS_PER_NODE = 8
"""GPUs of a typical node."""


class Figure(NamedTuple):
    """A number with its calculation."""

    value: float
    formula: str
    """The calculation, as text with numbers."""


class UseCase(NamedTuple):
    """The task's mean lengths, and the limits of the plan."""

    rows: int
    """Training rows."""
    prompt: float
    """Mean tokens of a prompt."""
    answer: float
    """Mean tokens of an answer."""
    examples: int
    """Examples in a few-shot prompt."""
    passages: int
    """Passages in a retrieval prompt."""
    has_questions: bool
    """Whether some rows have a prompt; False for plain text."""
    deploy: str
    hours: float | None
    """Longest training time, hours."""
    max_added_latency: float | None
    """Seconds per answer."""
    longest: int | None = None
    """Tokens of PPO's longest answers; None for ppo.max_new_tokens."""
    wants_vllm: bool = False
    """Whether only vLLM may sample."""


@dataclass(frozen=True)
class Strategy:
    """One way to adapt the model, with its costs."""

    name: str
    on: CostContext
    cost: StageCost
    artifact: Figure
    """Size on disk, bytes."""
    latency: Figure
    """Added seconds per answer."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Overrides of the experiment that runs it, by dotted key."""
    objections: list[str] = field(default_factory=list)
    """Reasons that rule it out; empty if it is possible."""
    source: str = ""
    """Publication of its method."""
    costs: dict[str, StageCost] = field(default_factory=dict)
    """Cost by stage, of the trained stages."""
    larger_batch_costs: dict[str, StageCost] = field(default_factory=dict)
    """Cost by stage with batches `BATCH_FACTOR` times as large; empty if that does not fit."""

    @property
    def fits(self) -> bool:
        """Whether it fits into memory."""
        return shortage(self.cost, self.on) <= MAX_MEMORY_SHARE

    @property
    def hours(self) -> float:
        """Training time at best, hours."""
        return self.cost.seconds / 3600

    @property
    def max_hours(self) -> float:
        """Training time at worst, hours; on a CPU, whose speed is measured, equal to `hours`."""
        return self.hours if self.on.on_cpu else self.cost.at_worst().seconds / 3600

    @property
    def order(self) -> tuple[bool, float, float, str]:
        """Sort key: possible strategies first, then the fastest."""
        return bool(self.objections), self.hours, self.latency.value, self.name


class Attempt(NamedTuple):
    """A tuning method in one configuration, with its cost."""

    on: CostContext
    stages: list[Stage]
    cost: StageCost
    costs: dict[str, StageCost]
    refused: list[str]


def compare_strategies(
    stages: Sequence[Stage],
    experiment: Experiment,
    base: PreTrainedModel,
    on: CostContext,
    use: UseCase,
    methods: Sequence[MethodName] | None = None,
) -> list[Strategy]:
    """All strategies, the fastest first, those that are ruled out last.

    Args:
        stages: the experiment's planned stages.
        base: the base model without weights.
        methods: tuning methods to compare; None for all, and strategies without training.
    """
    strategies = [] if methods else [*prompting_strategies(on, use)]
    strategies += [tuning_strategy(name, stages, experiment, base, on, use) for name in methods or METHODS]
    strategies.sort(key=lambda strategy: strategy.order)
    instead = fastest(strategies)
    for place, strategy in enumerate(strategies):
        if instead.costs and not instead.objections and not strategy.fits:
            advice = f"instead: {instead.name}"
            strategies[place] = replace(strategy, objections=[*strategy.objections, advice])
    return strategies


def fastest(strategies: Sequence[Strategy]) -> Strategy:
    """The first of the `equally_fast` strategies; if no training is possible, the first possible one, else
    the first one that trains.

    Args:
        strategies: as `compare_strategies` sorts them.
    """
    first = min(strategies, key=lambda strategy: (bool(strategy.objections), not strategy.costs))
    return next(iter(equally_fast(strategies)), first)


def equally_fast(strategies: Sequence[Strategy]) -> list[Strategy]:
    """The possible trainings that take no longer than the fastest one, within the planner's error, in the
    order of `METHODS`."""
    possible = [each for each in strategies if each.costs and not each.objections]
    most = (1 + TIME_ERROR) * min((each.hours for each in possible), default=0.0)
    places = {method.title: place for place, method in enumerate(METHODS.values())}
    return sorted((each for each in possible if each.hours <= most), key=lambda each: places[each.name])


def fitting_alternatives(
    stages: Sequence[Stage],
    experiment: Experiment,
    base: PreTrainedModel,
    on: CostContext,
    use: UseCase,
    methods: Sequence[MethodName] | None = None,
) -> Iterator[str]:
    """Advice if nothing fits: what fits on this hardware, and how many such ranks full tuning needs.

    Args:
        methods: `plan.methods`; None for all.
    """
    for stage in stages if len(stages) > 1 else ():
        alone = {name: tuning_strategy(name, [stage], experiment, base, on, use) for name in METHODS}
        fitting = [name for name in METHODS if not alone[name].objections]
        if fitting:
            method = min(fitting, key=lambda name: alone[name].order)
            also = f" plan.methods=[{method}]" if methods and method not in methods else ""
            yield f"{stage.name} alone fits with {alone[method].name}: plan.trains=[{stage.name}]{also}"
    here = on.machine.ranks_here
    for doublings in range(1, 10):
        ranks = on.ranks * 2**doublings
        ranks_here = here if on.ranks > here else min(ranks, GPUS_PER_NODE)
        host = on.machine.host_memory * here / ranks_here
        machine = replace(on.machine, ranks=ranks, ranks_here=ranks_here, host_memory=host)
        larger = tuning_strategy("none", stages, experiment, base, replace(on, machine=machine), use)
        if larger.fits:
            yield f"all parameters fit on {ranks} of these {'ranks' if on.on_cpu else 'GPUs'}"
            return


def prompting_strategies(on: CostContext, use: UseCase) -> Iterator[Strategy]:
    """The strategies that leave the weights as they are: zero-shot, few-shot and retrieval."""
    row = use.prompt + use.answer
    examples = min(use.examples, use.rows)
    ways = {
        "zero-shot": (0.0, 0.0),
        "few-shot": (examples * row, examples * row),
        "retrieval": (use.passages * row, use.rows * row),
    }
    for name, (added, stored) in ways.items():
        total = use.prompt + added + use.answer
        objections = []
        if total > on.shape.context:
            objections.append(f"{total:.0f} tokens, and the context has {on.shape.context}")
        if not use.has_questions:
            objections.append("sft.data is plain text, so there is no question to ask")
        phases = [MemoryPhase("answering elsewhere")]
        if use.deploy != "api_only":
            answering = sampling(on, 1, use.prompt + added, round(use.answer))
            phases = [MemoryPhase("answering", [frozen_weights(on, "model"), *answering])]
        strategy = Strategy(
            name, on, StageCost(phases),
            Figure(stored * BYTES_PER_TOKEN, f"{stored:.0f} tokens of text x {BYTES_PER_TOKEN} B"),
            prefill(on, added),
            {"stage": "compare", "compare.methods": [name.replace("-", "_")], "compare.artifacts": [],
             "compare.reward": None, "compare.quality": "rouge_l"}, objections,
        )  # fmt: skip
        yield with_objections(strategy, use)


def tuning_strategy(
    name: MethodName,
    stages: Sequence[Stage],
    given: Experiment,
    base: PreTrainedModel,
    on: CostContext,
    use: UseCase,
) -> Strategy:
    """The strategy of a tuning method, in the fastest configuration that fits."""
    method = METHODS[name]
    reward = next(stage for stage in given.stages.values() if stage.makes == "reward")
    is_for_all = any(stage.name == reward.name for stage in stages)
    scored_by = name if is_for_all else dict(reward)["peft"].method
    best: Attempt | None = None
    for zero, squeeze, engine, local in configurations(on, name, stages, use):
        setting = replace(on, zero=zero, vllm=engine, local_sampling=local)
        changed = [with_method(stage, name, squeeze, scored_by, setting, use) for stage in stages]
        tried = cost_attempt(changed, given, setting)
        if shortage(tried.cost, setting) > MAX_MEMORY_SHARE:
            continue
        if engine is not None and not on.on_cpu:
            tried = with_cache(tried, given)
            if shortage(tried.cost, tried.on) > MAX_MEMORY_SHARE:
                continue
        if best and not best.refused and tried.cost.seconds > MAX_TIME_RATIO * best.cost.seconds:
            continue
        tried = tried._replace(refused=list(stage_refusals(tried, given, base)))
        if best is None or not tried.refused:
            best = tried
    chosen = best or tried._replace(refused=list(stage_refusals(tried, given, base)))
    larger = cost_attempt([with_larger_batches(stage) for stage in chosen.stages], given, chosen.on)
    setting, changed, cost, refused = chosen.on, chosen.stages, chosen.cost, chosen.refused
    peft = peft_of(changed[0])
    assert peft is not None
    count = COSTS[name].published(on.shape, peft)
    strategy = Strategy(
        method.title, setting, cost,
        Figure(on.dtype_bytes * count, f"{quantity(count)} parameters x {on.dtype_bytes} B"),
        added_latency(on, peft, use), experiment_overrides(stages, changed, setting, on.vllm),
        source=method.source, costs=chosen.costs,
        larger_batch_costs={} if shortage(larger.cost, chosen.on) > MAX_MEMORY_SHARE else larger.costs,
    )  # fmt: skip
    objections = []
    if name == "qlora" and on.on_cpu:
        objections.append("4-bit weights need a GPU")
    if use.deploy == "api_only":
        objections.append("plan.deploy=api_only: the weights cannot be changed")
    if use.deploy == "merged" and not method.merges:
        objections.append("plan.deploy=merged: this method cannot be merged into the weights")
    if use.deploy == "many_adapters" and not COSTS[name].is_adapter:
        objections.append("plan.deploy=many_adapters: each task would need a model of its own")
    for stage in changed:
        if stage.name == "sft" and use.prompt + use.answer > (limit := stage.model_dump()["max_tokens"]):
            objections.append(
                f"a row has {use.prompt + use.answer:.0f} tokens, and sft.max_tokens={limit} cuts them"
            )
    for stage_name, each in chosen.costs.items():
        if each.longest > (context := min(each.context, setting.shape.context)):
            answers = f" with plan.longest_answer={use.longest}" if use.longest and each.sampled else ""
            objections.append(
                f"{stage_name}: a prompt and its answer have {each.longest:.0f} tokens{answers}, and the "
                f"context has {context:.0f}"
            )
    return with_objections(replace(strategy, objections=objections + refused), use)


def with_larger_batches(stage: Stage) -> Stage:
    """The stage with `BATCH_FACTOR` times the rows in each batch."""
    return stage.model_copy(
        update={size: BATCH_FACTOR * dict(stage)[size] for size in fields_of(type(stage), Mark.BATCH)}
    )


def cost_attempt(stages: list[Stage], given: Experiment, on: CostContext) -> Attempt:
    """The cost of these stages in this configuration."""
    chain = with_answers({**given.stages, **{stage.name: stage for stage in stages}}, stages)
    minutes = given.settings.checkpoint.every_minutes
    costs = {
        stage.name: cost_of(stage, on, chain).with_checkpoints(on.machine, minutes and 60 * minutes)
        for stage in stages
    }
    return Attempt(on, stages, named_after_stages(costs), costs, [])


def with_answers(chain: Mapping[str, Stage], stages: Sequence[Stage]) -> dict[str, Stage]:
    """The chain with PPO's longest answer in all stages that repeat it (`${ppo.max_new_tokens}`)."""
    lengths = {
        dict(stage)["max_new_tokens"] for stage in stages if "max_new_tokens" in type(stage).model_fields
    }
    if not lengths:
        return dict(chain)
    return {
        name: stage.model_copy(update={"max_new_tokens": max(lengths)})
        if stage.in_chain and not stage.mount.label and "max_new_tokens" in type(stage).model_fields
        else stage
        for name, stage in chain.items()
    }


def with_cache(attempt: Attempt, given: Experiment) -> Attempt:
    """The attempt with a vLLM cache that has room for its longest row."""
    on, vllm = attempt.on, attempt.on.vllm
    assert vllm is not None
    row_gib = math.ceil(vllm_row(on, vllm, vllm.max_model_len or attempt.cost.sampled) / GIB)
    if row_gib <= vllm.kv_cache_gib:
        return attempt
    larger = replace(on, vllm=vllm.model_copy(update={"kv_cache_gib": float(row_gib)}))
    return cost_attempt(attempt.stages, given, larger)


def stage_refusals(attempt: Attempt, given: Experiment, base: PreTrainedModel) -> Iterator[str]:
    """Complaints that a run of this configuration would raise for this model on these ranks."""
    on = attempt.on
    generation = "local" if on.vllm is None else "vllm"
    settings = given.settings.model_copy(update={"zero": on.zero, "generation": generation})
    chain = with_answers({**given.stages, **{stage.name: stage for stage in attempt.stages}}, attempt.stages)
    planned = replace(given, settings=settings, stages=chain)
    compute = Compute(on.machine.kind, "bfloat16", on.zero, world_size=on.ranks)
    for stage in attempt.stages:
        yield from map(str, complaints(stage, View(chain, compute=compute)))
        try:
            check_method(stage, planned)
            check_tuning(stage, base, check_attachable)
        except ConfigError as error:
            yield str(error)


def configurations(
    on: CostContext, method: MethodName, stages: Sequence[Stage], use: UseCase
) -> Iterator[tuple[Zero, int, VllmConfig | None, LocalSampling]]:
    """(zero, level of memory saving, vLLM's settings or None, local_sampling), the simplest first."""
    sharded: list[Zero] = ["zero2", "zero3", "fsdp2"] if on.ranks > 1 else []
    sharded += ["hsdp"] if on.machine.nodes > 1 else []
    zeros: list[Zero] = ["none", *sharded, *([] if on.on_cpu else ["zero3_offload"])]  # type: ignore[list-item]  # mypy infers str
    samples = any(stage.samples for stage in stages)
    for zero in zeros if METHODS[method].shards else zeros[:1]:
        for squeeze in (0, 1, 2):
            for engine in engines(on, use) if samples else [on.vllm if use.wants_vllm else None]:
                yield zero, squeeze, engine, "whole"
                if samples and engine is None and replace(on, zero=zero).shards_weights:
                    yield zero, squeeze, engine, "layers"  # the preflight of a run chooses it too


def engines(on: CostContext, use: UseCase) -> list[VllmConfig | None]:
    """vLLM's settings for groups of 1 to 8 GPUs; None for the local engine, unless only vLLM may sample."""
    if on.vllm is None or on.on_cpu:
        return [on.vllm]
    heads, here = on.shape.heads, min(on.machine.ranks_here, on.ranks)
    groups = [size for size in (1, 2, 4, 8) if here % size == 0 and heads % size == 0]
    fewest = on.vllm.tensor_parallel
    settings = [on.vllm.model_copy(update={"tensor_parallel": size}) for size in groups if size >= fewest]
    return [*settings, *([] if use.wants_vllm else [None])]


def with_method(
    stage: Stage, name: MethodName, squeeze: int, scored_by: MethodName, on: CostContext, use: UseCase
) -> Stage:
    """The stage with a tuning method, batch sizes that the ranks can share, and the plan's longest answer.

    Args:
        squeeze: level of memory saving. 1: checkpoint activations and shard frozen models; 2: also smaller
            micro-batches.
        scored_by: tuning method of the reward model. If it and `name` have virtual tokens, PPO's critic
            starts from the SFT model.
    """
    knobs = dict(stage)
    if METHODS[name].pads and METHODS[scored_by].pads and "critic" in knobs:
        knobs["critic"] = knobs["critic"].model_copy(update={"init": "sft"})
    peft = knobs["peft"]
    if peft.method != name:
        knobs["peft"] = PeftConfig.model_validate({"method": name})
    for size in fields_of(type(stage), Mark.BATCH):
        step = math.lcm(on.ranks, stage.unit())
        knobs[size] = math.ceil(knobs[size] / step) * step
    if use.longest is not None and "max_new_tokens" in knobs:
        knobs["max_new_tokens"] = use.longest
    if "activation_checkpointing" in knobs:
        knobs["activation_checkpointing"] |= squeeze > 0
    if "frozen_placement" in knobs and (on.shards_weights or (squeeze > 0 and on.zero != "none")):
        knobs["frozen_placement"] = "sharded"
    if "micro_batch_tokens" in knobs:
        knobs["micro_batch_tokens"] //= 4 if squeeze > 1 else 1
    return stage.model_copy(update=knobs)


def experiment_overrides(
    before: Sequence[Stage], after: Sequence[Stage], on: CostContext, was_vllm: VllmConfig | None
) -> dict[str, Any]:
    """The overrides that turn the stages `before` the plan into those `after` it."""
    overrides: dict[str, Any] = {"stage": [stage.name for stage in after], "zero": on.zero}
    if on.vllm is not None and any(stage.samples for stage in after):
        overrides["generation"] = "vllm"
        for key, value in on.vllm.model_dump().items():
            if was_vllm is None or value != was_vllm.model_dump()[key]:
                overrides[f"vllm.{key}"] = value
    for old, new in zip(before, after, strict=True):
        was, now = old.model_dump(), new.model_dump(warnings=False)
        keys = ("activation_checkpointing", "micro_batch_tokens", "frozen_placement", "max_new_tokens")
        for key in (*fields_of(type(new), Mark.BATCH), *keys):
            if was.get(key) != now.get(key):
                overrides[f"{new.name}.{key}"] = now[key]
        turned_off = (gate for gate, bound in new.gates.items() if bound is None and old.gates[gate])
        overrides |= {f"{new.name}.gates.{gate}": None for gate in turned_off}
        if "critic" in was and was["critic"]["init"] != now["critic"]["init"]:
            overrides[f"{new.name}.critic.init"] = now["critic"]["init"]
        if was["peft"]["method"] == now["peft"]["method"]:
            continue
        overrides[f"{new.name}.peft"] = now["peft"]["method"]
        full = {was["peft"]["method"] == "none", now["peft"]["method"] == "none"}
        factor = 1.0 if len(full) == 1 else RATE_RATIO if was["peft"]["method"] == "none" else 1 / RATE_RATIO
        overrides[f"{new.name}.optim.lr"] = was["optim"]["lr"] * factor
        if "critic" in was:
            overrides[f"{new.name}.critic.optim.lr"] = was["critic"]["optim"]["lr"] * factor
    return overrides


def named_after_stages(costs: Mapping[str, StageCost]) -> StageCost:
    """Total cost of stages that run one after the other; phases are prefixed with the stage's name."""
    prefixed = [
        replace(cost, phases=[replace(phase, name=f"{name}, {phase.name}") for phase in cost.phases])
        for name, cost in costs.items()
    ]
    return sequential_cost(prefixed)


def prefill(on: CostContext, tokens: float) -> Figure:
    """Added seconds per answer for `tokens` more prompt tokens."""
    worker = ThroughputModel(on)
    each = worker.forward(tokens)
    seconds = tokens * each / worker.rate("read")
    return Figure(seconds, f"{tokens:.0f} more prompt tokens x {each:.3g} operations")


def added_latency(on: CostContext, peft: PeftConfig, use: UseCase) -> Figure:
    """Added seconds per answer of a tuning method that is not merged into the weights."""
    cost = COSTS[peft.method]
    if METHODS[peft.method].merges and use.deploy != "many_adapters":
        return Figure(0.0, "merged into the weights")
    read = prefill(on, cost.added_tokens(on.shape, peft))
    extra = on.dtype_bytes * cost.added(on.shape, peft) / (on.machine.speed.gbytes * 1e9)
    kernels = on.shape.layers * LAYER_SECONDS * cost.added_kernels
    formula = (
        f"{use.answer:.0f} tokens x ({extra:.2g} s of weights + {kernels:.2g} s of kernels); {read.formula}"
    )
    return Figure(read.value + use.answer * (extra + kernels), formula)


def with_objections(strategy: Strategy, use: UseCase) -> Strategy:
    """The strategy with objections about memory, time and latency added."""
    on, objections = strategy.on, list(strategy.objections)
    if not strategy.fits:
        peak, on_host, share = tightest(strategy.cost, on)
        memory = {None: "memory", True: "host memory", False: "GPU memory"}[on_host]
        objections.append(
            f"{DOES_NOT_FIT}: {peak.name} needs {share:.0%} of the {memory}, and at most "
            f"{MAX_MEMORY_SHARE:.0%} may be used"
        )
    if use.hours is not None and strategy.max_hours > use.hours:
        objections.append(f"{time_of(strategy)}, and plan.hours={use.hours:g}")
    if use.max_added_latency is not None and strategy.latency.value > use.max_added_latency:
        took = duration(strategy.latency.value)
        objections.append(f"{took} an answer, and plan.max_added_latency={use.max_added_latency:g}")
    return replace(strategy, objections=objections)
