"""Rewards that are a user's function, in one of two forms.

TRL's form: a function that takes `**`, such as reward(prompts, completions, **columns). It is called with
keyword arguments, all that TRL's GRPOTrainer passes. Prompts and completions are texts if the file's prompts
are text, and message lists if they are messages.

Two lists: any other function. It is called with the last message of each prompt and the responses, as texts.
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
TRL_ARGUMENTS = ("prompts", "completions", "trainer_state", "log_extra", "log_metric")
"""Arguments of a call in TRL's form that are not columns. A column with such a name is left out."""

CALL_FORMS = (
    "It is called as {name}(prompts, responses), with two lists of texts, or in TRL's form as "
    "{name}(prompts, completions, **columns), and returns a list, one number for each response, or None for "
    "no score."
)
"""Explains to the user how the function is called; `{name}` is its name."""


def function_reward(source: str) -> Reward:
    """The reward of `python:MODULE:FUNCTION`.

    Raises:
        ConfigError: it cannot be imported, or cannot be called in either form.
    """
    return make_function_reward(source, imported_function(source))


def imported_function(source: str) -> Function:
    """The function of `python:MODULE:FUNCTION`.

    Raises:
        ConfigError: it cannot be imported, or cannot be called in either form.
    """
    _, module, name = source.split(":", 2)
    function: Function = imported_object(source)
    wanted = CALL_FORMS.format(name=name)
    if not callable(function):
        raise ConfigError(Complaint(source, f"{name} is not a function.", wanted))
    if (arguments := _unusable_arguments(function)) is not None:
        place = _place(function, module)
        raise ConfigError(Complaint(source, f"its arguments are {arguments} ({place}).", wanted))
    return function


def needed_columns(function: Function) -> frozenset[str]:
    """Columns that a function in TRL's form requires; empty for other functions."""
    if not is_in_trl_form(function):
        return frozenset()
    parameters = inspect.signature(function).parameters.values()
    needed = {
        each.name
        for each in parameters
        if each.default is each.empty and each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
    }
    return frozenset(needed - {*TRL_ARGUMENTS, TOKEN_IDS})


def make_function_reward(source: str, function: Function, *, as_messages: bool = False) -> FunctionReward:
    """The reward of a function.

    Args:
        as_messages: whether a function in TRL's form always gets message lists.
    """
    return FunctionReward(source, function, as_messages=as_messages)


@dataclass
class Tolerance:
    """How often a function may raise, and where it raised."""

    max_raised: int
    """Largest number of answers, over all ranks, for which it may raise. They get no score. More on one rank
    is an error; the caller counts over all ranks."""
    raised: list[str] = field(default_factory=list)
    """One text per answer of this rank for which it raised: the answer and the error."""


class FunctionRaisedError(RewardError):
    """A user's function raised."""


class FunctionReward:
    """A user's function as a reward."""

    def __init__(self, source: str, function: Function, *, as_messages: bool = False) -> None:
        self._source, self._function, self._as_messages = source, function, as_messages
        self._wanted = CALL_FORMS.format(name=source.rpartition(":")[2])
        self._place = _place(function, source.split(":")[1])
        self.tolerance: Tolerance | None = None
        """None: an error for one answer is an error for all."""

    def __call__(self, prompts: Prompts, completions: Sequence[str]) -> Tensor:
        try:
            return self._scores(prompts, completions)
        except FunctionRaisedError as error:
            if self.tolerance is None or self.tolerance.max_raised == 0:
                raise
            return self._one_by_one(prompts, completions, self.tolerance, error)

    def _scores(self, prompts: Prompts, completions: Sequence[str]) -> Tensor:
        function, source, wanted = self._function, self._source, self._wanted
        try:
            if is_in_trl_form(function):
                answer = function(**_trl_arguments(function, prompts, completions, self._as_messages))
            else:
                answer = function(last_messages(prompts), list(completions))
            if inspect.iscoroutine(answer):
                answer = _result_of(answer)
        except (Exception, SystemExit) as error:  # a user's function may raise anything
            where = where_raised(function, error)
            complaint = Complaint(source, f"{type(error).__name__}: {error} ({where}).", wanted)
            raise FunctionRaisedError(complaint) from error
        return as_scores(answer, len(completions), source, wanted, place=f" ({self._place})")

    def _one_by_one(
        self,
        prompts: Prompts,
        completions: Sequence[str],
        tolerance: Tolerance,
        batch_error: FunctionRaisedError,
    ) -> Tensor:
        """NaN for each answer for which the function raises when it gets that answer alone. The others are
        scored together, as always, because a score may depend on the other answers.

        Raises:
            FunctionRaisedError: it raises for too many answers; or for none alone, so that no single answer
                explains the error for all of them together.
        """
        import torch

        scores = torch.full((len(completions),), math.nan)
        raised: list[str] = []
        scored: list[int] = []
        for index, (row, text) in enumerate(zip(prompts, completions, strict=True)):
            try:
                self._scores([row], [text])
                scored.append(index)
            except FunctionRaisedError as error:
                prompt = reprlib.repr(last_messages([row])[0])
                raised.append(f"the answer {reprlib.repr(text)} to {prompt}: {error}")
                if len(raised) > tolerance.max_raised:
                    (complaint,) = batch_error.args
                    more = (
                        f"By itself it raised for {len(raised)} answers of the {index + 1} that were tried, "
                        f"the first one: {raised[0]}"
                    )
                    raise FunctionRaisedError(complaint._replace(why=f"{complaint.why} {more}")) from error
        if not raised:
            raise batch_error
        if scored:
            scores[scored] = self._scores(
                [prompts[index] for index in scored], [completions[index] for index in scored]
            )
        tolerance.raised += raised
        return scores


def _result_of(answer: Coroutine[Any, Any, Any]) -> Any:
    """The coroutine's result. Another thread runs it if this one runs an event loop, as in a notebook."""
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
    except ValueError:  # written in C: Python cannot see its arguments
        return False
    return any(each.kind == each.VAR_KEYWORD for each in parameters)


def _trl_arguments(
    function: Function, prompts: Prompts, completions: Sequence[str], as_messages: bool
) -> dict[str, Any]:
    """Keyword arguments as TRL's GRPOTrainer passes them (trl 1.16, `_calculate_rewards`). There is no TRL
    trainer here, so its state is None, and what the function logs is dropped."""

    def prompt_of(index: int) -> list[Message] | str:
        return prompts[index].prompt if is_list[index] else texts[index]

    def completion_of(index: int) -> list[Message] | str:
        text = completions[index]
        return [Message(role="assistant", content=text)] if is_list[index] else text

    texts, is_list = last_messages(prompts), [as_messages or not row.is_text for row in prompts]
    columns = columns_of(prompts, sorted(needed_columns(function)))
    own: dict[str, Any] = {
        "prompts": [prompt_of(index) for index in range(len(prompts))],
        "completions": [completion_of(index) for index in range(len(prompts))],
        "trainer_state": None,
        "log_extra": _ignore_log,
        "log_metric": _ignore_log,
    }
    return columns | own


def _ignore_log(name: str, value: object) -> None:
    """Stands in for TRL's `log_extra` and `log_metric`, and drops what is logged."""


def _unusable_arguments(function: Function) -> str | None:
    """The function's arguments, such as (text), if it can be called in neither form; else None."""
    try:
        signature = inspect.signature(function, follow_wrapped=False)
    except ValueError:  # written in C: Python cannot see its arguments
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
    """The traceback's last line in the function's own file; else where the function is defined."""
    defined = _definition(function)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if defined and frame.filename == defined[0]]
    if own:
        return f"{own[-1].filename}, line {own[-1].lineno}, in {own[-1].name}"
    return _place(function, getattr(function, "__module__", type(function).__module__))


def _place(function: Function, module: str) -> str:
    """Where the function is defined: file and line, or its module."""
    defined = _definition(function)
    return f"{defined[0]}, line {defined[1]}" if defined else module


def _definition(function: Function) -> tuple[str, int] | None:
    """File and line of the function's definition; None if Python cannot find them."""
    try:
        file, line = inspect.getsourcefile(function), inspect.getsourcelines(function)[1]
    except (OSError, TypeError):
        return None
    return (file, line) if file else None
