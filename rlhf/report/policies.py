"""A picture of gain against cost, for runs that compare several policies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rlhf.disk import naming
from rlhf.evaluation.sampled import Sampled
from rlhf.pipeline.graph import inputs, with_ancestors
from rlhf.pipeline.recipe import BEST_OF_N, last_evaluation
from rlhf.pipeline.run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE = "policies.png"
GAINS = {
    "gold_gain": "gain in gold score",
    "judge_gain": "gain in the judge's score",
    "score_gain": "gain in the reward's score",
}
"""Metrics that may be drawn, with words for the axis; the first known one is drawn."""
MIN_COMPARED_POLICIES = 2
"""Fewest policies, besides base and the start, for which a picture is drawn: a table is enough for one."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#808080")
"""Colours that the colour-blind can distinguish (Okabe and Ito 2008), with grey for black on dark pages."""
MARKERS = "os^DvPX<>*"


class Cost(NamedTuple):
    """Time and memory that a policy took."""

    seconds: float
    """Of all stages that it is made from, summed."""
    gib: float | None
    """Peak memory of a rank in the policy's own stage, without the stages before it. None if not measured."""


class Point(NamedTuple):
    """A policy in the picture."""

    title: str
    gain: Sampled
    kl: float | None
    cost: Cost | None


def cost_of(run: Run, policy: str) -> Cost | None:
    """The cost of a policy. For best of n, that of its start and its reward: its own cost comes with each
    answer. None for the base model and a directory of the user's, whose cost is unknown."""
    if policy == BEST_OF_N:
        evaluation, _ = last_evaluation(run.stages)
        judge = run.chain[evaluation]
        rewards = [name for name in inputs(judge, run.chain) if run.chain[name].makes == "reward"]
        start = str(getattr(judge, "start", ""))
        made_from = [
            *dict.fromkeys(each for name in (start, *rewards) for each in with_ancestors(name, run.chain))
        ]
    elif policy in run.chain:
        made_from = [*with_ancestors(policy, run.chain)]
    else:
        return None
    costs = [run.stages[name]["cost"] for name in made_from if run.stages.get(name, {}).get("cost")]
    own = run.stages.get(policy, {}).get("cost")
    peak = own and own["peak_bytes"]
    return Cost(sum(each["seconds"] for each in costs), peak / 2**30 if peak else None)


def points(run: Run, titles: Mapping[str, str]) -> list[Point]:
    """The policies that stages make, and best of n, if their gain is known.

    Args:
        titles: policy -> its title in tables.
    """
    _, metrics = last_evaluation(run.stages)
    for metric in GAINS:
        gains = {name: Sampled.found(f"{metric}/{name}", metrics) for name in titles}
        if any(gains.values()):
            return [
                Point(titles[name], gain, metrics.get(f"kl/{name}"), cost_of(run, name))
                for name, gain in gains.items()
                if gain is not None and (name in run.chain or name == BEST_OF_N)
            ]
    return []


def write_picture(run: Run, titles: Mapping[str, str]) -> Iterator[str]:
    """Draw the picture into the run's directory, if there is something to compare. Yields Markdown for it."""
    _, metrics = last_evaluation(run.stages)
    words = next(
        (words for metric, words in GAINS.items() if any(each.startswith(metric) for each in metrics)), ""
    )
    yield from picture_of(points(run, titles), words, run.directory / PICTURE)


def picture_of(points: list[Point], words: str, path: Path) -> Iterator[str]:
    """Draw the points, if there are several. Yields Markdown for the picture.

    Args:
        words: label of the gain.
        path: file of the picture, in the directory of the Markdown file.
    """
    if len(points) < MIN_COMPARED_POLICIES:
        return
    if find_spec("matplotlib") is None:
        yield "A picture of this table needs matplotlib: `pip install -e '.[compare]'`."
        return
    with naming(path):
        draw(points, words).savefig(path, dpi=150)
    yield f"![Gain against KL, time and memory]({path.name})"


def draw(points: list[Point], words: str) -> Figure:
    """The gain with its 95% interval against the KL from the start, the time and the memory.

    Args:
        words: label of the gain.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    sides: dict[str, Callable[[Point], float | None]] = {
        "KL from the start, nats per sequence": lambda point: point.kl,
        "seconds, all stages": lambda point: point.cost and point.cost.seconds,
        "peak memory of its stage, GiB": lambda point: point.cost and point.cost.gib,
    }
    sides = {
        label: value for label, value in sides.items() if any(value(each) is not None for each in points)
    }
    for number, (label, value) in enumerate(sides.items()):
        first = figure.axes[0] if figure.axes else None
        axes = figure.add_subplot(1, len(sides), number + 1, sharey=first)
        for place, point in enumerate(points):
            x = value(point)
            if x is None:
                continue
            _, low, high, _ = point.gain
            y = point.gain.value
            axes.errorbar(
                x, y, yerr=[[max(0.0, y - low)], [max(0.0, high - y)]], capsize=3,
                fmt=MARKERS[place % len(MARKERS)], color=COLOURS[place % len(COLOURS)],
                label=point.title if number == 0 else None,
            )  # fmt: skip
        axes.axhline(0.0, color="#808080", linewidth=0.8)
        axes.set(xlabel=label)
        if number == 0:
            axes.set_ylabel(words)
        known = [0.0, *(x for x in map(value, points) if x is not None)]
        edge = 0.08 * (max(known) - min(known)) or 1.0  # so that no marker is cut
        axes.set_xlim(min(known) - edge, max(known) + edge)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#808080", alpha=0.25, linewidth=0.6)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure
