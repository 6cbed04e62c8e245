"""What a contender's answers are worth and what they cost, as metrics without its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

import torch

from rlhf.compare.answering import Answers
from rlhf.compare.cost import break_even, cost_of
from rlhf.compare.metrics import answer_found, exact_match, rouge_l
from rlhf.compare.prompts import PromptMethod, Question
from rlhf.evaluation.intervals import mean, share
from rlhf.evaluation.win_rate import both_scored, wins

WITH_REFERENCE = {"exact_match": exact_match, "answer_found": answer_found, "rouge_l": rouge_l}
"""What an answer is worth beside its reference."""


def put_beside_references(said: Answers, questions: Sequence[Question]) -> None:
    """Score every answer by what it has in common with the one that a person gave; nothing where the
    questions have no answers."""
    references = [question.reference for question in questions if question.reference is not None]
    if not references:
        return
    for quality, measure in WITH_REFERENCE.items():
        values = [measure(text, reference) for text, reference in zip(said.texts, references, strict=True)]
        said.scores[quality] = torch.tensor(values, dtype=torch.float64)


def described(said: Answers, price_per_hour: float) -> dict[str, float]:
    """How good the answers are, how long they and their prompts are, and what they take and cost."""
    mean_seconds = float(said.seconds_B.mean())
    metrics = said.figures | {
        "seconds_p50": float(said.seconds_B.quantile(0.5)),
        "seconds_p95": float(said.seconds_B.quantile(0.95)),
        "seconds_mean": mean_seconds,
        "prompt_tokens": sum(len(ids) for ids in said.rollout.prompt_ids) / len(said.texts),
        "answer_tokens": float(said.rollout.response_lengths.double().mean()),
        "prompts_cut": float(sum(count > 0 for count in said.num_cut)),
        "cost_per_thousand": 1000 * cost_of(mean_seconds, price_per_hour),
    }
    for quality, score_B in said.scores.items():  # all but a reward's score are between 0 and 1
        score_B = score_B[~score_B.isnan()]
        metrics |= (mean(score_B) if quality == "score" else share(score_B)).metrics(quality)
    return metrics


def win_rate(said: Answers, first: Answers) -> dict[str, float]:
    """How often the answers are better than the first contender's, by the reward; without one, by ROUGE-L."""
    judge = "score" if "score" in said.scores else "rouge_l"
    return share(wins(*both_scored(said.scores[judge], first.scores[judge]))).metrics("win_rate")


def break_evens(metrics: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """For every tuned contender, after how many requests it has cost as little as each way of prompting.

    Args:
        metrics: setup_seconds/NAME, where that is known, and seconds_mean/NAME of all contenders.
    """
    methods: tuple[str, ...] = get_args(PromptMethod)
    found = {}
    for tuned in (name for name in names if name not in methods and f"setup_seconds/{name}" in metrics):
        for method in (name for name in names if name in methods):
            found[f"break_even_{method}/{tuned}"] = break_even(
                metrics[f"setup_seconds/{tuned}"], metrics[f"seconds_mean/{tuned}"],
                metrics[f"setup_seconds/{method}"], metrics[f"seconds_mean/{method}"],
            )  # fmt: skip
    return found
