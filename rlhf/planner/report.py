"""A plan as text: the table, the arithmetic, and the experiment that does it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

import yaml

from rlhf.costs.hardware import GIB
from rlhf.costs.memory import amount
from rlhf.costs.setup import CostContext
from rlhf.costs.stage_cost import SLOW, Activity, StageCost, ThroughputModel
from rlhf.pipeline.preflight import peak_memory
from rlhf.printable import duration
from rlhf.tracking.progress import clock
from rlhf.tracking.tables import Cells

if TYPE_CHECKING:
    from rlhf.planner.strategies import Strategy

MISSING = object()
DOES_NOT_FIT = "does not fit"
LARGER = 4
"""How many times as many rows a batch has, to see what that would be worth."""
ORIENTATION = (
    "For orientation, as published, of other programs and settings: 907 tokens/s a GPU (verl 0.3, PPO, "
    "Qwen2-7B, 8 H100), 1562 (NeMo-RL 0.4, GRPO, Llama-3.1-8B, 16 H100)."
)
DOING: dict[Activity, str] = {"read": "reading", "train": "training", "decode": "decoding"}
PROCESS = "the process itself"
"""What it holds before it loads a model."""
NOT_PART = ("plan", "run_name", "stage", "force", "why")
"""Of an experiment: what was planned with, and what is run of it now."""


def table(strategies: Sequence[Strategy], price: float | None) -> Cells:
    """One row a strategy, the best one first."""
    headings = [
        "", "strategy", "zero", "peak memory", "time", "price", "artifact", "added latency", "because",
    ]  # fmt: skip
    rows = []
    for place, strategy in enumerate(strategies, 1):
        phase, size = peak_memory(strategy.cost, strategy.on)
        cost = "-" if price is None else price_of(strategy, price)
        rows.append([
            "no" if strategy.against else str(place), strategy.name, strategy.on.zero,
            f"{size / GIB:.1f} GiB ({phase.name})", time_of(strategy), cost,
            amount(strategy.artifact.value), duration(strategy.latency.value),
            "; ".join(each.removesuffix(".") for each in strategy.against) or strategy.reason,
        ])  # fmt: skip
    return Cells(headings, rows)


def phases(strategy: Strategy) -> Cells:
    """What is in memory in each phase of one strategy, in GiB of a rank; the host's apart from a GPU's."""
    kinds = list(dict.fromkeys(part.kind for phase in strategy.cost.phases for part in phase.parts))
    on_cpu, used, rows = strategy.on.on_cpu, strategy.on.machine.used, []
    for phase in strategy.cost.phases:
        parts = [part for part in phase.parts if on_cpu or not part.on_host]
        sizes = [*(sum(part.size for part in parts if part.kind == kind) for kind in kinds), used]
        host = phase.size(on_host=True) + strategy.on.machine.host_used
        totals = [sum(sizes)] if on_cpu else [sum(sizes), host, host * strategy.on.machine.ranks_here]
        rows.append([phase.name, *(f"{size / GIB:.2f}" for size in [*sizes, *totals])])
    totals_of = ["together"] if on_cpu else ["on the GPU", "on the host", "on a node's host"]
    return Cells([strategy.name, *kinds, PROCESS, *totals_of], rows)


def speeds(strategy: Strategy) -> Cells:
    """How fast each stage is expected to be, from and to, with larger batches too; and what a checkpoint
    takes."""
    on, rows = strategy.on, []
    for name, cost in strategy.costs.items():
        slowest = cost if on.on_cpu else cost.at_most()
        rows.append([
            name, rates(cost, on), rates(strategy.larger.get(name), on),
            span(clock(cost.seconds), clock(slowest.seconds)), amount(cost.checkpoint),
            clock(cost.checkpoint_seconds(on.machine)),
        ])  # fmt: skip
    headings = [
        "stage", f"tokens/s a {unit(on)}", f"with batches {LARGER} times as large", "time", "checkpoint",
        "time to write",
    ]  # fmt: skip
    return Cells(headings, rows)


def rates(cost: StageCost | None, on: CostContext) -> str:
    """`420 to 1260`; that it does not fit where there is none."""
    if cost is None:
        return DOES_NOT_FIT
    slowest = cost if on.on_cpu else cost.at_most()
    return span(f"{slowest.throughput(on.ranks):.0f}", f"{cost.throughput(on.ranks):.0f}")


def hours_of(strategy: Strategy) -> str:
    """`3.2 to 9.5`; one number of a CPU."""
    return span(f"{strategy.hours:.3g}", f"{strategy.most_hours:.3g}")


def time_of(strategy: Strategy) -> str:
    """`3.2 h to 9.5 h`; one time of a CPU."""
    return span(duration(3600 * strategy.hours), duration(3600 * strategy.most_hours))


def span(least: str, most: str) -> str:
    """Both, where they differ."""
    return least if least == most else f"{least} to {most}"


def unit(on: CostContext) -> str:
    """What a rank runs on."""
    return "rank" if on.on_cpu else "GPU"


def assumptions(strategy: Strategy, lengths: str) -> Iterator[str]:
    """What the expected speed rests on, a line each.

    Args:
        lengths: what is known of the data.
    """
    yield lengths
    if not strategy.costs:
        return
    machine, speed = strategy.on.machine, strategy.on.machine.speed
    worker = ThroughputModel(strategy.on)
    shares = ", ".join(f"{worker.efficiency(activity):g} {doing}" for activity, doing in DOING.items())
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
            f"A GPU may take up to {SLOW:g} times as long: no run of ours on one has confirmed these "
            "figures. Answers of unequal length, the hand-over of weights, the host's work and checkpoints "
            "are counted."
        )
    if "ppo" in strategy.costs and not strategy.on.on_cpu:
        yield ORIENTATION


def price_of(strategy: Strategy, price: float) -> str:
    """Of all ranks, for as long as it takes."""
    each = strategy.on.ranks * price
    return span(f"{strategy.hours * each:.2f}", f"{strategy.most_hours * each:.2f}")


def explanation(strategies: Sequence[Strategy], price: float | None) -> Iterator[str]:
    """Each figure's arithmetic, as Markdown."""
    for strategy in strategies:
        yield f"\n## {strategy.name}, zero={strategy.on.zero}\n"
        yield f"- keys: `{keys(strategy)}`"
        if strategy.source:
            yield f"- source: {strategy.source}"
        on_cpu, used = strategy.on.on_cpu, strategy.on.machine.used
        for phase in strategy.cost.phases:
            size = (phase.size(on_host=None if on_cpu else False) + used) / GIB
            host = phase.size(on_host=True) + strategy.on.machine.host_used
            beside = "" if on_cpu else f" on the GPU, {host / GIB:.3f} GiB on the host"
            yield f"- {phase.name}: {size:.3f} GiB{beside}"
            yield f"    - {PROCESS}: {used / GIB:.3f} GiB"
            if strategy.on.machine.host_used:
                yield f"    - {PROCESS}, on the host: {strategy.on.machine.host_used / GIB:.3f} GiB"
            for part in phase.parts:
                place = ", on the host" if part.on_host and not on_cpu else ""
                yield f"    - {part.kind}{place}: {part.how} = {part.size / GIB:.3f} GiB"
        yield f"- time, at best: {clock(strategy.cost.seconds)}"
        for task in strategy.cost.work:
            yield f"    - {task.activity}: {task.how} = {task.seconds:.3g} s"
        if price is not None:
            how = f"{hours_of(strategy)} hours x {strategy.on.ranks} ranks x {price:g}"
            yield f"- price: {how} = {price_of(strategy, price)}"
        for name, figure in (
            ("artifact, bytes", strategy.artifact),
            ("added latency, seconds", strategy.latency),
        ):
            yield f"- {name}: {figure.how} = {figure.value:.3g}"


def hardware_line(on: CostContext) -> str:
    """What was planned for."""
    machine = on.machine
    return (
        f"{machine.name}: {machine.ranks} ranks of {machine.memory / GIB:.1f} GiB, "
        f"{machine.speed.gflops:.0f} GFLOP/s, {machine.speed.gbytes:.0f} GB/s"
    )


def experiment_file(resolved: Mapping[str, Any], strategy: Strategy, reason: str) -> str:
    """A Hydra config that does what was planned: what this run's config changed, and the plan's choices.

    `python -m rlhf --config-dir DIRECTORY +experiment=planned` runs it.
    """
    values = changed(resolved)
    values |= {group: dict(resolved[group]) for group in ("model", "tracker")}
    for key, value in strategy.overrides.items():
        place = values
        *sections, last = key.split(".")
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    lines = ["# @package _global_", *(f"# {line}" for line in reason.splitlines())]
    return "\n".join([*lines, yaml.safe_dump(values, sort_keys=False, allow_unicode=True)])


def changed(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """What a composed config has otherwise than the packaged files, without what is only repeated there; the
    whole section of a stage of the user's own."""
    packaged = resources.files("rlhf.conf")
    top = yaml.safe_load((packaged / "config.yaml").read_text(encoding="utf-8"))
    own = {key: resolved[key] for key in top if key in resolved}
    found = differences(own, top, resolved)
    for name, section in resolved.items():
        if isinstance(section, dict) and "_target_" in section and name not in NOT_PART:
            path = packaged / "stages" / f"{name}.yaml"
            raw = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
            if different := differences(section, raw, resolved):
                found[name] = different
    return {key: value for key, value in found.items() if key not in NOT_PART}


def differences(
    values: Mapping[str, Any], raw: Mapping[str, Any], whole: Mapping[str, Any]
) -> dict[str, Any]:
    """Keys whose value is not the raw one, or that it does not have; `${a.b}` there stands for the whole
    config's own a.b."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        given = raw.get(key, MISSING)
        if isinstance(given, dict) and isinstance(value, dict):
            if different := differences(value, given, whole):
                found[key] = different
        elif value != _looked_up(given, whole):
            found[key] = value
    return found


def _looked_up(given: Any, whole: Mapping[str, Any]) -> Any:
    if not (isinstance(given, str) and given.startswith("${")):
        return given
    found: Any = whole
    for name in given.removeprefix("${").removesuffix("}").split("."):
        found = found[name]
    return found


def recommendation(best: Strategy) -> str:
    """The choice with its reason, in a sentence or two."""
    return f"Recommended: {best.name}: {best.reason}.\n{keys(best)}"


def keys(strategy: Strategy) -> str:
    """The keys of its experiment, to paste behind `python -m rlhf`."""
    return " ".join(f"{key}={typed(value)}" for key, value in strategy.overrides.items())


def typed(value: Any) -> str:
    """A value as one types it on the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(typed, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
