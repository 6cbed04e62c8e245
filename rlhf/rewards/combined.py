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
    """Of a part's scores."""

    mean: float
    deviation: float


class Metered(Protocol):
    """A reward that counts what it does, such as a judge."""

    def take_usage(self) -> dict[str, float]:
        """Sums since the last call, as metrics without its name."""


class CombinedReward:
    """A `RewardMix` with its rewards."""

    def __init__(
        self,
        mix: RewardMix,
        rewards: Sequence[Reward],
        moments: Mapping[str, Moments] | None,
        metered: Mapping[str, Metered] | None = None,
        compute: Compute | None = None,
    ) -> None:
        """Args:
        rewards: the parts', in their order.
        moments: of each part by its name, to normalise with; None for those of the scores at hand, as
            `generate` measures them. Not used unless the mix normalises.
        metered: parts that count, by their names; each rank has its own, and `compute` adds them up.
        """
        self.metered, self.compute = metered or {}, compute
        assert len(rewards) == len(mix.of)
        self.mix, self.rewards, self.moments = mix, rewards, moments

    def each(self, prompts: Prompts, completions: Sequence[str]) -> dict[str, Tensor]:
        """The raw scores of each part, by its name: fp32 [B], NaN for no score."""
        scores = [reward(prompts, completions) for reward in self.rewards]
        return dict(zip(self.mix.labels, scores, strict=True))

    def combined(self, scores: Mapping[str, Tensor]) -> Tensor:
        """One score for each response, fp32 [B].

        Args:
            scores: what `each` gave.

        Raises:
            ConfigError: a part cannot be normalised, because all its scores are equal.
        """
        if self.mix.normalize:
            moments = self.moments or {name: moments_of(score_B) for name, score_B in scores.items()}
            scores = {name: normalized(name, score_B, moments[name]) for name, score_B in scores.items()}
        weight_P = torch.tensor([part.weight for part in self.mix.of], dtype=torch.float64)
        score_PB = weight_P[:, None] * torch.stack([*scores.values()]).double()
        return combine(score_PB, self.mix.combine, self.mix.deviation_weight).float()

    def take_usage(self) -> dict[str, float]:
        """What the parts counted since the last call, over all ranks: `judge_cost/NAME`."""
        found = {
            f"{name}/{label}": value
            for label, part in self.metered.items()
            for name, value in part.take_usage().items()
        }
        if not found or self.compute is None:
            return found
        sums = self.compute.global_sum(torch.tensor([*found.values()], dtype=torch.float64))
        return dict(zip(found, sums.tolist(), strict=True))

    def __call__(self, prompts: Prompts, completions: Sequence[str]) -> Tensor:
        return self.combined(self.each(prompts, completions))


def combine(
    score_PB: Tensor, how: Literal["sum", "minimum", "mean_minus_deviation"], deviation_weight: float
) -> Tensor:
    """One score for each response, [B]. A part that gives none (NaN) is left out; NaN where all give none.

    Source of the last two: Coste et al. 2023, arXiv:2310.02743, section 3. There the variance is subtracted;
    the deviation is in the score's own units.

    Args:
        score_PB: weighted.
        how: sum; the lowest; or the mean minus `deviation_weight` times the population deviation over parts.
    """
    missing_PB = score_PB.isnan()
    if how == "sum":
        found_B = score_PB.nansum(0)
    elif how == "minimum":
        found_B = score_PB.masked_fill(missing_PB, torch.inf).amin(0)
    else:
        mean_B = score_PB.nanmean(0)
        found_B = mean_B - deviation_weight * (score_PB - mean_B).square().nanmean(0).sqrt()
    return found_B.masked_fill(missing_PB.all(0), torch.nan)


def moments_of(score_B: Tensor) -> Moments:
    """Of the scores that are numbers; NaN if there are none."""
    known_B = score_B[~score_B.isnan()].double()
    return Moments(float(known_B.mean()), float(known_B.std(correction=0)))


def normalized(name: str, score_B: Tensor, moments: Moments) -> Tensor:
    """Deviations from the mean.

    Raises:
        ConfigError: there is no deviation.
    """
    if not moments.deviation > 0.0:
        raise ConfigError(
            f"normalize=true: {name} gives all responses of `generate` the same score, so it cannot be "
            "normalised. Use more responses (generate.num_prompts), leave it out, or use normalize=false."
        )
    return (score_B - moments.mean) / moments.deviation


class Scores(NamedTuple):
    """What a reward said."""

    score_B: Tensor
    """fp32; NaN for no score."""
    parts: dict[str, Tensor]
    """Of several rewards, each one's raw scores by its name; else empty."""
    usage: dict[str, float]
    """What they counted: `judge_cost/NAME`."""

    def metrics(self) -> dict[str, float]:
        """Mean and deviation of each part's scores, `score_mean/NAME`, and what they counted."""
        found = dict(self.usage)
        for name, score_B in self.parts.items():
            moments = moments_of(score_B)
            found[f"score_mean/{name}"] = moments.mean
            found[f"score_deviation/{name}"] = moments.deviation
        return found


def scored(reward: Reward, prompts: Prompts, completions: Sequence[str]) -> Scores:
    """The scores, with those of each part where there are several rewards."""
    if not isinstance(reward, CombinedReward):
        return Scores(reward(prompts, completions), {}, {})
    parts = reward.each(prompts, completions)
    return Scores(reward.combined(parts), parts, reward.take_usage())


def usable_scores(reward: Reward, prompts: Prompts, completions: Sequence[str], name: str) -> Scores:
    """Scores of which one at least is a number; `name` is what the user called the reward, such as
    `generate.reward=vader`.

    Raises:
        ConfigError: a score is infinite, or none is a number.
    """
    found = scored(reward, prompts, completions)
    if (why := why_unusable(found.score_B, completions)) is not None:
        raise ConfigError(
            f"{name} {why}. A score must be a finite number, or None for no score: fix the reward for such "
            "responses, or use another one."
        )
    return found
