"""Findings of a run: metrics with intervals, of its stages and of its policies."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from rlhf.evaluation.sampled import Sampled
from rlhf.pipeline.auto import JUDGE
from rlhf.pipeline.metrics import purpose_metric
from rlhf.pipeline.recipe import BEST_OF_N, kind_of, last_evaluation
from rlhf.pipeline.run import Run
from rlhf.report.judges import KINDS, OWN_SCORE, VOTES, VOTES_WORDS, Judge, answers, judge_of, votes

Direction = Literal["better", "too small", "not better", "unknown"]

OWN_SCORE_WORDS = {OWN_SCORE: "reward's score"}
"""The metric of `evaluate` by the reward that policies learned from, with its words."""
GAIN_WORDS = OWN_SCORE_WORDS | {f"{kind}_gain": words for kind, words in KINDS.items()} | {VOTES: VOTES_WORDS}
"""All metrics of how much a policy gained, with their words."""
UNTRAINED_LOSS_SHARES = (0.9, 1.1)
"""A random model's loss lies between these shares of the loss of guessing among all tokens."""
MEAN_TOLERANCE = 1e-6
"""Largest difference of equal means, as a share of the deviation."""
MIN_DISTINCT_GOLD_SCORES = 10
"""Fewest distinct gold scores for which equal means are suspicious: two policies may well have the same share
of right answers."""


class Finding(NamedTuple):
    """A metric that tells whether a stage did what it is for, compared with no change, which is 0."""

    words: str
    sign: Literal[1, -1]
    """1 if more is better, -1 if less is."""
    sampled: Sampled
    metric: str
    is_judged: bool = False
    """Whether it is a score that no policy learned from."""
    smallest: float = 0.0
    """The smallest gain worth having, in the metric's unit."""
    beside: str = ""
    """Further text after the value, such as the gain over the base model."""

    @property
    def direction(self) -> Direction:
        """Where the whole interval lies, compared with no change and with the smallest gain."""
        _, low, high, _ = self.sampled
        worst, best = (low, high) if self.sign > 0 else (-high, -low)
        if best <= 0:
            return "not better"
        return "too small" if best < self.smallest else "better" if worst > 0 else "unknown"

    def __str__(self) -> str:
        value, low, high, _ = self.sampled
        return f"{self.words} {value:+.3g} ({low:+.3g} to {high:+.3g}){self.beside}"


def measured(run: Run) -> Iterator[tuple[str, Finding]]:
    """The findings of the stages themselves, in the chain's order."""
    for name, stage in run.chain.items():
        if (found := purpose_metric(stage)) is not None and name != JUDGE:
            metric, about = found
            sampled = Sampled.found(metric, run.metrics_of(name))
            if sampled is not None:
                yield name, Finding(about.purpose, 1 if about.better == "higher" else -1, sampled, metric)


def evaluated(run: Run, scores: Mapping[str, str] | None = None) -> Iterator[tuple[str, Finding]]:
    """The findings of the last `evaluate` on best of n and on the stages that make a policy, in the chain's
    order. No stage makes best of n, so none is to blame for it.

    Args:
        scores: metrics with their words, of which the first known one is used; by default the score that
            judges, or else the one that was learned from.
    """
    evaluation, metrics = last_evaluation(run.stages)
    judge = None if silent_gold(run) else judge_of(run)
    asks_people = scores is None and judge is None
    if scores is None:
        scores = OWN_SCORE_WORDS if judge is None else {judge.metric: judge.words}
    made = {name: stage for name, stage in run.chain.items() if stage.makes == "policy"}
    best_of = getattr(run.chain.get(evaluation), "best_of", "n")
    titles = {BEST_OF_N: f"the best of {best_of}"} | {
        name: f"the {stage.full_title} model" for name, stage in made.items()
    }
    for name, title in titles.items():
        for metric, words in scores.items():
            sampled = Sampled.found(f"{metric}/{name}", metrics)
            if sampled is not None:
                is_judged = judge is not None and metric == judge.metric
                yield name, Finding(
                    f"the {words} of {title} on new prompts", 1, sampled, metric, is_judged,
                    smallest_gain(run, metric), text_after_gain(run, name, judge) if is_judged else "",
                )  # fmt: skip
                break
    for voted in votes(run) if asks_people else ():
        prompts = "new prompts" if voted.is_new else "prompts that it learned from"
        smallest = getattr(run.chain.get(evaluation), "smallest_gain", 0.0)
        yield voted.policy, Finding(
            f"{VOTES_WORDS} on answers of {titles[voted.policy]} to {prompts}", 1, voted.sampled, VOTES,
            is_judged=True, smallest=smallest, beside=f" over {run.chain[voted.start].full_title}"
            if voted.start in run.chain else f" over {voted.start}",
        )  # fmt: skip


def smallest_gain(run: Run, metric: str) -> float:
    """The smallest gain worth having, in the score's unit: a share of the score's deviation over the answers
    of the start."""
    evaluation, metrics = last_evaluation(run.stages)
    judge = run.chain.get(evaluation)
    deviation = metrics.get(f"{metric.removesuffix('_gain')}_deviation/{getattr(judge, 'start', '')}", 0.0)
    return deviation * getattr(judge, "smallest_gain", 0.0)


def text_after_gain(run: Run, policy: str, judge: Judge | None) -> str:
    """Text after a policy's gain over its start: its gain over base, and how often the judge is right."""
    evaluation, metrics = last_evaluation(run.stages)
    start = str(getattr(run.chain.get(evaluation), "start", ""))
    kind = "" if judge is None else judge.metric.removesuffix("_gain")
    over = Sampled.found(f"{kind}_over_base/{policy}", metrics)
    title = run.chain[start].full_title if start in run.chain else start
    gains = "" if over is None or start == "base" else f" over {title}, {over.value:+.3g} over base"
    return gains + (f"; {judge.remark}" if judge is not None and judge.remark else "")


def silent_gold(run: Run) -> str:
    """A sentence if the gold score tells nothing: it is the same for every answer, and the reward's is not;
    or its mean is the same for policies with different answers. Else empty."""
    evaluation, metrics = last_evaluation(run.stages)
    names = [name for name in ("base", "init", *run.chain) if f"gold_deviation/{name}" in metrics]
    learned = [metrics[f"score_deviation/{name}"] for name in names if f"score_deviation/{name}" in metrics]
    if not names or (
        learned and not any(learned)
    ):  # such as when no answer is right: then neither score tells
        return ""
    means = [metrics[f"gold_mean/{name}"] for name in names]
    spread = max(metrics[f"gold_deviation/{name}"] for name in names)
    if len({*means}) == 1 and not spread:
        why = f"gives every answer the same score ({means[0]:.3g}), so it tells no policy from another."
    elif (
        len(names) > 1
        and max(means) - min(means) <= MEAN_TOLERANCE * spread
        and all_differ(answers(run), names)
    ):
        why = (
            f"gives all policies the same mean ({means[0]:.3g}), although their answers differ, so it tells "
            "no policy from another. Does it standardise each call's scores, or remember them by the prompt?"
        )
    else:
        return ""
    return f"{evaluation}.gold {why}"


def all_differ(given: Mapping[str, Sequence[Mapping[str, Any]]], names: Sequence[str]) -> bool:
    """Whether most answers of each policy differ from the first policy's, and there are enough distinct gold
    scores that two means are not equal by chance."""
    first, *others = ([row["response"] for row in given.get(name, ())] for name in names)
    golds = {row.get("gold") for rows in given.values() for row in rows}
    pairs = [sum(map(operator.ne, first, other)) for other in others]
    return len(golds) >= MIN_DISTINCT_GOLD_SCORES and all(2 * number > len(first) for number in pairs)


def is_untrained(run: Run) -> bool:
    """Whether the base model is not the embedded one and guesses the task's answers among all tokens, and the
    data are not at fault themselves. Where no answers are known, whether it is `model=tiny`, no stage trained
    it on texts, and no gate failed."""
    failed = [kind_of(gate.stage) for gate in run.gates if gate.outcome == "failed"]
    kinds = (change["value"] for change in run.changed if change["key"] == "model.kind")
    if (kind := next(kinds, "embedded")) == "embedded" or "prepare" in failed:
        return False
    _, metrics = last_evaluation(run.stages)
    before = metrics.get("task_loss/base", run.metrics_of("sft").get("held_out_loss_before"))
    tokens = run.metrics_of("prepare").get("vocabulary_size")
    if before is None:
        return kind == "tiny" and not failed and not any(kind_of(name) == "sft" for name in run.stages)
    if tokens is None:
        return False
    least, most = (share * math.log(tokens) for share in UNTRAINED_LOSS_SHARES)
    return least < before < most
