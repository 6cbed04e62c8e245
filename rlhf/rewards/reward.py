"""The interface of all rewards: learned, rule and user-written ones.

A reward is called as reward(prompts, completions): prompt rows with the other columns of their file, and one
text per row. It returns one fp32 score per completion, on the CPU. Higher is better, NaN is no score.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rlhf.config import Complaint, ConfigError
from rlhf.data.schema import PromptRow

if TYPE_CHECKING:
    from torch import Tensor


Prompts = Sequence[PromptRow]
Reward = Callable[[Prompts, Sequence[str]], "Tensor"]
TOKEN_IDS = "completion_ids"
"""Column of a response's token ids. The name is TRL's."""


class RewardError(ConfigError):
    """A reward gave no usable scores. Nothing was learned from these responses."""


def with_token_ids(prompts: Prompts, response_ids: Sequence[Tensor]) -> list[PromptRow]:
    """The rows, each with the token ids of its response as an additional column."""
    return [
        replace(row, columns=row.columns | {TOKEN_IDS: ids.tolist()})
        for row, ids in zip(prompts, response_ids, strict=True)
    ]


def columns_of(prompts: Prompts, needed: Sequence[str] = ()) -> dict[str, list[Any]]:
    """Column name -> one value per row, None where a row lacks it. Holds every column of any row, and the
    needed ones."""
    names = dict.fromkeys([*(name for row in prompts for name in row.columns), *needed])
    return {name: [row.columns.get(name) for row in prompts] for name in names}


def last_messages(prompts: Prompts) -> list[str]:
    """The text of each prompt's last message; "" for an empty prompt."""
    return [row.prompt[-1]["content"] if row.prompt else "" for row in prompts]


def as_scores(answer: object, count: int, source: str, fix: str = "", place: str = "") -> Tensor:
    """What a reward returned as `count` fp32 scores on the CPU; NaN for None.

    Args:
        fix: how to fix it, for the error message.
        place: where the reward is defined, for the error message.

    Raises:
        RewardError: the answer is not a list of `count` numbers.
    """
    import torch

    if isinstance(answer, list | tuple):
        answer = [math.nan if value is None else value for value in answer]
    try:
        scores = torch.as_tensor(answer)
    except (RuntimeError, TypeError, ValueError):
        returned = "nothing (None)" if answer is None else f"{reprlib.repr(answer)}, which holds no numbers"
        raise RewardError(Complaint(source, f"it returned {returned}{place}.", fix)) from None
    if scores.shape != (count,):
        why = f"it returned shape {tuple(scores.shape)} for {count} responses{place}."
        raise RewardError(Complaint(source, why, fix))
    return scores.detach().float().cpu()


def vader_reward(prompts: Prompts, completions: Sequence[str]) -> Tensor:
    """VADER's compound sentiment in [-1, 1]: the demo's gold reward (Hutto & Gilbert 2014)."""
    import torch
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return torch.tensor([analyzer.polarity_scores(completion)["compound"] for completion in completions])


def why_infinite(score_B: Tensor, completions: Sequence[str]) -> str | None:
    """The first infinite score, such as `gave inf for the response 'Yes'`. None if all are finite or NaN."""
    if bool(score_B.isinf().any()):
        index = int(score_B.isinf().nonzero()[0])
        return f"gave {float(score_B[index])} for the response {completions[index]!r}"
    return None


def why_unusable(score_B: Tensor, completions: Sequence[str]) -> str | None:
    """Why these scores cannot be used: one is infinite, or all are NaN. None if they can be used."""
    if (why := why_infinite(score_B, completions)) is not None:
        return why
    if bool(score_B.isnan().all()):
        return (
            f"gave nan for the response {completions[0]!r}, and no score for any of {len(score_B)} responses"
        )
    return None
