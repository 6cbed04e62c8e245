"""Where scores come from: one interface for learned, rule and user-written rewards.

A reward is called as reward(prompts, completions): rows with the other columns of their file, and one text
for each. It returns one fp32 score for each completion, on the CPU; higher is better, NaN is no score.
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
"""The column that holds a response's token ids, as TRL calls them."""


class RewardError(ConfigError):
    """A reward gave no scores. Nothing was learned from these responses."""


def with_token_ids(prompts: Prompts, response_ids: Sequence[Tensor]) -> list[PromptRow]:
    """The rows, each with its response's token ids as one more column."""
    return [
        replace(row, columns=row.columns | {TOKEN_IDS: ids.tolist()})
        for row, ids in zip(prompts, response_ids, strict=True)
    ]


def columns_of(prompts: Prompts, needed: Sequence[str] = ()) -> dict[str, list[Any]]:
    """Every column that one of the rows has, and the needed ones, with a value for each row: None where a row
    lacks it."""
    names = dict.fromkeys([*(name for row in prompts for name in row.columns), *needed])
    return {name: [row.columns.get(name) for row in prompts] for name in names}


def last_messages(prompts: Prompts) -> list[str]:
    """The text of each prompt's last message; "" of an empty prompt."""
    return [row.prompt[-1]["content"] if row.prompt else "" for row in prompts]


def as_scores(answer: object, count: int, source: str, fix: str = "", place: str = "") -> Tensor:
    """What a reward returned as `count` fp32 scores on the CPU; NaN for None.

    Args:
        fix: what the error says to do.
        place: where the reward stands, as the error says it.

    Raises:
        RewardError: it holds no numbers, or another number of them.
    """
    import torch

    if isinstance(answer, list | tuple):
        answer = [math.nan if value is None else value for value in answer]
    try:
        scores = torch.as_tensor(answer)
    except (RuntimeError, TypeError, ValueError):
        said = "nothing (None)" if answer is None else f"{reprlib.repr(answer)}, which holds no numbers"
        raise RewardError(Complaint(source, f"it returned {said}{place}.", fix)) from None
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
    """Which score is infinite, such as `gave inf for the response 'Yes'`. None where none is."""
    if bool(score_B.isinf().any()):
        index = int(score_B.isinf().nonzero()[0])
        return f"gave {float(score_B[index])} for the response {completions[index]!r}"
    return None


def why_unusable(score_B: Tensor, completions: Sequence[str]) -> str | None:
    """Why nothing can be done with these scores: one is infinite, or none is a number. None where they can be
    used."""
    if (why := why_infinite(score_B, completions)) is not None:
        return why
    if bool(score_B.isnan().all()):
        return (
            f"gave nan for the response {completions[0]!r}, and no score for any of {len(score_B)} responses"
        )
    return None
