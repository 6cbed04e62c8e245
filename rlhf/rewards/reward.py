"""Where scores come from: one interface for learned, rule and user-written rewards.

A reward is called as reward(prompts, completions) and returns one fp32 score for each completion, on the CPU;
higher is better.
"""

from __future__ import annotations

import inspect
import reprlib
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rlhf.config import ConfigError
from rlhf.data.schema import Message
from rlhf.rewards.code import imported_code

if TYPE_CHECKING:
    from torch import Tensor


Prompts = Sequence[list[Message]]
Reward = Callable[[Prompts, Sequence[str]], "Tensor"]
UserFunction = Callable[[list[str], list[str]], Sequence[float]]
"""(the last message of each conversation, responses) -> scores."""


WANTED = (
    "It is called as {name}(prompts, responses), with two lists of texts, and returns a list of floats, one "
    "for each response."
)
"""How a user's function is called."""


class RewardError(ConfigError):
    """A reward gave no scores. Nothing was learned from these responses."""


def function_reward(source: str) -> Reward:
    """The reward of `python:MODULE:FUNCTION`. The function gets the last message of each conversation ("" for
    an empty one) and the responses.

    Raises:
        ConfigError: it cannot be imported, or cannot be called with two lists.
    """
    _, module, name = source.split(":", 2)
    imported_code(source)
    try:
        function: UserFunction = getattr(sys.modules[module], name)
    except AttributeError as error:
        raise ConfigError(f"{source}: {error}. Name a function of that module.") from None
    wanted = WANTED.format(name=name)
    if not callable(function):
        raise ConfigError(f"{source}: {name} is not a function. {wanted}")
    defined = _defined(function)
    place = f"{defined[0]}, line {defined[1]}" if defined else module
    if (arguments := _other_arguments(function)) is not None:
        raise ConfigError(f"{source}: its arguments are {arguments} ({place}). {wanted}")

    def score(prompts: Prompts, completions: Sequence[str]) -> Tensor:
        try:
            answer = function(last_messages(prompts), list(completions))
        except Exception as error:  # whatever a user's function raises
            frames = traceback.extract_tb(error.__traceback__)
            own = [frame for frame in frames if defined and frame.filename == defined[0]]
            where = f"{own[-1].filename}, line {own[-1].lineno}, in {own[-1].name}" if own else place
            raise RewardError(f"{source}: {type(error).__name__}: {error} ({where}). {wanted}") from error
        return as_scores(answer, len(completions), source, f"({place}). {wanted}")

    return score


def as_scores(answer: object, count: int, source: str, advice: str) -> Tensor:
    """What a reward returned as `count` fp32 scores on the CPU.

    Raises:
        RewardError: it holds no numbers, or another number of them. The message ends with `advice`.
    """
    import torch

    try:
        scores = torch.as_tensor(answer)
    except (RuntimeError, TypeError, ValueError):
        said = "nothing (None)" if answer is None else f"{reprlib.repr(answer)}, which holds no numbers"
        raise RewardError(f"{source} returned {said} {advice}") from None
    if scores.shape != (count,):
        raise RewardError(f"{source} returned shape {tuple(scores.shape)} for {count} responses {advice}")
    return scores.detach().float().cpu()


def last_messages(prompts: Prompts) -> list[str]:
    """The text of each prompt's last message; "" of an empty prompt."""
    return [prompt[-1]["content"] if prompt else "" for prompt in prompts]


def _other_arguments(function: UserFunction) -> str | None:
    """Its arguments, if it cannot be called with two lists, such as (text)."""
    try:
        signature = inspect.signature(function, follow_wrapped=False)
    except ValueError:  # written in C: Python does not know them
        return None
    try:
        signature.bind([], [])
    except TypeError:
        return str(signature)
    return None


def _defined(function: UserFunction) -> tuple[str, int] | None:
    """The file and line of the function; None if Python does not know them."""
    try:
        file, line = inspect.getsourcefile(function), inspect.getsourcelines(function)[1]
    except (OSError, TypeError):
        return None
    return (file, line) if file else None


def vader_reward(prompts: Prompts, completions: Sequence[str]) -> Tensor:
    """VADER's compound sentiment in [-1, 1]: the demo's gold reward (Hutto & Gilbert 2014)."""
    import torch
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return torch.tensor([analyzer.polarity_scores(completion)["compound"] for completion in completions])


def finite_scores(reward: Reward, prompts: Prompts, completions: Sequence[str], name: str) -> Tensor:
    """One finite score each; `name` is what the user called the reward, such as `generate.reward=vader`.

    Raises:
        ConfigError: a score is NaN or infinite.
    """
    score_B = reward(prompts, completions)
    if not bool(score_B.isfinite().all()):
        index = int((~score_B.isfinite()).nonzero()[0])
        raise ConfigError(
            f"{name} gave {float(score_B[index])} for the response {completions[index]!r}. "
            "A score must be a finite number: fix the reward for such responses, or use another one."
        )
    return score_B
