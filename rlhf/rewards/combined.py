"""Several rewards at once. Dimensions: P parts, B responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from rlhf.config import ConfigError
from rlhf.distributed.compute import Compute
from rlhf.rewards.kinds import RewardMix
from rlhf.rewards.reward import Prompts, Reward, why_unusable


class Moments(NamedTuple):
    """Mean and standard deviation of a part's scores."""

    mean: float
    deviation: float


class Metered(Protocol):
    """A reward that counts its usage, such as a judge."""

    def take_usage(self) -> dict[str, float]:
        """Sums since the last call, as metrics without the reward's name."""


class CombinedReward:
    """The reward of a `RewardMix`."""

    def __init__(
        self,
        mix: RewardMix,
        rewards: Sequence[Reward],
        moments: Mapping[str, Moments] | None,
        metered: Mapping[str, Metered] | None = None,
        compute: Compute | None = None,
    ) -> None:
        """Args:
        rewards: one per part, in the order of the parts.
        moments: part name -> moments to normalise with. None: the moments of the scores at hand, as
            `generate` measures them. Used only if the mix normalises.
        metered: part name -> a part that counts its usage. Each rank counts its own, and `compute` adds them
            up.
        """
        self.metered, self.compute = metered or {}, compute
        assert len(rewards) == len(mix.of)
        self.mix, self.rewards, self.moments = mix, rewards, moments

    def part_scores(self, prompts: Prompts, completions: Sequence[str]) -> dict[str, Tensor]:
        """Part name -> raw scores, fp32 [B]; NaN for no score."""
        scores = [reward(prompts, completions) for reward in self.rewards]
        return dict(zip(self.mix.labels, scores, strict=True))

    def combined(self, scores: Mapping[str, Tensor]) -> Tensor:
        """One score per response, fp32 [B].

        Args:
            scores: the result of `part_scores`.

        Raises:
            ConfigError: all scores of a part are equal, so it cannot be normalised.
        """
        if self.mix.normalize:
            moments = self.moments or {name: moments_of(score_B) for name, score_B in scores.items()}
            scores = {name: normalized(name, score_B, moments[name]) for name, score_B in scores.items()}
        weight_P = torch.tensor([part.weight for part in self.mix.of], dtype=torch.float64)
        score_PB = weight_P[:, None] * torch.stack([*scores.values()]).double()
        return combine(score_PB, self.mix.combine, self.mix.deviation_weight).float()

    def take_usage(self) -> dict[str, float]:
        """Usage of the parts since the last call, summed over all ranks, such as `judge_cost/NAME`."""
        usage = {
            f"{name}/{label}": value
            for label, part in self.metered.items()
            for name, value in part.take_usage().items()
        }
        if not usage or self.compute is None:
            return usage
        sums = self.compute.global_sum(torch.tensor([*usage.values()], dtype=torch.float64))
        return dict(zip(usage, sums.tolist(), strict=True))

    def __call__(self, prompts: Prompts, completions: Sequence[str]) -> Tensor:
        return self.combined(self.part_scores(prompts, completions))


def combine(
    score_PB: Tensor, how: Literal["sum", "minimum", "mean_minus_deviation"], deviation_weight: float
) -> Tensor:
    """One score per response, [B]. A part without a score (NaN) is left out; NaN if no part has one.

    Source of `minimum` and `mean_minus_deviation`: Coste et al. 2023, arXiv:2310.02743, section 3. The paper
    subtracts the variance; the deviation is in the score's own units.

    Args:
        score_PB: weighted scores.
        how: the sum; the lowest; or the mean minus `deviation_weight` times the population deviation over
            parts.
    """
    missing_PB = score_PB.isnan()
    if how == "sum":
        combined_B = score_PB.nansum(0)
    elif how == "minimum":
        combined_B = score_PB.masked_fill(missing_PB, torch.inf).amin(0)
    else:
        mean_B = score_PB.nanmean(0)
        combined_B = mean_B - deviation_weight * (score_PB - mean_B).square().nanmean(0).sqrt()
    return combined_B.masked_fill(missing_PB.all(0), torch.nan)


def moments_of(score_B: Tensor) -> Moments:
    """Moments of the scores that are numbers; NaN if there are none."""
    known_B = score_B[~score_B.isnan()].double()
    return Moments(float(known_B.mean()), float(known_B.std(correction=0)))


def normalized(name: str, score_B: Tensor, moments: Moments) -> Tensor:
    """Standardised scores: distance from the mean, in standard deviations.

    Raises:
        ConfigError: all scores are equal.
    """
    if not moments.deviation > 0.0:
        raise ConfigError(
            f"normalize=true: {name} gives all responses of `generate` the same score, so it cannot be "
            "normalised. Use more responses (generate.num_prompts), leave it out, or use normalize=false."
        )
    return (score_B - moments.mean) / moments.deviation


class Scores(NamedTuple):
    """The scores of a reward, and what it counted."""

    score_B: Tensor
    """fp32; NaN for no score."""
    parts: dict[str, Tensor]
    """Part name -> raw scores. Empty for a single reward."""
    usage: dict[str, float]
    """Usage of the parts, such as `judge_cost/NAME`."""

    def metrics(self) -> dict[str, float]:
        """Mean and deviation of each part's scores, such as `score_mean/NAME`, and the usage."""
        metrics = dict(self.usage)
        for name, score_B in self.parts.items():
            moments = moments_of(score_B)
            metrics[f"score_mean/{name}"] = moments.mean
            metrics[f"score_deviation/{name}"] = moments.deviation
        return metrics


def scored(reward: Reward, prompts: Prompts, completions: Sequence[str]) -> Scores:
    """The scores of a reward; for several rewards, also the scores of each part."""
    if not isinstance(reward, CombinedReward):
        return Scores(reward(prompts, completions), {}, {})
    parts = reward.part_scores(prompts, completions)
    return Scores(reward.combined(parts), parts, reward.take_usage())


def usable_scores(reward: Reward, prompts: Prompts, completions: Sequence[str], name: str) -> Scores:
    """The scores of a reward: none is infinite, and at least one is a number.

    Args:
        name: the reward as the user wrote it, such as `generate.reward=vader`.

    Raises:
        ConfigError: a score is infinite, or none is a number.
    """
    scores = scored(reward, prompts, completions)
    if (why := why_unusable(scores.score_B, completions)) is not None:
        raise ConfigError(
            f"{name} {why}. A score must be a finite number, or None for no score: fix the reward for such "
            "responses, or use another one."
        )
    return scores
