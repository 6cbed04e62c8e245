"""A policy's answers, and their metrics: alone, and compared with another policy's answers.

Dimensions: B rows, R response tokens (padded). Metric names here do not contain the policy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhf.data.schema import Message
from rlhf.evaluation.intervals import correlation, difference, mean, ratio, share
from rlhf.evaluation.references import QUALITIES, SHARES
from rlhf.evaluation.retention import Retained, forgetting
from rlhf.evaluation.sampled import Sampled
from rlhf.evaluation.win_rate import both_scored, wins
from rlhf.evaluation.wording import gained_word
from rlhf.generation.policy_model import PolicyModel
from rlhf.rewards.combined import moments_of
from rlhf.rl.advantage import kl_k1
from rlhf.rl.rollout import Rollout
from rlhf.rl.statistics import distinct_n


@dataclass
class Answers:
    """One policy's answers, their scores, and its losses on other texts. Tensors have one entry per row."""

    rollout: Rollout
    texts: list[str]
    logp_BR: Tensor
    """Log-probabilities in nats, under the policy at the sampling temperature."""
    task_nats_B: Tensor
    """Negative log-likelihood of each held-out answer of sft.data, in nats."""
    task_tokens_B: Tensor
    """Tokens of each of these answers."""
    retained: Retained
    """Results on the retention set."""
    vocabulary: dict[str, int]
    """The tokenizer's vocabulary."""
    scores: dict[str, Tensor] = field(default_factory=dict)
    """"score" (the learned reward), "gold" or "judge" -> scores."""
    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """For a score of several rewards: name of the score -> name of the reward -> its scores."""
    figures: dict[str, float] = field(default_factory=dict)
    """Metrics measured while the model was in memory."""
    asked: list[list[Message]] = field(default_factory=list)
    """The conversations before the answers."""
    num_cut: list[int] = field(default_factory=list)
    """Number of examples or passages that were left out of each because they did not fit the context."""
    seconds_B: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    """Seconds of single requests with the first questions; empty if they were not timed."""
    cost_B: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    """Money that each of these requests costs."""
    repeated: tuple[list[Tensor], list[str]] | None = None
    """If each question was asked several times: token ids and texts of all answers, those to one question
    next to each other. The first of them are `texts`."""

    def row(self, index: int) -> dict[str, Any]:
        """One answer as JSON values."""
        return {
            "response": self.texts[index],
            "stopped": bool(self.rollout.stopped[index]),
            "tokens": len(self.rollout.response_ids[index]),
            **({"cut": self.num_cut[index]} if self.num_cut else {}),
            **({"seconds": round(float(self.seconds_B[index]), 4)} if index < len(self.seconds_B) else {}),
            **({"cost": float(f"{self.cost_B[index]:.6g}")} if index < len(self.cost_B) else {}),
            **{name: rounded(float(score_B[index])) for name, score_B in self.scores.items()},
        }


def rounded(score: float) -> float | None:
    """The score as a JSON value; None for no score."""
    return None if math.isnan(score) else round(score, 4)


def policy_metrics(
    name: str, answers: Mapping[str, Answers], start: str, quality: str | None = None
) -> dict[str, float]:
    """All metrics of one policy: alone, against PPO's start, and against the base model, if they answered.

    Args:
        name: the policy.
        answers: policy -> its answers.
        start: the policy from which PPO started.
        quality: the score that decides which of two answers wins; None: the gold score, else the judge's,
            else the learned one.
    """
    own = answers[name]
    metrics = own_metrics(own)
    if name != start and start in answers:
        metrics |= over_start(own, answers[start], quality)
    if "base" in answers:
        metrics |= task_gain(own, answers["base"]) | forgetting(own.retained, answers["base"].retained)
        if name != "base":
            metrics |= over_base(own, answers["base"])
    return metrics


def own_metrics(own: Answers) -> dict[str, float]:
    """Scores, lengths and diversity of the answers, and the losses on other texts."""
    ids = [response.tolist() for response in own.rollout.response_ids]
    metrics = {
        "length_mean": float(own.rollout.response_lengths.double().mean()),
        "stop_rate": float(own.rollout.stopped.double().mean()),
        "distinct_1": distinct_n(ids, 1),
        "distinct_2": distinct_n(ids, 2),
    }
    for kind, score_B in own.scores.items():
        if kind in QUALITIES:
            metrics |= (share(score_B) if kind in SHARES else mean(score_B)).metrics(kind)
            continue
        metrics[f"{kind}_unscored"] = int(score_B.isnan().sum())
        named = {"": score_B} | {f"/{name}": part_B for name, part_B in own.parts.get(kind, {}).items()}
        for name, each_B in named.items():
            moments = moments_of(each_B)
            metrics |= mean(each_B[~each_B.isnan()]).metrics(f"{kind}_mean{name}")
            metrics[f"{kind}_deviation{name}"] = moments.deviation
    if len(own.task_nats_B):
        metrics["task_loss"] = ratio(own.task_nats_B, own.task_tokens_B).value
    return metrics | own.retained.metrics() | own.figures


def over_start(own: Answers, start: Answers, quality: str | None) -> dict[str, float]:
    """Comparison with the answers of PPO's start, prompt by prompt: length, share that ends by itself, the
    gained word, and the scores where both have one."""
    length_B, other_length_B = own.rollout.response_lengths, start.rollout.response_lengths
    metrics: dict[str, float] = ratio(length_B, other_length_B).metrics("length_ratio")
    ended_B, other_ended_B = own.rollout.stopped.double(), start.rollout.stopped.double()
    metrics |= difference(ended_B - other_ended_B).metrics("stop_rate_change")
    metrics |= gained_word(own.texts, start.texts)[1].metrics("word_gain")
    rates = {}
    for kind, score_B in own.scores.items():
        own_B, other_B = both_scored(score_B, start.scores[kind])
        rates[kind] = share(wins(own_B, other_B))
        if kind not in QUALITIES:
            metrics |= mean(own_B.double() - other_B.double()).metrics(f"{kind}_gain")
    if "score" in rates:
        metrics |= rates["score"].metrics("win_rate_learned")
    if rates:
        kinds = (quality, "gold", "judge", "score", *QUALITIES)
        metrics |= next(rates[kind] for kind in kinds if kind in rates).metrics("win_rate")
    return metrics


def over_base(own: Answers, base: Answers) -> dict[str, float]:
    """Scores minus those of the untuned model's answers, prompt by prompt."""
    metrics: dict[str, float] = {}
    for kind in own.scores:
        metrics |= paired_gain(own, base, kind).metrics(f"{kind}_over_base")
    return metrics


def paired_gain(own: Answers, other: Answers, kind: str) -> Sampled:
    """How much better the own answers are, question by question, where both have a score.

    Args:
        kind: name of the score.
    """
    own_B, other_B = both_scored(own.scores[kind], other.scores[kind])
    gain_B = own_B.double() - other_B.double()
    return difference(gain_B) if kind in QUALITIES else mean(gain_B)  # these lie between 0 and 1


def agreement(policies: Sequence[Answers]) -> dict[str, float]:
    """Correlation of learned and gold score within each policy's answers: a rise of both from one policy to
    the next does not count. Empty without policies, or if one of the scores is missing."""
    if not policies or not all({"score", "gold"} <= {*each.scores} for each in policies):
        return {}
    score_BP, gold_BP = (
        torch.stack(
            [each.scores[kind].double() - each.scores[kind].double().nanmean() for each in policies], -1
        )
        for kind in ("score", "gold")
    )
    return correlation(score_BP, gold_BP).metrics("gold_correlation")


def task_gain(own: Answers, base: Answers) -> dict[str, float]:
    """The base model's loss on the held-out answers minus the policy's, in nats per token. Empty without such
    answers. Answers of which one model reads less than the other are left out."""
    if not len(base.task_nats_B) or not len(own.task_nats_B):  # an endpoint gives no likelihoods
        return {}
    comparable_B = (base.task_tokens_B > 0) & (own.task_tokens_B > 0)
    if own.vocabulary == base.vocabulary:
        comparable_B &= own.task_tokens_B == base.task_tokens_B
    gain_B = base.task_nats_B - own.task_nats_B
    return ratio(gain_B[comparable_B], base.task_tokens_B[comparable_B]).metrics("task_gain")


def divergence(
    own: Answers, reference: PolicyModel, temperature: float, micro_batch_tokens: int
) -> dict[str, float]:
    """KL from the reference in nats per sequence, estimated on the policy's own answers. Empty for a policy
    with another vocabulary, such as a base model next to evaluate.init=DIRECTORY."""
    if own.vocabulary != reference.tokenizer.get_vocab():
        return {}
    logp_BR = reference.log_probabilities(own.rollout, temperature, micro_batch_tokens)
    kl_BR = kl_k1(own.logp_BR, logp_BR, own.rollout.mask_BR)
    return {"kl": float(kl_BR.sum(dtype=torch.float64)) / len(own.texts)}
