"""What PPO reports of itself. Every mean is over real tokens or episodes of all ranks, never over padding.

Quantiles, maxima, distinct-n and held-out evaluations are this rank's.

Dimensions: B episodes, R response tokens (padded).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.data.schema import PromptRow
from rlhf.generation.policy import Policy
from rlhf.losses.policy import PolicyLoss
from rlhf.losses.value import ValueLoss
from rlhf.rewards.source import Exchange, Reward, finite_scores
from rlhf.rl.advantage import masked_moments
from rlhf.rl.kl import kl_k1, kl_k3
from rlhf.rl.rollout import Experience
from rlhf.rl.statistics import distinct_n, explained_variance_from_moments

GlobalSum = Callable[[Tensor], Tensor]


def rollout_metrics(experience: Experience, global_sum: GlobalSum) -> dict[str, float]:
    """Of one scored rollout, before anything was learned from it."""
    mask_BR, rollout = experience.mask_BR, experience.rollout
    k1 = kl_k1(experience.logp_BR, experience.reference_logp_BR, mask_BR)
    k3 = kl_k3(experience.logp_BR, experience.reference_logp_BR, mask_BR)
    lengths_B = rollout.response_lengths.float()
    sums = [
        torch.tensor(len(experience)),
        mask_BR.sum(),
        k1.sum(),
        k3.sum(),
        experience.score_B.sum(),
        torch.where(mask_BR, experience.reward_BR, 0.0).sum(),
        rollout.stopped.sum(),
        torch.where(mask_BR, experience.value_BR, 0.0).sum(),
        torch.where(mask_BR, experience.return_BR, 0.0).sum(),
    ]
    episodes, tokens, k1_sum, k3_sum, score, reward, stopped, value, returns = global_sum(
        torch.stack([total.double() for total in sums])
    ).tolist()
    error_moments = global_sum(masked_moments(experience.return_BR - experience.value_BR, mask_BR))
    return_moments = global_sum(masked_moments(experience.return_BR, mask_BR))
    metrics = {
        "score": score / episodes,
        "score_p95": float(experience.score_B.quantile(0.95)),
        "reward": reward / episodes,
        "kl": k1_sum / episodes,  # nats a sequence
        "kl_k3": k3_sum / episodes,
        "length": tokens / episodes,
        "length_p95": float(lengths_B.quantile(0.95)),
        "stop_rate": stopped / episodes,
        "truncation_rate": 1 - stopped / episodes,
        "value": value / tokens,
        "return": returns / tokens,
        "explained_variance": explained_variance_from_moments(error_moments, return_moments),
        "distinct_1": distinct_n([ids.tolist() for ids in rollout.response_ids], 1),
        "distinct_2": distinct_n([ids.tolist() for ids in rollout.response_ids], 2),
    }
    if rollout.sampled_logp is not None:
        engine_BR = torch.nn.utils.rnn.pad_sequence(rollout.sampled_logp, batch_first=True)
        mismatch = torch.where(mask_BR, engine_BR - experience.logp_BR, 0.0).abs()
        metrics["engine_mismatch"] = float(global_sum(mismatch.sum()) / tokens)  # mean |difference|, nats
        metrics["engine_mismatch_max"] = float(mismatch.max())
    return metrics


class UpdateSums:
    """Sums over the tokens of all optimizer steps of one rollout."""

    NAMES = ("policy_loss", "value_loss", "entropy", "clip_fraction", "value_clip_fraction", "approximate_kl")

    def __init__(self) -> None:
        self._sums = torch.zeros(len(self.NAMES), dtype=torch.float64)
        self._tokens = 0.0
        self.max_ratio = 0.0

    def add(
        self, policy: PolicyLoss, value: ValueLoss, entropy_sum: Tensor, tokens: int, total_tokens: float
    ) -> None:
        """Count one micro-batch; its losses are already divided by total_tokens."""
        sums = torch.stack([
            policy.loss.detach() * total_tokens, value.loss.detach() * total_tokens, entropy_sum,
            policy.clipped.float(), value.clipped.float(), policy.approximate_kl,
        ])  # fmt: skip
        self._sums += sums.double().cpu()
        self._tokens += tokens
        self.max_ratio = max(self.max_ratio, float(policy.max_ratio))

    def means(self, global_sum: GlobalSum) -> dict[str, float]:
        """Per token, over all ranks."""
        *sums, tokens = global_sum(
            torch.cat([self._sums, torch.tensor([self._tokens], dtype=torch.float64)])
        ).tolist()
        return {name: value / tokens for name, value in zip(self.NAMES, sums, strict=True)}


class Evaluation(NamedTuple):
    """A policy on held-out prompts."""

    score: float
    """Mean learned (or rule) score, raw."""
    kl: float
    """Nats a sequence, from the reference."""
    length: float
    """Response tokens."""
    stop_rate: float


def evaluate_policy(
    policy: Policy,
    reference: Policy,
    reward: Reward,
    rows: Sequence[PromptRow],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    micro_batch_tokens: int,
) -> tuple[Evaluation, list[str]]:
    """Sample one response a prompt, always with the same seed, and measure them."""
    rollout, texts = policy.sample(
        [row.prompt for row in rows],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        generator=torch.Generator(policy.model.device).manual_seed(seed),
        batch_rows=len(rows),
    )
    exchanges = [Exchange(row.prompt, text) for row, text in zip(rows, texts, strict=True)]
    scores = finite_scores(reward, exchanges, "ppo.reward, on a held-out prompt,")
    logp_BR = policy.log_probabilities(rollout, temperature, micro_batch_tokens)
    reference_BR = reference.log_probabilities(rollout, temperature, micro_batch_tokens)
    kl = float(kl_k1(logp_BR, reference_BR, rollout.mask_BR).sum()) / len(rows)
    lengths = rollout.response_lengths.float()
    return Evaluation(
        float(scores.mean()), kl, float(lengths.mean()), float(rollout.stopped.float().mean())
    ), texts
