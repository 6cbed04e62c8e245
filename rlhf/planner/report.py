"""A plan as text: the table, the calculations, and the experiment file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

import yaml

from rlhf.costs.hardware import GIB
from rlhf.costs.memory import FP32, amount
from rlhf.costs.setup import CostContext
from rlhf.costs.stage_cost import MAX_GPU_SLOWDOWN, Activity, StageCost, ThroughputModel
from rlhf.pipeline.preflight import peak_memory
from rlhf.printable import duration
from rlhf.tracking.progress import clock
from rlhf.tracking.tables import Cells

if TYPE_CHECKING:
    from rlhf.planner.strategies import Strategy

MISSING = object()
DOES_NOT_FIT = "does not fit"
BATCH_FACTOR = 4
"""Factor of the batch size in the column that shows larger batches."""
PUBLISHED_SPEEDS = (
    "For orientation, as published, of other programs and settings: 907 tokens/s a GPU (verl 0.3, PPO, "
    "Qwen2-7B, 8 H100), 1562 (NeMo-RL 0.4, GRPO, Llama-3.1-8B, 16 H100)."
)
QUALITY = "Quality is not predicted: `python -m rlhf recipe=decide budget=30m` measures it."
ACTIVITY_NAMES: dict[Activity, str] = {"read": "reading", "train": "training", "decode": "decoding"}
PROCESS_LABEL = "the process itself"
"""Label of the memory that a process holds before it loads a model."""
EXCLUDED_KEYS = ("plan", "run_name", "stage", "force", "why")
"""Config keys that the experiment file leaves out: those of this run and of the plan itself."""


def table(strategies: Sequence[Strategy], price: float | None) -> Cells:
    """One row per strategy."""
    headings = [
        "possible", "strategy", "zero", "peak memory", "time", "price", "artifact", "added latency",
        "why not",
    ]  # fmt: skip
    rows = []
    for strategy in strategies:
        phase, size = peak_memory(strategy.cost, strategy.on)
        cost = "-" if price is None else price_of(strategy, price)
        rows.append([
            "no" if strategy.objections else "yes", strategy.name, strategy.on.zero,
            f"{size / GIB:.1f} GiB ({phase.name})", time_of(strategy), cost,
            amount(strategy.artifact.value), duration(strategy.latency.value),
            "; ".join(each.removesuffix(".") for each in strategy.objections) or "-",
        ])  # fmt: skip
    return Cells(headings, rows)


def phases(strategy: Strategy) -> Cells:
    """Memory of each phase of a strategy, in GiB per rank; with GPUs the host's in columns of its own."""
    kinds = list(dict.fromkeys(part.kind for phase in strategy.cost.phases for part in phase.parts))
    on_cpu, used, rows = strategy.on.on_cpu, strategy.on.machine.used, []
    for phase in strategy.cost.phases:
        parts = [part for part in phase.parts if on_cpu or not part.on_host]
        sizes = [*(sum(part.size for part in parts if part.kind == kind) for kind in kinds), used]
        host = phase.size(on_host=True) + strategy.on.machine.host_used
        totals = [sum(sizes)] if on_cpu else [sum(sizes), host, host * strategy.on.machine.ranks_here]
        rows.append([phase.name, *(f"{size / GIB:.2f}" for size in [*sizes, *totals])])
    totals_of = ["together"] if on_cpu else ["on the GPU", "on the host", "on a node's host"]
    return Cells([strategy.name, *kinds, PROCESS_LABEL, *totals_of], rows)


def speeds(strategy: Strategy) -> Cells:
    """Expected speed of each stage as a range, also with larger batches, and a checkpoint's size and time."""
    on, rows = strategy.on, []
    for name, cost in strategy.costs.items():
        slowest = cost if on.on_cpu else cost.at_worst()
        rows.append([
            name, rates(cost, on), rates(strategy.larger_batch_costs.get(name), on),
            span(clock(cost.seconds), clock(slowest.seconds)), amount(cost.checkpoint),
            clock(cost.checkpoint_seconds(on.machine)),
        ])  # fmt: skip
    headings = [
        "stage", f"tokens/s a {unit(on)}", f"with batches {BATCH_FACTOR} times as large", "time",
        "checkpoint", "time to write",
    ]  # fmt: skip
    return Cells(headings, rows)


def rates(cost: StageCost | None, on: CostContext) -> str:
    """Tokens per second and rank, such as `420 to 1260`; `DOES_NOT_FIT` without a cost."""
    if cost is None:
        return DOES_NOT_FIT
    slowest = cost if on.on_cpu else cost.at_worst()
    return span(f"{slowest.throughput(on.ranks):.0f}", f"{cost.throughput(on.ranks):.0f}")


def hours_of(strategy: Strategy) -> str:
    """Hours, such as `3.2 to 9.5`; one number for a CPU."""
    return span(f"{strategy.hours:.3g}", f"{strategy.max_hours:.3g}")


def time_of(strategy: Strategy) -> str:
    """Time, such as `3.2 h to 9.5 h`; one value for a CPU."""
    return span(duration(3600 * strategy.hours), duration(3600 * strategy.max_hours))


def span(least: str, most: str) -> str:
    """The text `least to most`; one value if both are equal."""
    return least if least == most else f"{least} to {most}"


def unit(on: CostContext) -> str:
    """Name of what a rank runs on, for headings."""
    return "rank" if on.on_cpu else "GPU"


def assumptions(strategy: Strategy, lengths: str) -> Iterator[str]:
    """The assumptions behind the expected speed, one line each.

    Args:
        lengths: the line about the lengths of the data.
    """
    yield lengths
    if not strategy.costs:
        return
    machine, speed = strategy.on.machine, strategy.on.machine.speed
    worker = ThroughputModel(strategy.on)
    shares = ", ".join(f"{worker.efficiency(activity):g} {name}" for activity, name in ACTIVITY_NAMES.items())
    network = ""
    if machine.network < math.inf:
        network = (
            f"; {machine.link / 1e9:.0f} GB/s between the GPUs of a node and {machine.network / 1e9:.0f} "
            "between nodes, of which computing hides nothing"
        )
    yield (
        "Speed: tokens of prompts and answers, without loading. "
        f"Assumed: of {speed.gflops / 1000:.3g} TFLOP/s {shares}{network}; a disk of "
        f"{machine.disk / 1e9:.1f} GB/s a node. Batches are the smallest that the ranks can share; larger "
        "ones are faster, and learn in fewer steps."
    )
    if not strategy.on.on_cpu:
        yield (
            f"A GPU may take up to {MAX_GPU_SLOWDOWN:g} times as long: no run of ours on one has confirmed "
            "these figures. Answers of unequal length, the hand-over of weights, the host's work and "
            "checkpoints are counted."
        )
    if "ppo" in strategy.costs and not strategy.on.on_cpu:
        yield PUBLISHED_SPEEDS


def price_of(strategy: Strategy, price: float) -> str:
    """Price of all ranks for the strategy's time.

    Args:
        price: per rank and hour.
    """
    each = strategy.on.ranks * price
    return span(f"{strategy.hours * each:.2f}", f"{strategy.max_hours * each:.2f}")


def explanation(strategies: Sequence[Strategy], price: float | None) -> Iterator[str]:
    """The calculation of each figure, as Markdown."""
    for strategy in strategies:
        yield f"\n## {strategy.name}, zero={strategy.on.zero}\n"
        yield f"- keys: `{keys(strategy)}`"
        if strategy.source:
            yield f"- source: {strategy.source}"
        on_cpu, used = strategy.on.on_cpu, strategy.on.machine.used
        for phase in strategy.cost.phases:
            size = (phase.size(on_host=None if on_cpu else False) + used) / GIB
            host = phase.size(on_host=True) + strategy.on.machine.host_used
            places = "" if on_cpu else f" on the GPU, {host / GIB:.3f} GiB on the host"
            yield f"- {phase.name}: {size:.3f} GiB{places}"
            yield f"    - {PROCESS_LABEL}: {used / GIB:.3f} GiB"
            if strategy.on.machine.host_used:
                yield f"    - {PROCESS_LABEL}, on the host: {strategy.on.machine.host_used / GIB:.3f} GiB"
            for part in phase.parts:
                place = ", on the host" if part.on_host and not on_cpu else ""
                yield f"    - {part.kind}{place}: {part.formula} = {part.size / GIB:.3f} GiB"
        yield f"- time, at best: {clock(strategy.cost.seconds)}"
        for task in strategy.cost.work:
            yield f"    - {task.activity}: {task.formula} = {task.seconds:.3g} s"
        if price is not None:
            formula = f"{hours_of(strategy)} hours x {strategy.on.ranks} ranks x {price:g}"
            yield f"- price: {formula} = {price_of(strategy, price)}"
        for name, figure in (
            ("artifact, bytes", strategy.artifact),
            ("added latency, seconds", strategy.latency),
        ):
            yield f"- {name}: {figure.formula} = {figure.value:.3g}"


def hardware_line(on: CostContext) -> str:
    """The planned hardware and its precision, as one line."""
    machine, precision = on.machine, "fp32" if on.dtype_bytes == FP32 else "bf16"
    return (
        f"{machine.name}: {machine.ranks} rank{'s' * (machine.ranks > 1)} of "
        f"{machine.memory / GIB:.1f} GiB, {precision}, {machine.speed.gflops:.0f} GFLOP/s, "
        f"{machine.speed.gbytes:.0f} GB/s"
    )


def experiment_file(resolved: Mapping[str, Any], strategy: Strategy, reason: str) -> str:
    """A Hydra config that runs the plan: the keys that this run's config changed, and the plan's choices.

    `python -m rlhf --config-dir DIRECTORY +experiment=planned` runs it.
    """
    values = changed_values(resolved)
    values |= {group: dict(resolved[group]) for group in ("model", "tracker")}
    for key, value in strategy.overrides.items():
        parent = values
        *sections, last = key.split(".")
        for section in sections:
            parent = parent.setdefault(section, {})
        parent[last] = value
    lines = ["# @package _global_", *(f"# {line}" for line in reason.splitlines())]
    return "\n".join([*lines, yaml.safe_dump(values, sort_keys=False, allow_unicode=True)])


def changed_values(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a composed config that differ from the packaged files, by section.

    A value that an interpolation of the packaged file gives is no difference. A user's own stage has no
    packaged file, so its full section is returned.
    """
    packaged = resources.files("rlhf.conf")
    top = yaml.safe_load((packaged / "config.yaml").read_text(encoding="utf-8"))
    own = {key: resolved[key] for key in top if key in resolved}
    values = differences(own, top, resolved)
    for name, section in resolved.items():
        if isinstance(section, dict) and "_target_" in section and name not in EXCLUDED_KEYS:
            path = packaged / "stages" / f"{name}.yaml"
            raw = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
            if different := differences(section, raw, resolved):
                values[name] = different
    return {key: value for key, value in values.items() if key not in EXCLUDED_KEYS}


def differences(
    values: Mapping[str, Any], raw: Mapping[str, Any], whole: Mapping[str, Any]
) -> dict[str, Any]:
    """Keys of `values` whose value differs from the one in `raw`, or that `raw` lacks.

    Args:
        raw: a packaged section, in which `${a.b}` means the value of a.b in `whole`.
        whole: the full config.
    """
    changes: dict[str, Any] = {}
    for key, value in values.items():
        given = raw.get(key, MISSING)
        if isinstance(given, dict) and isinstance(value, dict):
            if different := differences(value, given, whole):
                changes[key] = different
        elif value != _interpolated(given, whole):
            changes[key] = value
    return changes


def _interpolated(given: Any, whole: Mapping[str, Any]) -> Any:
    if not (isinstance(given, str) and given.startswith("${")):
        return given
    value: Any = whole
    for name in given.removeprefix("${").removesuffix("}").split("."):
        value = value[name]
    return value


def proposal(strategy: Strategy, equal: Sequence[str]) -> str:
    """The fastest strategy, the command that measures quality, and the strategy's keys.

    Args:
        equal: names of all that are as fast, within the planner's error.
    """
    what = "training that fits" if strategy.costs else "way without training, as none is possible"
    others = ", ".join(name for name in equal if name != strategy.name)
    same = f" (as fast, within the planner's error: {others})" if others else ""
    return f"The fastest {what}: {strategy.name}{same}. {QUALITY}\n{keys(strategy)}"


def keys(strategy: Strategy) -> str:
    """The strategy's overrides, to paste after `python -m rlhf`."""
    return " ".join(f"{key}={cli_value(value)}" for key, value in strategy.overrides.items())


def cli_value(value: Any) -> str:
    """A value as written on the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(cli_value, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
