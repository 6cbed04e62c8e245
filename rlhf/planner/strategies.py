"""The ways to adapt a model, each with what it needs and what speaks against it, the best one first."""

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
from rlhf.costs.stage_cost import LAYER_SECONDS, StageCost, ThroughputModel, one_after_the_other
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
from rlhf.planner.report import DOES_NOT_FIT, LARGER, time_of
from rlhf.printable import duration, quantity

BITS_STORED, BITS_A_TOKEN = 2.0, 1.0
"""A parameter can learn so many bits (Allen-Zhu and Li 2024, arXiv:2404.05405); a token of an answer holds
about so many (Schulman 2025, "LoRA Without Regret": adapters that can store the data learn it as well)."""
PROMPT_IS_ENOUGH = 10**10
"""Parameters from which on a tuned prompt is as good as tuned weights (Lester et al. 2021, figure 1)."""
WEAKER = ("ia3", "prefix", "p_tuning", "freeze")
RATE_RATIO = 10.0
"""Learning rate of adapters over that of all parameters (Schulman 2025)."""
BYTES_A_TOKEN = 4
"""Of text."""
WORTH_IT = 0.98
"""A configuration that saves more memory must be faster by this factor to be taken before one that fits."""
NODE = 8
"""GPUs of a usual node."""


class Figure(NamedTuple):
    """A number and where it comes from."""

    value: float
    how: str


class Use(NamedTuple):
    """The task, in the mean, and what may be spent on it."""

    rows: int
    prompt: float
    """Tokens."""
    answer: float
    examples: int
    """Of a few-shot prompt."""
    passages: int
    """Of a retrieval prompt."""
    has_questions: bool
    """The data are no plain text alone, so there is something to ask."""
    deploy: str
    hours: float | None
    max_added_latency: float | None
    longest: int | None = None
    """Tokens of PPO's longest answers; None for ppo.max_new_tokens."""
    wants_vllm: bool = False
    """Nothing else may sample."""


@dataclass(frozen=True)
class Strategy:
    """One way to adapt the model."""

    name: str
    on: CostContext
    cost: StageCost
    artifact: Figure
    """Bytes."""
    latency: Figure
    """Seconds that an answer takes longer."""
    tier: int
    """How good it is expected to be; 0 is best."""
    reason: str
    overrides: dict[str, Any] = field(default_factory=dict)
    """Of the experiment that does it, by dotted key."""
    against: list[str] = field(default_factory=list)
    """What disqualifies it."""
    source: str = ""
    """Where its method was published."""
    costs: dict[str, StageCost] = field(default_factory=dict)
    """By stage, of those that train."""
    larger: dict[str, StageCost] = field(default_factory=dict)
    """By stage, with `LARGER` times the rows in a batch; empty where that does not fit."""

    @property
    def fits(self) -> bool:
        """Whether there is memory for it."""
        return shortage(self.cost, self.on) <= MAX_MEMORY_SHARE

    @property
    def hours(self) -> float:
        """Until it is trained, at best."""
        return self.cost.seconds / 3600

    @property
    def most_hours(self) -> float:
        """Until it is trained, at worst. A CPU's speed is measured."""
        return self.hours if self.on.on_cpu else self.cost.at_most().seconds / 3600

    @property
    def rank(self) -> tuple[bool, int, float, float]:
        """Sorts the best one to the front."""
        return bool(self.against), self.tier, self.hours, self.latency.value


class Attempt(NamedTuple):
    """One configuration that a way was tried with."""

    on: CostContext
    stages: list[Stage]
    cost: StageCost
    costs: dict[str, StageCost]
    refused: list[str]


def rank_strategies(
    stages: Sequence[Stage],
    experiment: Experiment,
    base: PreTrainedModel,
    on: CostContext,
    use: Use,
    methods: Sequence[MethodName] | None = None,
) -> list[Strategy]:
    """Every way, the best one first, what is disqualified last.

    Args:
        stages: of the experiment, those that train.
        base: the base model's skeleton.
        methods: the only ones that are weighed; None for all, and ways that leave the weights as they are.
    """
    found = [] if methods else [*prompted(on, use)]
    found += [tuned(name, stages, experiment, base, on, use) for name in methods or METHODS]
    ranked = sorted(found, key=lambda strategy: strategy.rank)
    instead = next((each.name for each in ranked if each.costs and not each.against), None)
    for place, strategy in enumerate(ranked):
        if instead is not None and not strategy.fits:
            ranked[place] = replace(strategy, against=[*strategy.against, f"instead: {instead}"])
    return ranked


def out_of_reach(
    stages: Sequence[Stage], experiment: Experiment, base: PreTrainedModel, on: CostContext, use: Use
) -> Iterator[str]:
    """Where nothing fits: what does on this hardware, and how much of it all parameters need."""
    for stage in stages if len(stages) > 1 else ():
        alone = (tuned(name, [stage], experiment, base, on, use) for name in METHODS)
        found = min((each for each in alone if not each.against), key=lambda each: each.rank, default=None)
        if found is not None:
            yield f"{stage.name} alone fits with {found.name}: plan.trains=[{stage.name}]"
    here = on.machine.ranks_here
    for doublings in range(1, 10):
        ranks = on.ranks * 2**doublings
        now = here if on.ranks > here else min(ranks, NODE)
        host = on.machine.host_memory * here / now
        machine = replace(on.machine, ranks=ranks, ranks_here=now, host_memory=host)
        larger = tuned("none", stages, experiment, base, replace(on, machine=machine), use)
        if larger.fits:
            yield f"all parameters fit on {ranks} of these {'ranks' if on.on_cpu else 'GPUs'}"
            return


def prompted(on: CostContext, use: Use) -> Iterator[Strategy]:
    """What leaves the weights as they are."""
    row = use.prompt + use.answer
    fits_whole = use.rows * row + use.prompt + use.answer <= on.shape.context
    examples = use.rows if fits_whole else use.examples
    ways = {
        "zero-shot": (0.0, 0.0, 4, "nothing tells it how to answer", "zero_shot"),
        "few-shot": (
            examples * row, examples * row, 0 if fits_whole else 3,
            f"all {use.rows} rows fit into one prompt" if fits_whole
            else f"{examples} examples show the manner, at each request", "few_shot",
        ),
        "retrieval": (
            use.passages * row, use.rows * row, 3,
            "finds what the training rows say; take it where answers are facts of a corpus", "retrieval",
        ),
    }  # fmt: skip
    for name, (added, stored, tier, reason, method) in ways.items():
        total = use.prompt + added + use.answer
        against = []
        if total > on.shape.context:
            against.append(f"{total:.0f} tokens, and the context has {on.shape.context}")
        if not use.has_questions:
            against.append("sft.data is plain text, so there is no question to ask")
        phases = [MemoryPhase("answering elsewhere")]
        if use.deploy != "api_only":
            answering = sampling(on, 1, use.prompt + added, round(use.answer))
            phases = [MemoryPhase("answering", [frozen_weights(on, "model"), *answering])]
        strategy = Strategy(
            name, on, StageCost(phases),
            Figure(stored * BYTES_A_TOKEN, f"{stored:.0f} tokens of text x {BYTES_A_TOKEN} B"),
            prefill(on, added), tier, reason,
            {"stage": "compare", "compare.methods": [method], "compare.artifacts": [], "compare.reward": None,
             "compare.quality": "rouge_l"}, against,
        )  # fmt: skip
        if name == "few-shot":
            strategy.overrides["compare.few_shot.examples"] = examples
            if fits_whole:
                strategy.overrides["compare.few_shot.choice"] = "random"  # a search could pass some over
        yield judged(strategy, use)


def tuned(
    name: MethodName,
    stages: Sequence[Stage],
    given: Experiment,
    base: PreTrainedModel,
    on: CostContext,
    use: Use,
) -> Strategy:
    """A tuning method, in the fastest configuration that fits."""
    method = METHODS[name]
    reward = next(stage for stage in given.stages.values() if stage.makes == "reward")
    is_for_all = any(stage.name == reward.name for stage in stages)
    scored_by = name if is_for_all else dict(reward)["peft"].method
    best: Attempt | None = None
    for zero, squeeze, engine, local in attempts(on, name, stages, use):
        setting = replace(on, zero=zero, vllm=engine, local_sampling=local)
        changed = [with_method(stage, name, squeeze, scored_by, setting, use) for stage in stages]
        tried = attempted(changed, given, setting)
        if shortage(tried.cost, setting) > MAX_MEMORY_SHARE:
            continue
        if engine is not None and not on.on_cpu:
            tried = with_cache(tried, given)
            if shortage(tried.cost, tried.on) > MAX_MEMORY_SHARE:
                continue
        if best and not best.refused and tried.cost.seconds > WORTH_IT * best.cost.seconds:
            continue
        tried = tried._replace(refused=list(refused_by_stages(tried, given, base)))
        if best is None or not tried.refused:
            best = tried
    found = best or tried._replace(refused=list(refused_by_stages(tried, given, base)))
    larger = attempted([with_larger_batches(stage) for stage in found.stages], given, found.on)
    setting, changed, cost, refused = found.on, found.stages, found.cost, found.refused
    peft = peft_of(changed[0])
    assert peft is not None
    count = COSTS[name].published(on.shape, peft)
    strategy = Strategy(
        method.title, setting, cost,
        Figure(on.dtype_bytes * count, f"{quantity(count)} parameters x {on.dtype_bytes} B"),
        served(on, peft, use), *quality(peft, on, use), experiment(stages, changed, setting, on.vllm),
        source=method.source, costs=found.costs,
        larger={} if shortage(larger.cost, found.on) > MAX_MEMORY_SHARE else larger.costs,
    )  # fmt: skip
    against = []
    if name == "qlora" and on.on_cpu:
        against.append("4-bit weights need a GPU")
    if use.deploy == "api_only":
        against.append("deploy=api_only: weights are out of reach")
    if use.deploy == "merged" and not method.merges:
        against.append("deploy=merged: it cannot be folded into the weights")
    if use.deploy == "many_adapters" and not COSTS[name].is_adapter:
        against.append("deploy=many_adapters: each task would need a model of its own")
    for stage in changed:
        if stage.name == "sft" and use.prompt + use.answer > (limit := stage.model_dump()["max_tokens"]):
            against.append(
                f"a row has {use.prompt + use.answer:.0f} tokens, and sft.max_tokens={limit} cuts them"
            )
    return judged(replace(strategy, against=against + refused), use)


def with_larger_batches(stage: Stage) -> Stage:
    """The stage with `LARGER` times the rows in each batch."""
    return stage.model_copy(
        update={size: LARGER * dict(stage)[size] for size in fields_of(type(stage), Mark.BATCH)}
    )


def attempted(stages: list[Stage], given: Experiment, on: CostContext) -> Attempt:
    """What it costs."""
    whole = with_answers({**given.stages, **{stage.name: stage for stage in stages}}, stages)
    minutes = given.settings.checkpoint.every_minutes
    costs = {
        stage.name: cost_of(stage, on, whole).with_checkpoints(on.machine, minutes and 60 * minutes)
        for stage in stages
    }
    return Attempt(on, stages, named_after_stages(costs), costs, [])


def with_answers(chain: Mapping[str, Stage], stages: Sequence[Stage]) -> dict[str, Stage]:
    """The chain in which stages that repeat PPO's longest answer (`${ppo.max_new_tokens}`) still do."""
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


def with_cache(found: Attempt, given: Experiment) -> Attempt:
    """With a cache for vLLM that has room for its longest row."""
    on, vllm = found.on, found.on.vllm
    assert vllm is not None
    longest = math.ceil(vllm_row(on, vllm, vllm.max_model_len or found.cost.sampled) / GIB)
    if longest <= vllm.kv_cache_gib:
        return found
    larger = replace(on, vllm=vllm.model_copy(update={"kv_cache_gib": float(longest)}))
    return attempted(found.stages, given, larger)


def refused_by_stages(found: Attempt, given: Experiment, base: PreTrainedModel) -> Iterator[str]:
    """What the run of such an experiment would say of this model on these ranks."""
    on = found.on
    generation = "local" if on.vllm is None else "vllm"
    settings = given.settings.model_copy(update={"zero": on.zero, "generation": generation})
    chain = with_answers({**given.stages, **{stage.name: stage for stage in found.stages}}, found.stages)
    planned = replace(given, settings=settings, stages=chain)
    compute = Compute(on.machine.kind, "bfloat16", on.zero, world_size=on.ranks)
    for stage in found.stages:
        yield from map(str, complaints(stage, View(chain, compute=compute)))
        try:
            check_method(stage, planned)
            check_tuning(stage, base, check_attachable)
        except ConfigError as error:
            yield str(error)


def attempts(
    on: CostContext, method: MethodName, stages: Sequence[Stage], use: Use
) -> Iterator[tuple[Zero, int, VllmConfig | None, LocalSampling]]:
    """(zero, how far memory is saved at the cost of time, what samples and how), the simplest first."""
    sharded: list[Zero] = ["zero2", "zero3", "fsdp2"] if on.ranks > 1 else []
    sharded += ["hsdp"] if on.machine.nodes > 1 else []
    zeros: list[Zero] = ["none", *sharded, *([] if on.on_cpu else ["zero3_offload"])]  # type: ignore[list-item]  # mypy takes it for str
    samples = any(stage.samples for stage in stages)
    for zero in zeros if METHODS[method].shards else zeros[:1]:
        for squeeze in (0, 1, 2):
            for engine in engines(on, use) if samples else [on.vllm if use.wants_vllm else None]:
                yield zero, squeeze, engine, "whole"
                if samples and engine is None and replace(on, zero=zero).shards_weights:
                    yield zero, squeeze, engine, "layers"  # the run's preflight chooses so, too


def engines(on: CostContext, use: Use) -> list[VllmConfig | None]:
    """vLLM over one or several GPUs of a host; and the local engine, unless vLLM is asked for."""
    if on.vllm is None or on.on_cpu:
        return [on.vllm]
    heads, here = on.shape.heads, min(on.machine.ranks_here, on.ranks)
    groups = [size for size in (1, 2, 4, 8) if here % size == 0 and heads % size == 0]
    fewest = on.vllm.tensor_parallel
    found = [on.vllm.model_copy(update={"tensor_parallel": size}) for size in groups if size >= fewest]
    return [*found, *([] if use.wants_vllm else [None])]


def with_method(
    stage: Stage, name: MethodName, squeeze: int, scored_by: MethodName, on: CostContext, use: Use
) -> Stage:
    """The stage with another tuning method, and what PPO asks for with that; with sizes of batches that the
    ranks can share, and answers as long as the plan's. Squeezed once it checkpoints activations and shards
    frozen models, twice it also takes smaller micro-batches.

    Args:
        scored_by: the method that the reward model is trained with.
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


def experiment(
    before: Sequence[Stage], after: Sequence[Stage], on: CostContext, was_vllm: VllmConfig | None
) -> dict[str, Any]:
    """The overrides that the planned stages differ by."""
    found: dict[str, Any] = {"stage": [stage.name for stage in after], "zero": on.zero}
    if on.vllm is not None and any(stage.samples for stage in after):
        found["generation"] = "vllm"
        for key, value in on.vllm.model_dump().items():
            if was_vllm is None or value != was_vllm.model_dump()[key]:
                found[f"vllm.{key}"] = value
    for old, new in zip(before, after, strict=True):
        was, now = old.model_dump(), new.model_dump(warnings=False)
        keys = ("activation_checkpointing", "micro_batch_tokens", "frozen_placement", "max_new_tokens")
        for key in (*fields_of(type(new), Mark.BATCH), *keys):
            if was.get(key) != now.get(key):
                found[f"{new.name}.{key}"] = now[key]
        turned_off = (gate for gate, bound in new.gates.items() if bound is None and old.gates[gate])
        found |= {f"{new.name}.gates.{gate}": None for gate in turned_off}
        if "critic" in was and was["critic"]["init"] != now["critic"]["init"]:
            found[f"{new.name}.critic.init"] = now["critic"]["init"]
        if was["peft"]["method"] == now["peft"]["method"]:
            continue
        found[f"{new.name}.peft"] = now["peft"]["method"]
        full = {was["peft"]["method"] == "none", now["peft"]["method"] == "none"}
        factor = 1.0 if len(full) == 1 else RATE_RATIO if was["peft"]["method"] == "none" else 1 / RATE_RATIO
        found[f"{new.name}.optim.lr"] = was["optim"]["lr"] * factor
        if "critic" in was:
            found[f"{new.name}.critic.optim.lr"] = was["critic"]["optim"]["lr"] * factor
    return found


def named_after_stages(costs: Mapping[str, StageCost]) -> StageCost:
    """One cost of stages that run one after the other."""
    prefixed = [
        replace(cost, phases=[replace(phase, name=f"{name}, {phase.name}") for phase in cost.phases])
        for name, cost in costs.items()
    ]
    return one_after_the_other(prefixed)


def quality(peft: PeftConfig, on: CostContext, use: Use) -> tuple[int, str]:
    """(tier, why): whether what trains can store what the answers say."""
    count = COSTS[peft.method].trained(on.shape, peft)
    answer_bits, stored_bits = BITS_A_TOKEN * use.rows * use.answer, BITS_STORED * count
    holds = (
        f"{quantity(count)} trained parameters hold {quantity(stored_bits)} bits, the answers about "
        f"{quantity(answer_bits)}"
    )
    if answer_bits > stored_bits:
        return 2, f"too small: {holds}"
    if peft.method == "prompt" and on.shape.parameters < PROMPT_IS_ENOUGH:
        return 2, f"a tuned prompt falls behind below {PROMPT_IS_ENOUGH:.0e} parameters (Lester et al. 2021)"
    return (1 if peft.method in WEAKER else 0), holds


def prefill(on: CostContext, tokens: float) -> Figure:
    """Seconds to read so many more prompt tokens."""
    worker = ThroughputModel(on)
    each = worker.forward(tokens)
    seconds = tokens * each / worker.rate("read")
    return Figure(seconds, f"{tokens:.0f} more prompt tokens x {each:.3g} operations")


def served(on: CostContext, peft: PeftConfig, use: Use) -> Figure:
    """What an answer takes longer with a method that stays beside the weights."""
    cost = COSTS[peft.method]
    if METHODS[peft.method].merges and use.deploy != "many_adapters":
        return Figure(0.0, "folded into the weights")
    read = prefill(on, cost.added_tokens(on.shape, peft))
    extra = on.dtype_bytes * cost.added(on.shape, peft) / (on.machine.speed.gbytes * 1e9)
    kernels = on.shape.layers * LAYER_SECONDS * cost.added_kernels
    how = f"{use.answer:.0f} tokens x ({extra:.2g} s of weights + {kernels:.2g} s of kernels); {read.how}"
    return Figure(read.value + use.answer * (extra + kernels), how)


def judged(strategy: Strategy, use: Use) -> Strategy:
    """With what memory, time and latency say against it."""
    on, against = strategy.on, list(strategy.against)
    if not strategy.fits:
        peak, _, _ = tightest(strategy.cost, on)
        against.append(f"{DOES_NOT_FIT}: {shortage(strategy.cost, on):.2g} times the memory ({peak.name})")
    if use.hours is not None and strategy.most_hours > use.hours:
        against.append(f"{time_of(strategy)}, and plan.hours={use.hours:g}")
    if use.max_added_latency is not None and strategy.latency.value > use.max_added_latency:
        took = duration(strategy.latency.value)
        against.append(f"{took} an answer, and plan.max_added_latency={use.max_added_latency:g}")
    return replace(strategy, against=against)
