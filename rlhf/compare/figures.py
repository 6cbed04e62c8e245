"""What a comparison computes from the candidates' answers: gains over the best untrained option, and costs.
Metric names of one candidate do not contain the candidate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlhf.costs.price import break_even_interval
from rlhf.evaluation.answers import Answers
from rlhf.evaluation.intervals import mean
from rlhf.evaluation.sampled import Sampled


def request_metrics(answers: Answers) -> dict[str, float]:
    """Time and cost of single requests, and the length of their prompts."""
    metrics = {
        "prompt_tokens": sum(len(ids) for ids in answers.rollout.prompt_ids) / len(answers.texts),
        "prompts_cut": float(sum(count > 0 for count in answers.num_cut)),
    }
    if len(answers.seconds_B):
        metrics |= {
            "seconds_p50": float(answers.seconds_B.quantile(0.5)),
            "seconds_p95": float(answers.seconds_B.quantile(0.95)),
            **mean(answers.seconds_B).metrics("seconds_mean"),
        }
    if len(answers.cost_B):
        metrics["cost_per_thousand"] = 1000 * float(answers.cost_B.mean())
    return metrics


def best_untrained(answers: Mapping[str, Answers], untrained: Sequence[str], quality: str) -> str | None:
    """The untrained candidate with the highest mean quality; the first of equal ones. None if there is none.

    It is chosen on the questions that are compared, so a gain over it is too low rather than too high.
    """
    means = {name: float(answers[name].scores[quality].double().nanmean()) for name in untrained}
    return max(means, key=means.__getitem__, default=None)


def break_even_metrics(name: str, own: Answers, other: Answers) -> dict[str, float]:
    """Number of requests after which the own candidate is no dearer than the other, with the interval that
    follows from the cost of single requests, question by question. Empty if a cost is unknown.

    Args:
        name: the metric's name.
    """
    setup, other_setup = own.figures.get("setup_cost"), other.figures.get("setup_cost")
    rows = min(len(own.cost_B), len(other.cost_B))
    if setup is None or other_setup is None or not rows:
        return {}
    saving = mean(other.cost_B[:rows] - own.cost_B[:rows])
    return Sampled(*break_even_interval(setup, other_setup, saving[:3]), rows).metrics(name)
