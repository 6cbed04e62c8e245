"""Rewards that are a user's function, in one of two forms.

TRL's: a function that takes `**`, such as reward(prompts, completions, **columns). It is called by name, with
all that TRL's GRPOTrainer passes; prompts and completions are texts where the file gives its prompts as text,
and message lists where it gives messages.

Two lists: any other function. It is called with the last message of each prompt, and the responses, as texts.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import reprlib
import traceback
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rlhf.config import Complaint, ConfigError
from rlhf.data.schema import Message
from rlhf.rewards.code import imported_object
from rlhf.rewards.reward import (
    TOKEN_IDS,
    Prompts,
    Reward,
    RewardError,
    as_scores,
    columns_of,
    last_messages,
)

if TYPE_CHECKING:
    from torch import Tensor

Function = Callable[..., Any]
OWN_ARGUMENTS = ("prompts", "completions", "trainer_state", "log_extra", "log_metric")
"""What a call in TRL's form passes beside the columns; a column with such a name is left out."""

WANTED = (
    "It is called as {name}(prompts, responses), with two lists of texts, or in TRL's form as "
    "{name}(prompts, completions, **columns), and returns a list, one number for each response, or None for "
    "no score."
)
"""How a user's function is called."""


def function_reward(source: str) -> Reward:
    """The reward of `python:MODULE:FUNCTION`.

    Raises:
        ConfigError: it cannot be imported, or cannot be called in either form.
    """
    return called(source, imported_function(source))


def imported_function(source: str) -> Function:
    """The function of `python:MODULE:FUNCTION`.

    Raises:
        ConfigError: it cannot be imported, or cannot be called in either form.
    """
    _, module, name = source.split(":", 2)
    function: Function = imported_object(source)
    wanted = WANTED.format(name=name)
    if not callable(function):
        raise ConfigError(Complaint(source, f"{name} is not a function.", wanted))
    if (arguments := _other_arguments(function)) is not None:
        place = _place(function, module)
        raise ConfigError(Complaint(source, f"its arguments are {arguments} ({place}).", wanted))
    return function


def needed_columns(function: Function) -> frozenset[str]:
    """The columns that a function in TRL's form cannot be called without; none of other functions."""
    if not is_in_trl_form(function):
        return frozenset()
    parameters = inspect.signature(function).parameters.values()
    needed = {
        each.name
        for each in parameters
        if each.default is each.empty and each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
    }
    return frozenset(needed - {*OWN_ARGUMENTS, TOKEN_IDS})


def called(source: str, function: Function, *, as_messages: bool = False) -> FunctionReward:
    """The reward of a function.

    Args:
        as_messages: in TRL's form, it always gets message lists.
    """
    return FunctionReward(source, function, as_messages=as_messages)


@dataclass
class Tolerance:
    """How often a function may raise, and when it did."""

    most: int
    """Answers of all ranks for which it may raise: they have no score. One more, on one rank alone, is an
    error; over all ranks the caller counts."""
    raised: list[str] = field(default_factory=list)
    """What it raised on this rank, and for which answer."""


class FunctionRaisedError(RewardError):
    """A user's function raised."""


class FunctionReward:
    """A user's function as a reward."""

    def __init__(self, source: str, function: Function, *, as_messages: bool = False) -> None:
        self._source, self._function, self._as_messages = source, function, as_messages
        self._wanted = WANTED.format(name=source.rpartition(":")[2])
        self._place = _place(function, source.split(":")[1])
        self.tolerance: Tolerance | None = None
        """None for none: an error of one answer is an error of all."""

    def __call__(self, prompts: Prompts, completions: Sequence[str]) -> Tensor:
        try:
            return self._scores(prompts, completions)
        except FunctionRaisedError as error:
            if self.tolerance is None or self.tolerance.most == 0:
                raise
            return self._one_by_one(prompts, completions, self.tolerance, error)

    def _scores(self, prompts: Prompts, completions: Sequence[str]) -> Tensor:
        function, source, wanted = self._function, self._source, self._wanted
        try:
            if is_in_trl_form(function):
                answer = function(**_by_name(function, prompts, completions, self._as_messages))
            else:
                answer = function(last_messages(prompts), list(completions))
            if inspect.iscoroutine(answer):
                answer = _awaited(answer)
        except (Exception, SystemExit) as error:  # whatever a user's function raises
            where = where_raised(function, error)
            complaint = Complaint(source, f"{type(error).__name__}: {error} ({where}).", wanted)
            raise FunctionRaisedError(complaint) from error
        return as_scores(answer, len(completions), source, wanted, place=f" ({self._place})")

    def _one_by_one(
        self, prompts: Prompts, completions: Sequence[str], tolerance: Tolerance, of_all: FunctionRaisedError
    ) -> Tensor:
        """NaN for each answer for which the function raises when it gets that one by itself. The others are
        scored together, as always: a score may depend on them.

        Raises:
            FunctionRaisedError: it does for too many; or for none, so that no answer is to blame for what it
                raised for all of them together.
        """
        import torch

        scores = torch.full((len(completions),), math.nan)
        raised: list[str] = []
        sound: list[int] = []
        for place, (row, text) in enumerate(zip(prompts, completions, strict=True)):
            try:
                self._scores([row], [text])
                sound.append(place)
            except FunctionRaisedError as error:
                asked = reprlib.repr(last_messages([row])[0])
                raised.append(f"the answer {reprlib.repr(text)} to {asked}: {error}")
                if len(raised) > tolerance.most:
                    (complaint,) = of_all.args
                    more = (
                        f"By itself it raised for {len(raised)} answers of the {place + 1} that were tried, "
                        f"the first one: {raised[0]}"
                    )
                    raise FunctionRaisedError(complaint._replace(why=f"{complaint.why} {more}")) from error
        if not raised:
            raise of_all
        if sound:
            scores[sound] = self._scores(
                [prompts[place] for place in sound], [completions[place] for place in sound]
            )
        tolerance.raised += raised
        return scores


def _awaited(answer: Coroutine[Any, Any, Any]) -> Any:
    """Its result. A notebook's event loop runs already in this thread: then in another one."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(answer)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, answer).result()


def is_in_trl_form(function: Function) -> bool:
    """Whether it takes `**`."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # written in C: Python does not know its arguments
        return False
    return any(each.kind == each.VAR_KEYWORD for each in parameters)


def _by_name(
    function: Function, prompts: Prompts, completions: Sequence[str], as_messages: bool
) -> dict[str, Any]:
    """What TRL's GRPOTrainer passes (trl 1.16, `_calculate_rewards`). There is no trainer of TRL's, so its
    state is None, and what the function logs is not kept."""

    def asked(index: int) -> list[Message] | str:
        return prompts[index].prompt if is_list[index] else texts[index]

    def answered(index: int) -> list[Message] | str:
        said = completions[index]
        return [Message(role="assistant", content=said)] if is_list[index] else said

    texts, is_list = last_messages(prompts), [as_messages or not row.is_text for row in prompts]
    columns = columns_of(prompts, sorted(needed_columns(function)))
    own: dict[str, Any] = {
        "prompts": [asked(index) for index in range(len(prompts))],
        "completions": [answered(index) for index in range(len(prompts))],
        "trainer_state": None,
        "log_extra": _not_kept,
        "log_metric": _not_kept,
    }
    return columns | own


def _not_kept(name: str, value: object) -> None:
    """What a function logs by TRL's `log_extra` and `log_metric`; our own metrics say how it scores."""


def _other_arguments(function: Function) -> str | None:
    """Its arguments, if it can be called in neither form, such as (text)."""
    try:
        signature = inspect.signature(function, follow_wrapped=False)
    except ValueError:  # written in C: Python does not know them
        return None
    if is_in_trl_form(function):
        return None
    names = [*signature.parameters]
    try:
        signature.bind([], [])
    except TypeError:
        return str(signature)
    return str(signature) if "completions" in names and names.index("completions") != 1 else None


def where_raised(function: Function, error: BaseException) -> str:
    """The last line in the function's own file on the way to an error; else where the function stands."""
    defined = _defined(function)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if defined and frame.filename == defined[0]]
    if own:
        return f"{own[-1].filename}, line {own[-1].lineno}, in {own[-1].name}"
    return _place(function, getattr(function, "__module__", type(function).__module__))


def _place(function: Function, module: str) -> str:
    """Where it stands: file and line, or its module."""
    defined = _defined(function)
    return f"{defined[0]}, line {defined[1]}" if defined else module


def _defined(function: Function) -> tuple[str, int] | None:
    """The file and line of the function; None if Python does not know them."""
    try:
        file, line = inspect.getsourcefile(function), inspect.getsourcelines(function)[1]
    except (OSError, TypeError):
        return None
    return (file, line) if file else None
