"""What a policy answered, and what follows from it: by itself, and beside another policy's answers.

Dimensions: B rows, R response tokens (padded). Metrics are named without the policy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhf.evaluation.intervals import correlation, difference, mean, ratio, share
from rlhf.evaluation.retention import Retained, forgetting
from rlhf.evaluation.win_rate import both_scored, wins
from rlhf.evaluation.wording import gained_word
from rlhf.generation.policy_model import PolicyModel
from rlhf.rewards.combined import moments_of
from rlhf.rl.advantage import kl_k1
from rlhf.rl.rollout import Rollout
from rlhf.rl.statistics import distinct_n


@dataclass
class Answers:
    """One policy's answers, their scores, and what the policy knows. Tensors have one entry per row."""

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
    """By "score" (the learned reward), "gold" and "judge"."""
    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Of a score that is made of several rewards: each one's, by its name."""
    figures: dict[str, float] = field(default_factory=dict)
    """Metrics that were measured while the model was in memory."""

    def row(self, index: int) -> dict[str, Any]:
        """One answer as JSON values."""
        return {
            "response": self.texts[index],
            "stopped": bool(self.rollout.stopped[index]),
            "tokens": len(self.rollout.response_ids[index]),
            **{name: rounded(float(score_B[index])) for name, score_B in self.scores.items()},
        }


def rounded(score: float) -> float | None:
    """As JSON; None for no score."""
    return None if math.isnan(score) else round(score, 4)


def figures(name: str, answers: Mapping[str, Answers], start: str) -> dict[str, float]:
    """All of one policy: by itself, against what PPO started from, and against the base model, where these
    answered too.

    Args:
        start: what PPO started from, by its name among the policies.
    """
    said = answers[name]
    found = described(said)
    if name != start and start in answers:
        found |= gains(said, answers[start])
    if "base" in answers:
        found |= task_gain(said, answers["base"]) | forgetting(said.retained, answers["base"].retained)
        if name != "base":
            found |= over_base(said, answers["base"])
    return found


def described(said: Answers) -> dict[str, float]:
    """Scores, lengths and variety of the answers, and what the policy knows."""
    ids = [response.tolist() for response in said.rollout.response_ids]
    metrics = {
        "length_mean": float(said.rollout.response_lengths.double().mean()),
        "stop_rate": float(said.rollout.stopped.double().mean()),
        "distinct_1": distinct_n(ids, 1),
        "distinct_2": distinct_n(ids, 2),
    }
    for kind, score_B in said.scores.items():
        metrics[f"{kind}_unscored"] = int(score_B.isnan().sum())
        named = {"": score_B} | {f"/{name}": part_B for name, part_B in said.parts.get(kind, {}).items()}
        for name, each_B in named.items():
            moments = moments_of(each_B)
            metrics[f"{kind}_mean{name}"] = moments.mean
            metrics[f"{kind}_deviation{name}"] = moments.deviation
    if len(said.task_nats_B):
        metrics["task_loss"] = ratio(said.task_nats_B, said.task_tokens_B).value
    return metrics | said.retained.metrics() | said.figures


def gains(said: Answers, start: Answers) -> dict[str, float]:
    """Against the answers of what PPO started from, prompt by prompt: their length, how many more end by
    themselves, the word that they took up, and the scores where both have one. The gold score decides who
    wins where there is one, else the judge's."""
    length_B, other_length_B = said.rollout.response_lengths, start.rollout.response_lengths
    metrics: dict[str, float] = ratio(length_B, other_length_B).metrics("length_ratio")
    ended_B, other_ended_B = said.rollout.stopped.double(), start.rollout.stopped.double()
    metrics |= difference(ended_B - other_ended_B).metrics("stop_rate_change")
    metrics |= gained_word(said.texts, start.texts)[1].metrics("word_gain")
    won = {}
    for kind, score_B in said.scores.items():
        own_B, other_B = both_scored(score_B, start.scores[kind])
        won[kind] = share(wins(own_B, other_B))
        metrics |= mean(own_B.double() - other_B.double()).metrics(f"{kind}_gain")
    if "score" in won:
        metrics |= won["score"].metrics("win_rate_learned")
    if won:
        metrics |= next(won[kind] for kind in ("gold", "judge", "score") if kind in won).metrics("win_rate")
    return metrics


def over_base(said: Answers, base: Answers) -> dict[str, float]:
    """How much higher the scores are than those of the untuned model's answers, prompt by prompt."""
    metrics: dict[str, float] = {}
    for kind, score_B in said.scores.items():
        own_B, base_B = both_scored(score_B, base.scores[kind])
        metrics |= mean(own_B.double() - base_B.double()).metrics(f"{kind}_over_base")
    return metrics


def agreement(said: Sequence[Answers]) -> dict[str, float]:
    """How much learned and gold score agree on the answers, each policy's by themselves: that both rise from
    one policy to the next does not count. Nothing where one of them is not known."""
    if not all({"score", "gold"} <= {*each.scores} for each in said):
        return {}
    score_BP, gold_BP = (
        torch.stack([each.scores[kind].double() - each.scores[kind].double().nanmean() for each in said], -1)
        for kind in ("score", "gold")
    )
    return correlation(score_BP, gold_BP).metrics("gold_correlation")


def task_gain(said: Answers, base: Answers) -> dict[str, float]:
    """Nats a token that the loss on the held-out answers is below the base model's; nothing without such
    answers. Those that one of both reads less of do not count."""
    if not len(base.task_nats_B):
        return {}
    alike_B = (base.task_tokens_B > 0) & (said.task_tokens_B > 0)
    if said.vocabulary == base.vocabulary:
        alike_B &= said.task_tokens_B == base.task_tokens_B
    gain_B = base.task_nats_B - said.task_nats_B
    return ratio(gain_B[alike_B], base.task_tokens_B[alike_B]).metrics("task_gain")


def divergence(
    said: Answers, reference: PolicyModel, temperature: float, micro_batch_tokens: int
) -> dict[str, float]:
    """KL from the reference in nats per sequence, by the policy's own answers; nothing of a policy with other
    tokens, such as a base model beside evaluate.init=DIRECTORY."""
    if said.vocabulary != reference.tokenizer.get_vocab():
        return {}
    logp_BR = reference.log_probabilities(said.rollout, temperature, micro_batch_tokens)
    kl_BR = kl_k1(said.logp_BR, logp_BR, said.rollout.mask_BR)
    return {"kl": float(kl_BR.sum(dtype=torch.float64)) / len(said.texts)}
