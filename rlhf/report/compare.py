"""The results of `compare` as one table and one picture."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rlhf.tracking.tables import Cells

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Quality = Literal["exact_match", "answer_found", "rouge_l", "score"]

QUALITIES: dict[Quality, str] = {
    "exact_match": "exact match",
    "answer_found": "reference found",
    "rouge_l": "ROUGE-L",
    "score": "reward's score",
}
PROMPT_METHODS = {"zero_shot": "zero-shot", "few_shot": "few-shot", "retrieval": "retrieval"}
ROWS: dict[str, tuple[str, str]] = {
    "answer_loss": ("loss, nats per token", "z.3f"),
    **{name: (words, "z.3f") for name, words in QUALITIES.items()},
    "win_rate": ("win rate", "z.2f"),
    "seconds_p50": ("latency p50, s", ".2f"),
    "seconds_p95": ("latency p95, s", ".2f"),
    "prompt_tokens": ("prompt tokens", ".0f"),
    "answer_tokens": ("answer tokens", ".0f"),
    "prompts_cut": ("prompts cut", ".0f"),
    "cost_per_thousand": ("cost of 1000", ".3g"),
    "setup_seconds": ("set-up, s", ".3g"),
    "setup_cost": ("cost of set-up", ".2g"),
    "storage_bytes": ("storage, MB", ".1f"),
    **{f"break_even_{method}": (f"pays off: {words}", ",.0f") for method, words in PROMPT_METHODS.items()},
}
"""Metrics that end in /CONTENDER: (words, format). docs/stages/compare.md explains each."""
INTERVALS = ("win_rate", *QUALITIES)
"""Metrics that may have NAME_low and NAME_high."""
MARKERS = "o^svDPX<>*"
PROMPTED_COLOUR, TUNED_COLOUR = "#d55e00", "#0072b2"
"""Colours that the colour-blind can distinguish (Okabe and Ito 2008)."""


def contenders(metrics: Mapping[str, float]) -> list[str]:
    """The contenders, in the order of the table."""
    return [name.partition("/")[2] for name in metrics if name.startswith("seconds_p50/")]


def cell_text(metric: str, value: float | None) -> str:
    """A cell of the table."""
    if value is None:
        return "-"
    if metric.startswith("break_even"):
        return requests_words(value)
    return format(value / 1e6 if metric == "storage_bytes" else value, ROWS[metric][1])


def requests_words(value: float) -> str:
    """The number of requests after which training has paid off."""
    return "never" if math.isinf(value) else f"{math.ceil(value):,}"


def comparison_cells(metrics: Mapping[str, float]) -> Cells:
    """One row per metric, one column per contender; no rows if nothing was compared."""
    names, rows = contenders(metrics), []
    for metric, (words, _) in ROWS.items():
        values = [metrics.get(f"{metric}/{name}") for name in names]
        if all(value is None for value in values):
            continue
        rows.append([words, *(cell_text(metric, value) for value in values)])
        lows, highs = ([metrics.get(f"{metric}_{end}/{name}") for name in names] for end in ("low", "high"))
        if metric in INTERVALS and any(low is not None for low in lows):
            intervals = (
                "-" if low is None or high is None else f"{low:z.2f}..{high:z.2f}"
                for low, high in zip(lows, highs, strict=True)
            )
            rows.append(["  95% interval", *intervals])
    headings = [words_of(name) for name in names]
    return Cells([f"{metrics.get('questions', 0):.0f} questions", *headings], rows)


def words_of(contender: str) -> str:
    """A contender's name in the table."""
    model, plus, method = contender.rpartition("+")
    return f"{model}{plus}{PROMPT_METHODS.get(method, method)}"


def write_csv(metrics: Mapping[str, float], path: Path) -> None:
    """One row per contender, one column per metric, unrounded."""
    names = contenders(metrics)
    columns = list(dict.fromkeys(name.partition("/")[0] for name in metrics if "/" in name))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["contender", *columns])
        for name in names:
            writer.writerow([name, *(metrics.get(f"{column}/{name}", "") for column in columns)])


def draw(metrics: Mapping[str, float], quality: Quality) -> Figure:
    """Quality with its interval against the cost of 1000 answers. Tuned models show when they pay off."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for number, name in enumerate(contenders(metrics)):
        x, y, low, high = (
            metrics[f"{key}/{name}"]
            for key in ("cost_per_thousand", quality, f"{quality}_low", f"{quality}_high")
        )
        axes.errorbar(
            x, y, yerr=[[max(0.0, y - low)], [max(0.0, high - y)]],  # may exclude the mean
            fmt=MARKERS[number % len(MARKERS)], capsize=3,
            color=PROMPTED_COLOUR if name in PROMPT_METHODS else TUNED_COLOUR,
            label="\n".join([words_of(name), *_pays_off(metrics, name)]),
        )  # fmt: skip
    axes.set(xlabel="cost of 1000 answers, one request at a time", ylabel=QUALITIES[quality])
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#808080", alpha=0.25, linewidth=0.6)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


def _pays_off(metrics: Mapping[str, float], name: str) -> list[str]:
    break_evens = {
        words: metrics[f"break_even_{method}/{name}"]
        for method, words in PROMPT_METHODS.items()
        if f"break_even_{method}/{name}" in metrics
    }
    return [
        f"  cheaper than {words}: {'never' if math.isinf(value) else f'after {requests_words(value)}'}"
        for words, value in break_evens.items()
    ]
