"""A reward kind from outside the package: `length:COUNT` likes responses of so many characters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from toy_dpo import DpoStage

from rlhf.rewards.code import imported_code
from rlhf.rewards.http import RewardServerConfig
from rlhf.rewards.kinds import REWARD_KINDS, RewardKind, RewardPart
from rlhf.rewards.reward import Prompts, Reward

__all__ = ["DpoStage"]  # the stage whose `_target_` brings this module


def length(part: RewardPart, server: RewardServerConfig) -> Reward:
    """The reward of `length:COUNT`: minus the characters that a response has too many or too few."""
    count = int(part.source.removeprefix("length:"))

    def score(prompts: Prompts, completions: Sequence[str]) -> Tensor:
        return torch.tensor([-float(abs(len(completion) - count)) for completion in completions])

    return score


REWARD_KINDS["length"] = RewardKind(
    form="length:COUNT",
    check=lambda source: source.removeprefix("length:").isdigit(),
    digest=lambda part, digest: {"length": part.source, **imported_code(f"python:{__name__}:length")},
    make=length,
)
