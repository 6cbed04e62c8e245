"""How often is a decision to train wrong, and what does successive halving lose? A simulation.

    python benchmarks/decision_statistics.py             # 180,000 decisions; 2 minutes of one core
    python benchmarks/decision_statistics.py --quick     # seconds: few draws of few cells

Each draw is a whole decision by `rlhf/evaluation/selection.py`: questions, two untrained options, candidates
with learning curves, three rungs at a quarter, half and all of the steps, and the judgement. The rungs read
two thirds of the questions and the judgement the sealed third. "Same questions" is the same judgement on the
two thirds that chose; "winner alone" is the usual 95% interval there of the best one.

An answer is right or wrong: right if a normal variable is below the quantile of the model's quality, which is
so the true share of right answers. The variables of two models have a correlation, because questions are
hard or easy for all. Results are pooled over two correlations (0.3, 0.7) and two standard deviations of
quality over seeds (0, 2 points). The first table has the deviation 0 alone: no gain is exactly 0 there.
Untrained options are right in 45% and 55%. Kinds of candidates:

- none: all as good as the best untrained option.
- small, medium: one is 5 or 10 points better, the others are as in none.
- slow, slow marked: one ends 10 points better, but is behind until after half of the steps; the others end 3
  points better. Marked: `rung` is told.
- equal: two are 10 points better, of which one is cheaper.

"Grid" trains all candidates to the end and judges the best of them in the same way. "By quality" stops only
candidates that are clearly worse, whatever it costs. In brackets: the Monte Carlo error (one standard error).
The exit code is 1 if an error rate is above its nominal value, or a coverage below it, by more than three of
these.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import product

import torch
from torch import Tensor

from rlhf.evaluation.crossed import estimate
from rlhf.evaluation.selection import ERROR, SEALED, claims, questions_needed, rung

CANDIDATES, QUESTIONS = (2, 4, 8, 16), (60, 200, 600)
EFFECTS = ("none", "small", "medium", "slow", "slow marked", "equal")
CORRELATIONS, SPREADS = (0.3, 0.7), (0.0, 0.02)
BASE, FEW_SHOT = 0.45, 0.55
SMALLEST_GAIN = 0.03
NUM_FINALISTS = 2
RUNGS = (0.25, 0.5, 1.0)
"""Share of the steps at each rung. Each rung trains anew, because a schedule depends on the run's length."""
LASTING = 0.5
"""Part of the variance that is a candidate's own on a question and the same at all rungs."""
DRAWS, QUICK_DRAWS, CHUNK = 500, 20, 250
"""Per cell of effect, candidates, questions, correlation and spread."""
EXACT = 3
"""So many times the draws where no candidate is better and seeds do not differ: the rate of false claims."""
SEED_DRAWS, QUICK_SEED_DRAWS = 4000, 200
SEEDS, SEED_SPREADS, SEALED_QUESTIONS = (2, 3, 5), (0.0, 0.02, 0.05, 0.1), (20, 67, 200)
PLANNED_GAINS = (0.05, 0.1, 0.15)
MONTE_CARLO_ERRORS = 3.0
Totals = dict[str, float]


def qualities(effect: str, draws: int, candidates: int, spread: float) -> tuple[Tensor, Tensor]:
    """Quality at each rung, [draws, rungs, C], and the price of each candidate, [C]."""
    end_C = torch.full((candidates,), FEW_SHOT, dtype=torch.float64)
    price_C = torch.ones(candidates, dtype=torch.float64)
    power_C = torch.full_like(end_C, 0.3)
    if effect.startswith("slow"):
        end_C += 0.03
        power_C[0] = 1.5
    end_C[0] = FEW_SHOT + {"none": 0.0, "small": 0.05}.get(effect, 0.1)
    if effect == "equal":
        end_C[1], price_C[0] = end_C[0], 0.5
    end_NC = end_C + spread * torch.randn(draws, candidates, dtype=torch.float64)
    share_RC = torch.tensor(RUNGS, dtype=torch.float64)[:, None] ** power_C
    quality_NRC: Tensor = BASE + (end_NC[:, None] - BASE) * share_RC
    return quality_NRC, price_C


def answers(quality_NRC: Tensor, hard_NB: Tensor, correlation: float) -> Tensor:
    """1 for a right answer, else 0; [draws, rungs, C, B]."""
    draws, rungs, candidates = quality_NRC.shape
    own_N1CB = torch.randn(draws, 1, candidates, hard_NB.shape[-1])
    fresh_NRCB = torch.randn(draws, rungs, candidates, hard_NB.shape[-1])
    rest_NRCB = fresh_NRCB.mul_(math.sqrt((1 - correlation) * (1 - LASTING)))
    rest_NRCB.add_(own_N1CB, alpha=math.sqrt((1 - correlation) * LASTING))
    rest_NRCB.add_(hard_NB[:, None, None], alpha=math.sqrt(correlation))
    limit_NRC: Tensor = torch.special.ndtri(quality_NRC).float()
    return (rest_NRCB < limit_NRC[..., None]).float()


def halve(score_NRCB: Tensor, kept: Iterable[int], price_C: Tensor, slow_C: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the finalists, [draws, NUM_FINALISTS], and the steps in runs of full length, [draws]."""
    running_NC = torch.ones(score_NRCB.shape[0], score_NRCB.shape[2], dtype=torch.bool)
    cost_N = torch.zeros(len(running_NC), dtype=torch.float64)
    for number, max_kept in enumerate(kept):
        cost_N += running_NC.sum(-1) * RUNGS[number]
        last = number == len(RUNGS) - 1
        found = rung(
            score_NRCB[:, number], max_kept=max_kept, cost_C=price_C, running_C=running_NC, slow_C=slow_C,
            is_last=last, num_rungs=len(RUNGS),
        )  # fmt: skip
        running_NC = found.kept
    return running_NC, cost_N


def judged(
    score_NCB: Tensor, kept_NC: Tensor, untrained_NB: Tensor, price_C: Tensor, gain_NC: Tensor, best_N: Tensor
) -> dict[str, Tensor]:
    """What one judgement of each draw says and whether that is true; each [draws]."""
    index_NK = kept_NC.double().argsort(dim=-1, descending=True, stable=True)[:, :NUM_FINALISTS]
    gain_NK, plays_NK = gain_NC.gather(-1, index_NK), kept_NC.gather(-1, index_NK)
    score_NKB = score_NCB.take_along_dim(index_NK[..., None], 1)
    found = claims(
        score_NKB[:, :, None], untrained_NB[:, None], cost_K=price_C[index_NK], in_play_K=plays_NK,
        smallest_gain=SMALLEST_GAIN,
    )  # fmt: skip
    ship_N, leader_N1 = found.winner >= 0, found.leader[:, None]
    shipped_N = index_NK.gather(-1, found.winner.clamp(min=0)[:, None])[:, 0]
    shipped_gain_N = gain_NC.gather(-1, shipped_N[:, None])[:, 0]
    holds_NK = (found.low <= gain_NK) & (gain_NK <= found.high)
    none_N = ~ship_N & (found.at_most <= SMALLEST_GAIN)
    leader_gain_N = gain_NK.gather(-1, leader_N1)[:, 0]
    low_N, high_N = (found.gain.bound(ERROR / 2, side).gather(-1, leader_N1)[:, 0] for side in (-1, 1))
    return {
        "ship": ship_N,
        "false claim": ship_N & (shipped_gain_N <= 1e-9),
        "best": ship_N & (shipped_N == best_N),
        "covered": holds_NK.gather(-1, leader_N1)[:, 0],
        "all covered": (holds_NK | ~plays_NK).all(-1),
        "alone false claim": (low_N > 0) & (leader_gain_N <= 1e-9),
        "alone covered": (low_N <= leader_gain_N) & (leader_gain_N <= high_N),
        "no training": none_N,
        "false no": none_N & (gain_NK.masked_fill(~plays_NK, -1).amax(-1) > SMALLEST_GAIN + 1e-9),
        "leader's gain": leader_gain_N,
        "best in": kept_NC.gather(-1, best_N[:, None])[:, 0],
    }


def simulate(
    effect: str, candidates: int, questions: int, correlation: float, spread: float, draws: int
) -> Totals:
    """Sums over the draws of one cell."""
    sums: Totals = defaultdict(float)
    sealed = round(questions * SEALED)
    halves = [max(NUM_FINALISTS, candidates // 2), max(NUM_FINALISTS, candidates // 4), NUM_FINALISTS]
    slow_C = torch.arange(candidates) == (0 if effect == "slow marked" else -1)
    for start in range(0, draws, CHUNK):
        size = min(CHUNK, draws - start)
        hard_NB = torch.randn(size, questions)
        quality_NRC, price_C = qualities(effect, size, candidates, spread)
        score_NRCB = answers(quality_NRC, hard_NB, correlation)
        options_N1U = torch.tensor([BASE, FEW_SHOT], dtype=torch.float64).expand(size, 1, 2)
        option_NUB = answers(options_N1U, hard_NB, correlation)[:, 0]
        chosen_N = option_NUB[..., sealed:].mean(-1).argmax(-1)
        untrained_NB = option_NUB[torch.arange(size), chosen_N]
        end_NC = quality_NRC[:, -1]
        gain_NC = end_NC - options_N1U[:, 0].gather(-1, chosen_N[:, None])
        best_N = torch.zeros_like(chosen_N) if effect == "equal" else end_NC.argmax(-1)
        choosing_NRCB, final_NCB = score_NRCB[..., sealed:], score_NRCB[:, -1]
        by_halves_NC, cost_N = halve(choosing_NRCB, halves, price_C, slow_C)
        by_quality_NC, quality_cost_N = halve(
            choosing_NRCB, [candidates, candidates, NUM_FINALISTS], price_C, slow_C
        )
        grid = rung(choosing_NRCB[:, -1], max_kept=NUM_FINALISTS, cost_C=price_C, is_last=True)
        found = {
            name: judged(final_NCB[..., part], kept_NC, untrained_NB[:, part], price_C, gain_NC, best_N)
            for name, kept_NC, part in (
                ("sealed", by_halves_NC, slice(0, sealed)),
                ("same", by_halves_NC, slice(sealed, None)),
                ("by quality", by_quality_NC, slice(0, sealed)),
                ("grid", grid.kept, slice(0, sealed)),
            )
        }
        values = {f"{way} {name}": value_N for way, each in found.items() for name, value_N in each.items()}
        for way, spent_N in (("sealed", cost_N), ("by quality", quality_cost_N)):
            values[f"{way} cost"] = spent_N / candidates
            values[f"{way} loss"] = values["grid leader's gain"] - values[f"{way} leader's gain"]
        for name, value_N in values.items():
            sums[name] += float(value_N.sum())
            sums[f"{name} squared"] += float(value_N.double().square().sum())
    sums["draws"] = draws
    return sums


def judge_seeds(seeds: int, questions: int, spread: float, draws: int) -> Totals:
    """Sums over the draws of a method without a gain that is judged over seeds.

    "Fixed" is the interval of each question's mean over seeds, which takes the seeds as fixed."""
    sums: Totals = defaultdict(float)
    for correlation in CORRELATIONS:
        hard_NB = torch.randn(draws, questions)
        quality_N1S = FEW_SHOT + spread * torch.randn(draws, 1, seeds, dtype=torch.float64)
        score_NSB = answers(quality_N1S, hard_NB, correlation)[:, 0]
        untrained_N1B = answers(torch.full((draws, 1, 1), FEW_SHOT), hard_NB, correlation)[:, 0]
        method = claims(score_NSB[:, None], untrained_N1B, cost_K=torch.ones(1))
        fixed = estimate((score_NSB - untrained_N1B).mean(-2, keepdim=True), 1.0)
        fixed_low_N, fixed_high_N = (fixed.bound(ERROR / 2, side) for side in (-1, 1))
        values = {
            "false claim": method.claimed[:, 0],
            "covered": ((method.low <= 0) & (method.high >= 0))[:, 0] & ~method.claimed[:, 0],
            "fixed false claim": fixed_low_N > 0,
            "fixed covered": (fixed_low_N <= 0) & (fixed_high_N >= 0),
            "width": (method.high - method.low)[:, 0],
        }
        for name, value_N in values.items():
            sums[name] += float(value_N.sum())
        sums["draws"] += draws
    return sums


def power(gain: float, num_finalists: int, draws: int) -> tuple[int, float]:
    """(sealed questions that are advised to show this gain, share of draws in which they show it). The advice
    reads the spread of 67 questions."""

    def pair(questions: int) -> Tensor:
        quality = torch.tensor([[[FEW_SHOT, FEW_SHOT + gain]]], dtype=torch.float64).expand(draws, 1, 2)
        score_N2B = answers(quality, torch.randn(draws, questions), CORRELATIONS[0])[:, 0]
        return score_N2B[:, 1:] - score_N2B[:, :1]

    tail = ERROR / 2 / num_finalists
    variance = float(estimate(pair(67), 1.0).question_variance.mean())
    needed = questions_needed(variance, 0.0, gap=gain, tail=tail)
    assert needed is not None
    return needed, float((estimate(pair(needed), 1.0).p_above(0.0) <= tail).double().mean())


def pooled(cells: Iterable[Totals]) -> Totals:
    """The sum of cells."""
    total: Totals = defaultdict(float)
    for cell in cells:
        for name, value in cell.items():
            total[name] += value
    return total


def share(total: Totals, name: str) -> str:
    """A share of the draws in percent, with its Monte Carlo error."""
    mean = total[name] / total["draws"]
    return f"{100 * mean:.1f} ({100 * math.sqrt(mean * (1 - mean) / total['draws']):.1f})"


def points(total: Totals, name: str) -> str:
    """A mean over the draws in points of quality, with its Monte Carlo error."""
    mean, draws = total[name] / total["draws"], total["draws"]
    error = math.sqrt(max(0.0, total[f"{name} squared"] / draws - mean**2) / draws)
    return f"{100 * mean:.2f} ({100 * error:.2f})"


def table(title: str, head: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a Markdown table."""
    names = [*head]
    print(f"\n**{title}**\n\n| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def beyond(name: str, count: float, draws: float, nominal: float, is_error: bool) -> list[str]:
    """A line if an error rate is above, or a coverage below, its nominal value beyond Monte Carlo error."""
    excess = (count / draws - nominal) * (1 if is_error else -1)
    if excess <= MONTE_CARLO_ERRORS * math.sqrt(nominal * (1 - nominal) / draws):
        return []
    return [f"{name}: {100 * count / draws:.1f}% of {draws:.0f} draws, nominal {100 * nominal:.1f}%"]


def print_decisions(
    cells: Mapping[tuple[str, int, int], Totals], exact: Mapping[tuple[int, int], Totals]
) -> list[str]:
    """Print the tables of whole decisions; the figures beyond their nominal values.

    Args:
        exact: candidates, questions -> totals where no candidate is better, and seeds do not differ.
    """
    all_candidates = sorted({candidates for _, candidates, _ in cells})
    all_questions = sorted({questions for _, _, questions in cells})
    table(
        "No candidate is better (%; nominal: at most 2.5 false, at least 95 held)",
        ("candidates", "questions", "false claims", "same questions", "same, winner alone",
         "interval holds", "all intervals hold", "same, winner alone"),
        (
            (candidates, questions, *(
                share(exact[candidates, questions], name)
                for name in ("sealed false claim", "same false claim", "same alone false claim",
                             "sealed covered", "sealed all covered", "same alone covered")
            ))
            for candidates, questions in product(all_candidates, all_questions)
        ),
    )  # fmt: skip
    by_questions = {
        (effect, questions): pooled(cells[effect, candidates, questions] for candidates in all_candidates)
        for effect, questions in product(EFFECTS, all_questions)
    }
    table(
        "Outcomes, pooled over the numbers of candidates (%; smallest gain 3 points)",
        ("candidates are", "questions", "shipped", "false claims", "best is shipped", "grid: best is shipped",
         "no training", "falsely no training", "interval holds", "all intervals hold"),
        (
            (effect, questions, *(
                share(total, name)
                for name in ("sealed ship", "sealed false claim", "sealed best", "grid best",
                             "sealed no training", "sealed false no", "sealed covered", "sealed all covered")
            ))
            for (effect, questions), total in by_questions.items()
        ),
    )  # fmt: skip
    table(
        "What halving loses, pooled over the numbers of questions (points of quality; cost in full grids)",
        ("candidates are", "candidates", "loss", "best is finalist, %", "grid: best is finalist, %", "cost",
         "by quality: loss", "by quality: cost"),
        (
            (effect, candidates, points(total, "sealed loss"), share(total, "sealed best in"),
             share(total, "grid best in"), f"{total['sealed cost'] / total['draws']:.2f}",
             points(total, "by quality loss"), f"{total['by quality cost'] / total['draws']:.2f}")
            for effect, candidates in product(EFFECTS, all_candidates)
            for total in [pooled(cells[effect, candidates, questions] for questions in all_questions)]
        ),
    )  # fmt: skip
    wrong = []
    named = [(", ".join(map(str, key)), total) for key, total in cells.items()]
    named += [(", ".join(map(str, ("exactly none", *key))), total) for key, total in exact.items()]
    for name, total in named:
        draws = total["draws"]
        wrong += beyond(f"{name}: false claims", total["sealed false claim"], draws, ERROR / 2, True)
        wrong += beyond(f"{name}: false no", total["sealed false no"], draws, ERROR / 2, True)
        wrong += beyond(f"{name}: intervals", total["sealed all covered"], draws, 1 - ERROR, False)
    return wrong


def print_seeds(draws: int) -> list[str]:
    """Print the table of methods over seeds; the figures beyond their nominal values."""
    cells = {key: judge_seeds(*key, draws) for key in product(SEEDS, SEALED_QUESTIONS, SEED_SPREADS)}
    table(
        "A method without a gain over seeds (%; nominal: 2.5 false, 95 held; fixed: seeds taken as fixed)",
        ("seeds", "sealed questions", "deviation over seeds, points", "false claims", "interval holds",
         "mean width, points", "fixed: false claims", "fixed: interval holds"),
        (
            (seeds, questions, f"{100 * spread:.0f}", share(total, "false claim"), share(total, "covered"),
             f"{100 * total['width'] / total['draws']:.0f}", share(total, "fixed false claim"),
             share(total, "fixed covered"))
            for (seeds, questions, spread), total in cells.items()
        ),
    )  # fmt: skip
    wrong = []
    for key, total in cells.items():
        name = "seeds, questions, spread " + ", ".join(map(str, key))
        wrong += beyond(f"{name}: false claims", total["false claim"], total["draws"], ERROR / 2, True)
        wrong += beyond(f"{name}: intervals", total["covered"], total["draws"], 1 - ERROR, False)
    return wrong


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few draws: does it run?")
    options = parser.parse_args()
    begun = time.monotonic()
    torch.manual_seed(0)
    quick = options.quick
    sizes = ((2, 8), (60, 200)) if quick else (CANDIDATES, QUESTIONS)
    worlds = [*product(CORRELATIONS, SPREADS)][-1 if quick else 0 :]
    draws = QUICK_DRAWS if quick else DRAWS
    cells = {
        (effect, candidates, questions): pooled(
            simulate(effect, candidates, questions, correlation, spread, draws)
            for correlation, spread in worlds
        )
        for effect, candidates, questions in product(EFFECTS, sizes[0], sizes[1])
    }
    exact = {
        (candidates, questions): pooled(
            simulate("none", candidates, questions, correlation, 0.0, EXACT * draws)
            for correlation in CORRELATIONS
        )
        for candidates, questions in product(*sizes)
    }
    wrong = print_decisions(cells, exact)
    draws = QUICK_SEED_DRAWS if quick else SEED_DRAWS
    wrong += print_seeds(draws)
    table(
        "Are the advised questions enough? (nominal: 80%)",
        ("true gain, points", "finalists", "sealed questions advised", "gain is shown, %"),
        (
            (f"{100 * gain:.0f}", finalists, needed, f"{100 * shown:.1f}")
            for gain, finalists in product(PLANNED_GAINS, (1, NUM_FINALISTS))
            for needed, shown in [power(gain, finalists, draws)]
        ),
    )
    print(f"\n{time.monotonic() - begun:.0f} s. Beyond nominal: {'; '.join(wrong) or 'nothing'}.")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
