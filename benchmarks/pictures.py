"""The documentation's pictures, for the light and the dark theme, from the tables of the pages.

    python benchmarks/pictures.py     # writes docs/images/*-light.svg and *-dark.svg

Pictures of benchmarks are not included: `ppo_learning.py` and `ppo_scaling.py` draw theirs.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from look import THEMES, save

from rlhf.evaluation.references import Quality
from rlhf.evaluation.sampled import Sampled
from rlhf.report.compare import METHOD_WORDS, QUALITIES, ROWS, draw
from rlhf.report.pareto import Point
from rlhf.report.pareto import draw as draw_pareto
from rlhf.report.policies import GAINS, Cost
from rlhf.report.policies import Point as Policy
from rlhf.report.policies import draw as draw_policies

DOCS = Path(__file__).parent.parent / "docs"
BY_HAND = ("chain", "decide")
"""Pictures whose light theme is drawn by hand."""
DARK = {"#57606a": "#9198a1"}
"""Their colours: light theme -> dark theme."""
NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?(?!\w)")
TRIALS = {"full": "full", "LoRA": "lora", "full + replay": "replay", "half-way": "half-way"}


def table(page: str, first: str) -> list[list[str]]:
    """Cells of the page's table whose first heading is `first`, headings included."""
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [rows[0], *rows[2:]]


def comparison(first: str) -> dict[str, float]:
    """A table of `stage=compare` as metrics."""
    (_, *names), *rows = table("should-you-fine-tune.md", first)
    keys = {words: key for key, (words, _) in ROWS.items()}
    methods = {f", {words}": f"+{method}" for method, words in METHOD_WORDS.items()}
    for words, method in methods.items():
        names = [name.replace(words, method) for name in names]
    metrics: dict[str, float] = {}
    key = ""
    for words, *cells in rows:
        for name, cell in zip(names, cells, strict=True):
            if words == "95% interval" and cell != "-":
                low, high = cell.split("..")
                metrics |= {f"{key}_low/{name}": float(low), f"{key}_high/{name}": float(high)}
            elif words in keys and cell != "-":
                scale = 1e6 if keys[words].endswith("_bytes") else 1.0
                metrics[f"{keys[words]}/{name}"] = float(cell.replace(",", "")) * scale
        key = keys.get(words, key)
    return metrics


def forgetting() -> list[Point]:
    """Points of the sweep's trials."""
    (_, *names), *rows = table("forgetting.md", "against the base model")
    cells = {
        words.partition(",")[0]: [float(cell.strip("*")) for cell in found] for words, *found in rows[:2]
    }
    gains, losses = cells["task gain"], cells["retention loss"]
    return [Point(TRIALS[name], *figures) for name, *figures in zip(names, gains, losses, strict=True)]


def algorithms() -> list[Policy]:
    """The policies of the table over three seeds."""
    (_, *names), *rows = table("which-algorithm.md", "3 seeds")
    found = []
    for title, *cells in rows:
        by_name = {
            name: [float(part) for part in NUMBER.findall(cell.replace(",", ""))]
            for name, cell in zip(names, cells, strict=True)
        }
        if by_name["gold gain over SFT"] and title != "base":
            seconds, gib = by_name["seconds"][0], next(iter(by_name["peak GiB of its stage"]), None)
            mean, lowest, highest = by_name["gold gain over SFT"]
            gain = Sampled(mean, lowest, highest, rows=3)
            found.append(Policy(title, gain, by_name["KL"][0], Cost(seconds, gib)))
    return found


def main() -> None:
    """Draw all pictures."""
    images = DOCS / "images"
    found: dict[str, tuple[str, Quality]] = {
        "compare-station": ("43 questions", "answer_found"),
        "compare-dolly": ("40 questions", "rouge_l"),
    }
    for name, (first, quality) in found.items():
        metrics = comparison(first)
        assert f"{quality}_low/sft" in metrics, f"{name}: no interval of {QUALITIES[quality][1]}"
        save(partial(draw, metrics, quality), images / f"{name}.svg")
    axes = ("task gain, nats per token", "retention loss, nats per token")
    save(lambda: draw_pareto(forgetting(), *axes), images / "forgetting.svg")
    save(partial(draw_policies, algorithms(), GAINS["gold_gain"]), images / "algorithms.svg")
    for name in BY_HAND:
        drawing = (images / f"{name}-{next(iter(THEMES))}.svg").read_text(encoding="utf-8")
        for light, dark in DARK.items():
            drawing = drawing.replace(light, dark)
        (images / f"{name}-dark.svg").write_text(drawing, encoding="utf-8")


if __name__ == "__main__":
    main()
