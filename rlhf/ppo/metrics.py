"""The metrics of policy gradients. Each one counts real tokens or episodes of all ranks, never padding.

Dimensions: B episodes, R response tokens (padded).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.config import STAGE, Complaint
from rlhf.data.schema import PromptRow
from rlhf.distributed.compute import Compute
from rlhf.evaluation.held_out import SELECTION_HALF, TEST_HALF
from rlhf.evaluation.intervals import mean, ratio
from rlhf.evaluation.sampled import Sampled
from rlhf.generation.policy_model import PolicyModel
from rlhf.losses.policy import PolicyLoss
from rlhf.models.logprobs import TokenStatistics
from rlhf.rewards.combined import scored
from rlhf.rewards.reward import Reward, RewardError, with_token_ids
from rlhf.rl.advantage import kl_k1, kl_k3
from rlhf.rl.rollout import Experience
from rlhf.rl.statistics import distinct_n, explained_variance


def rollout_metrics(experience: Experience) -> dict[str, float]:
    """Metrics of one scored rollout, over all ranks, before the update."""
    mask_BR, rollout = experience.mask_BR, experience.rollout
    episodes, tokens = len(experience), int(mask_BR.sum())
    lengths_B = rollout.response_lengths.double()
    stop_rate = float(rollout.stopped.double().mean())
    ids = [response.tolist() for response in rollout.response_ids]

    def total(values_BR: Tensor) -> float:
        return float(torch.where(mask_BR, values_BR, 0.0).sum(dtype=torch.float64))

    metrics = {
        "score": mean_score(experience.score_B),
        "score_p95": float(experience.score_B.nanquantile(0.95)),
        "unscored": float(experience.score_B.isnan().sum()),
        "reward": total(experience.reward_BR) / episodes,
        "kl": total(kl_k1(experience.logp_BR, experience.reference_logp_BR, mask_BR)) / episodes,  # nats
        "kl_k3": total(kl_k3(experience.logp_BR, experience.reference_logp_BR, mask_BR)) / episodes,
        "prompt_tokens": float(sum(map(len, rollout.prompt_ids))),
        "response_tokens": float(tokens),
        "length": tokens / episodes,
        "length_p95": float(lengths_B.quantile(0.95)),
        "stop_rate": stop_rate,
        "truncation_rate": 1 - stop_rate,
        "distinct_1": distinct_n(ids, 1),
        "distinct_2": distinct_n(ids, 2),
    }
    if experience.values is not None:
        value_BR, return_BR = experience.values
        metrics["value"], metrics["return"] = total(value_BR) / tokens, total(return_BR) / tokens
        metrics["explained_variance"] = explained_variance(value_BR, return_BR, experience.scored_BR)
        metrics["explained_variance_error"] = explained_variance_error(experience)
    if rollout.sampled_logp is not None:
        engine_BR = torch.nn.utils.rnn.pad_sequence(rollout.sampled_logp, batch_first=True)
        mismatch = torch.where(mask_BR, engine_BR - experience.logp_BR, 0.0).abs()
        metrics["engine_mismatch"] = total(mismatch) / tokens  # mean |difference|, nats
        metrics["engine_mismatch_max"] = float(mismatch.max())
    return metrics


def explained_variance_error(experience: Experience) -> float:
    """Half the 95% interval of `explained_variance`. It counts episodes: an episode's tokens share a score.

    Explained variance is 1 minus the ratio of two sums of squares. Each episode adds its part to both.
    """
    mask_BR = experience.scored_BR

    def squares(values_BR: Tensor) -> Tensor:
        values_BR = torch.where(mask_BR, values_BR.double(), 0.0)
        mean_of_all = values_BR.sum() / mask_BR.sum()
        return torch.where(mask_BR, values_BR - mean_of_all, 0.0).square().sum(-1)

    returns_B = squares(experience.return_BR)
    if not float(returns_B.sum()) > 0.0:  # nothing to predict
        return 0.0
    unforeseen = ratio(squares(experience.return_BR - experience.value_BR), returns_B)
    return (unforeseen.high - unforeseen.low) / 2


def update_sums(policy: PolicyLoss, statistics: TokenStatistics, total_tokens: int) -> dict[str, Tensor]:
    """The sums over a micro-batch's tokens that `UpdateSums` adds up, `max_ratio`, and `ratio_deviation`.

    Args:
        policy: its loss is divided by total_tokens.
    """
    return {
        "policy_loss": policy.loss.detach() * total_tokens, "entropy": statistics.entropy_N.sum(),
        "clip_fraction": policy.clipped, "approximate_kl": policy.approximate_kl,
        "max_ratio": policy.max_ratio, "ratio_deviation": policy.ratio_deviation,
        "tokens": torch.tensor(len(statistics.logp_N)),
    }  # fmt: skip


class UpdateSums:
    """Sums over the tokens of all optimizer steps of one rollout."""

    NAMES = ("policy_loss", "entropy", "clip_fraction", "approximate_kl")

    def __init__(self, more: Sequence[str] = ()) -> None:
        """`more`: names of further sums, such as the critic's loss."""
        self.names = (*self.NAMES, *more)
        self._sums = torch.zeros(len(self.names), dtype=torch.float64)
        self._tokens = 0.0
        self._max_ratio = 0.0

    def add(self, found: Mapping[str, Tensor]) -> None:
        """Count one of this rank's micro-batches.

        Args:
            found: `update_sums`, and the further sums.
        """
        self._sums += torch.stack([found[name].float() for name in self.names]).double().cpu()
        self._tokens += float(found["tokens"])
        self._max_ratio = max(self._max_ratio, float(found["max_ratio"]))

    def max_ratio(self, compute: Compute) -> float:
        """The largest probability ratio of any token, over all ranks."""
        return float(compute.global_max(torch.tensor([self._max_ratio])))

    def means(self, compute: Compute) -> dict[str, float]:
        """Means over the tokens of all ranks."""
        *sums, tokens = compute.global_sum(
            torch.cat([self._sums, torch.tensor([self._tokens], dtype=torch.float64)])
        ).tolist()
        return {name: value / tokens for name, value in zip(self.names, sums, strict=True)}


class Evaluation(NamedTuple):
    """Measurements of a policy on held-out prompts."""

    score_B: Tensor
    """Raw score; not finite if the reward gave none."""
    kl_B: Tensor
    """Nats a sequence, from the reference."""
    length_B: Tensor
    """Response tokens."""
    stopped_B: Tensor
    """bool."""

    @property
    def score(self) -> float:
        """Mean of the judged prompts' finite scores."""
        return mean_score(self.score_B[TEST_HALF])

    @property
    def choice_score(self) -> float:
        """Mean of the finite scores of the prompts that choose the weights."""
        return mean_score(self.score_B[SELECTION_HALF])

    @property
    def unscored(self) -> int:
        """Responses without a score."""
        return int((~self.score_B.isfinite()).sum())

    def metrics(self) -> dict[str, float]:
        """As metrics."""
        return {
            "score": self.score,
            "choice_score": self.choice_score,
            "kl": float(self.kl_B.mean()),
            "length": float(self.length_B.mean()),
            "stop_rate": float(self.stopped_B.double().mean()),
            "unscored": self.unscored,
        }

    def gain_over(self, other: Evaluation) -> Sampled:
        """Mean rise in score on the judged prompts, with its interval. Prompts without both scores are left
        out."""
        gain_B = self.score_B[TEST_HALF].double() - other.score_B[TEST_HALF].double()
        return mean(gain_B[gain_B.isfinite()])


def mean_score(score_B: Tensor) -> float:
    """The mean over the finite values."""
    return float(score_B[score_B.isfinite()].double().mean())


def evaluate_policy(
    policy: PolicyModel,
    reference: PolicyModel,
    reward: Reward,
    rows: Sequence[PromptRow],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_rows: int,
    micro_batch_tokens: int,
) -> tuple[Evaluation, list[dict[str, Any]], dict[str, float]]:
    """Sample one response per prompt, always with the same seed, and measure the responses.

    Returns:
        The measurements, the answers as JSON values, and the metrics of each of several rewards.

    Raises:
        RewardError: no response of one half of the prompts got a finite score.
    """
    rollout, texts = policy.sample(
        [row.prompt for row in rows],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        generator=torch.Generator().manual_seed(seed),
        batch_rows=batch_rows,
    )
    found = scored(reward, with_token_ids(rows, rollout.response_ids), texts)
    score_B = found.score_B
    for half in (SELECTION_HALF, TEST_HALF):
        if not bool(score_B[half].isfinite().any()):
            why = f"it gave no finite score for any of {len(score_B[half])} responses to held-out prompts."
            raise RewardError(Complaint(f"{STAGE}.reward", why, "Fix that reward, or use another one."))
    logp_BR = policy.log_probabilities(rollout, temperature, micro_batch_tokens)
    reference_BR = reference.log_probabilities(rollout, temperature, micro_batch_tokens)
    kl_BR = kl_k1(logp_BR, reference_BR, rollout.mask_BR)
    lengths_B = rollout.response_lengths.double()
    kl_B = kl_BR.sum(-1, dtype=torch.float64)
    result = Evaluation(score_B.cpu(), kl_B, lengths_B, rollout.stopped)
    answers = [
        {
            **asdict(row),
            "response": text,
            "stopped": bool(result.stopped_B[index]),
            "tokens": len(rollout.response_ids[index]),
            "kl": float(kl_B[index]),
            "score": float(result.score_B[index]) if result.score_B[index].isfinite() else None,
            "token_ids": rollout.response_ids[index].tolist(),
        }
        for index, (row, text) in enumerate(zip(rows, texts, strict=True))
    ]
    return result, answers, found.metrics()
