"""Quality and cost of a contender's answers. Metric names here do not contain the contender."""

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

REFERENCE_METRICS = {"exact_match": exact_match, "answer_found": answer_found, "rouge_l": rouge_l}
"""Metric name -> quality of an answer compared with its reference."""


def score_by_reference(answers: Answers, questions: Sequence[Question]) -> None:
    """Add scores of every answer compared with its reference. Does nothing if the questions have no
    references."""
    references = [question.reference for question in questions if question.reference is not None]
    if not references:
        return
    for quality, measure in REFERENCE_METRICS.items():
        values = [measure(text, reference) for text, reference in zip(answers.texts, references, strict=True)]
        answers.scores[quality] = torch.tensor(values, dtype=torch.float64)


def contender_metrics(answers: Answers, price_per_hour: float) -> dict[str, float]:
    """Quality, length, time and cost of the answers, and length of their prompts."""
    mean_seconds = float(answers.seconds_B.mean())
    metrics = answers.figures | {
        "seconds_p50": float(answers.seconds_B.quantile(0.5)),
        "seconds_p95": float(answers.seconds_B.quantile(0.95)),
        "seconds_mean": mean_seconds,
        "prompt_tokens": sum(len(ids) for ids in answers.rollout.prompt_ids) / len(answers.texts),
        "answer_tokens": float(answers.rollout.response_lengths.double().mean()),
        "prompts_cut": float(sum(count > 0 for count in answers.num_cut)),
        "cost_per_thousand": 1000 * cost_of(mean_seconds, price_per_hour),
    }
    for quality, score_B in answers.scores.items():  # only a reward's score may leave [0, 1]
        score_B = score_B[~score_B.isnan()]
        metrics |= (mean(score_B) if quality == "score" else share(score_B)).metrics(quality)
    return metrics


def win_rate(answers: Answers, first: Answers) -> dict[str, float]:
    """Share of answers that are better than the first contender's: by the reward, else by ROUGE-L."""
    judge = "score" if "score" in answers.scores else "rouge_l"
    return share(wins(*both_scored(answers.scores[judge], first.scores[judge]))).metrics("win_rate")


def break_evens(metrics: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """For every tuned contender: number of requests after which it is no dearer than each prompt method.

    Args:
        metrics: setup_seconds/NAME, where known, and seconds_mean/NAME of all contenders.
    """
    methods: tuple[str, ...] = get_args(PromptMethod)
    counts = {}
    for tuned in (name for name in names if name not in methods and f"setup_seconds/{name}" in metrics):
        for method in (name for name in names if name in methods):
            counts[f"break_even_{method}/{tuned}"] = break_even(
                metrics[f"setup_seconds/{tuned}"], metrics[f"seconds_mean/{tuned}"],
                metrics[f"setup_seconds/{method}"], metrics[f"seconds_mean/{method}"],
            )  # fmt: skip
    return counts
