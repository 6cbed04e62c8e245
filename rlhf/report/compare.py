"""The results of a comparison as one table and one picture."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.evaluation.references import Quality
from rlhf.tracking.tables import Cells

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUALITIES: Mapping[Quality, tuple[str, str]] = {
    "gold": ("gold_mean", "gold score"),
    "judge": ("judge_mean", "judge's score"),
    "score": ("score_mean", "reward's score"),
    "exact_match": ("exact_match", "exact match"),
    "answer_found": ("answer_found", "reference found"),
    "rouge_l": ("rouge_l", "ROUGE-L"),
}
"""Score that ranks candidates -> its metric, in words."""
METHOD_WORDS = {"few_shot": "few-shot", "retrieval": "retrieval", "best_of_n": "best of n"}
METHODS = {"zero_shot": "base", **{method: f"base, {words}" for method, words in METHOD_WORDS.items()}}
"""How the base model is asked, in words."""
ROWS: dict[str, tuple[str, str]] = {
    "answer_loss": ("loss, nats per token", "z.3f"),
    **{metric: (words, "z.3f") for metric, words in QUALITIES.values()},
    "win_rate": ("win rate", "z.2f"),
    "gain": ("gain over the best untrained", "+z.3f"),
    "retention_perplexity_ratio": ("perplexity against base", "z.3f"),
    "question_accuracy_change": ("change in question accuracy", "+z.3f"),
    "stop_rate": ("ends by itself", ".2f"),
    "seconds_p50": ("latency p50, s", ".2f"),
    "seconds_p95": ("latency p95, s", ".2f"),
    "prompt_tokens": ("prompt tokens", ".0f"),
    "length_mean": ("answer tokens", ".0f"),
    "prompts_cut": ("prompts cut", ".0f"),
    "memory_bytes": ("peak memory, MB", ".0f"),
    "storage_bytes": ("storage, MB", ".1f"),
    "cost_per_thousand": ("cost of 1000", ".3g"),
    "setup_seconds": ("set-up, s", ".3g"),
    "setup_cost": ("cost of set-up", ".2g"),
    "break_even": ("pays off: best untrained", ",.0f"),
    **{f"break_even_{method}": (f"pays off: {words}", ",.0f") for method, words in METHODS.items()},
}
"""Metrics that end in /CANDIDATE: (words, format). docs/stages/compare.md explains each."""
OF_REQUESTS = (
    "seconds_p50", "seconds_p95", "prompt_tokens", "memory_bytes", "storage_bytes",
)  # fmt: skip
"""Metrics that are shown only if requests were timed."""
REPEATED = re.compile(r"(pass|avg|maj)_at_(\d+)$")
"""Metrics of several answers per question."""
WITH_INTERVAL = (
    "win_rate", "gain", "retention_perplexity_ratio", "question_accuracy_change", "break_even",
    *(metric for metric, _ in QUALITIES.values()),
)  # fmt: skip
"""Metrics whose intervals the table shows."""
INTERVAL = "  95% interval"
"""The words of a row with the intervals of the row before."""
MARKERS = "o^svDPX<>*"
PROMPTED_COLOUR, TUNED_COLOUR = "#d55e00", "#0072b2"
"""Colours that the colour-blind can distinguish (Okabe and Ito 2008)."""


def candidates(metrics: Mapping[str, float]) -> list[str]:
    """The candidates, in the order of the table."""
    return [name.partition("/")[2] for name in metrics if name.startswith("length_mean/")]


def cell_text(metric: str, value: float | None) -> str:
    """A cell of the table."""
    if value is None:
        return "-"
    if metric.startswith("break_even"):
        return requests_words(value)
    return format(value / 1e6 if metric.endswith("_bytes") else value, row_of(metric)[1])


def row_of(metric: str) -> tuple[str, str]:
    """Words and format of a metric of one candidate."""
    repeated = REPEATED.match(metric)
    return ROWS[metric] if repeated is None else (f"{repeated[1]}@{repeated[2]}", "z.3f")


def requests_words(value: float) -> str:
    """The number of requests after which training has paid off."""
    return "never" if math.isinf(value) else f"{math.ceil(value):,}"


def comparison_cells(metrics: Mapping[str, float]) -> Cells:
    """One row per metric, one column per candidate; no rows if nothing was compared."""
    names = candidates(metrics)
    headings = [f"{metrics.get('prompts', 0):.0f} questions", *map(words_of, names)]
    return Cells(headings, [*comparison_rows(metrics, names)])


def comparison_rows(
    metrics: Mapping[str, float], names: Sequence[str], without: Collection[str] = ()
) -> Iterator[list[str]]:
    """The rows of the table, each with its words first. What single requests take is left out if they were
    not timed.

    Args:
        names: the candidates, in order.
        without: metrics that are left out.
    """
    several = dict.fromkeys(metric for name in metrics if REPEATED.match(metric := name.partition("/")[0]))
    is_timed = any(name.startswith("seconds_p50/") for name in metrics)
    for metric in [*several, *ROWS]:
        values = [metrics.get(f"{metric}/{name}") for name in names]
        is_left_out = metric in without or (metric in OF_REQUESTS and not is_timed)
        is_left_out |= metric == "prompts_cut" and not is_timed and not any(values)
        if is_left_out or all(value is None for value in values):
            continue
        yield [row_of(metric)[0], *(cell_text(metric, value) for value in values)]
        lows, highs = ([metrics.get(f"{metric}_{end}/{name}") for name in names] for end in ("low", "high"))
        if metric in (*several, *WITH_INTERVAL) and any(low is not None for low in lows):
            yield [INTERVAL, *(_interval(metric, *ends) for ends in zip(lows, highs, strict=True))]


def _interval(metric: str, low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return "-"
    if metric == "break_even":
        return f"{requests_words(low)}..{requests_words(high)}"
    return f"{low:z.2f}..{high:z.2f}"


def words_of(candidate: str) -> str:
    """A candidate's name in the table."""
    model, plus, method = candidate.rpartition("+")
    return f"{model}, {METHOD_WORDS[method]}" if plus and method in METHOD_WORDS else candidate


def write_csv(metrics: Mapping[str, float], path: Path) -> None:
    """One row per candidate, one column per metric, unrounded."""
    names = candidates(metrics)
    columns = list(dict.fromkeys(name.partition("/")[0] for name in metrics if "/" in name))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["candidate", *columns])
        for name in names:
            writer.writerow([name, *(metrics.get(f"{column}/{name}", "") for column in columns)])


def shown_quality(metrics: Mapping[str, float], quality: Quality) -> Quality | None:
    """The score that a picture shows; None if a candidate has no such score, or no cost.

    Args:
        quality: what ranks the candidates; `auto` takes the first score that all candidates have.
    """
    names = candidates(metrics)
    if not all(f"cost_per_thousand/{name}" in metrics for name in names):
        return None
    kinds = QUALITIES if quality == "auto" else (quality,)
    return next(
        (kind for kind in kinds if all(f"{QUALITIES[kind][0]}/{name}" in metrics for name in names)), None
    )


def draw(metrics: Mapping[str, float], quality: Quality) -> Figure:
    """Quality with its interval against the cost of 1000 answers. Trained models show when they pay off.

    Args:
        quality: as `shown_quality` returns it.
    """
    from matplotlib.figure import Figure

    names, (metric, words) = candidates(metrics), QUALITIES[quality]
    figure = Figure(figsize=(7.6, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for number, name in enumerate(names):
        x, y, low, high = (
            metrics[f"{key}/{name}"]
            for key in ("cost_per_thousand", metric, f"{metric}_low", f"{metric}_high")
        )
        axes.errorbar(
            x, y, yerr=[[max(0.0, y - low)], [max(0.0, high - y)]],  # may exclude the mean
            fmt=MARKERS[number % len(MARKERS)], capsize=3,
            color=PROMPTED_COLOUR if name.partition("+")[0] == "base" else TUNED_COLOUR,
            label="\n".join([words_of(name), *_pays_off(metrics, name)]),
        )  # fmt: skip
    axes.set(xlabel="cost of 1000 answers, one request at a time", ylabel=words)
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", nbins=6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#808080", alpha=0.25, linewidth=0.6)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


def _pays_off(metrics: Mapping[str, float], name: str) -> list[str]:
    break_evens = {
        words: metrics[f"break_even_{method}/{name}"]
        for method, words in METHODS.items()
        if f"break_even_{method}/{name}" in metrics
    }
    return [
        f"  cheaper than {words}: {'never' if math.isinf(value) else f'after {requests_words(value)}'}"
        for words, value in break_evens.items()
    ]
