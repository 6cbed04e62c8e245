"""The functions of `trl.rewards`: `trl:accuracy_reward`. TRL is optional."""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

from rlhf.config import Complaint, ConfigError, did_you_mean
from rlhf.rewards.function import Function, make_function_reward, needed_columns
from rlhf.rewards.reward import Reward

FACTORY_PREFIX = "get_"
"""Prefix of functions that make a reward from their arguments."""


def trl_reward(source: str, args: Mapping[str, Any]) -> Reward:
    """The reward of `trl:FUNCTION`. It always gets message lists, as these functions expect.

    Args:
        args: arguments of a function that makes a reward, such as get_cosine_scaled_reward; or additional
            arguments of a reward.
    """
    return make_function_reward(source, _function(source, args), as_messages=True)


def trl_digest(source: str, args: Mapping[str, Any]) -> dict[str, str]:
    """The versions of the packages that decide the scores.

    Raises:
        ConfigError: they are not installed, or there is no such function.
    """
    _function(source, args)
    return {name: importlib.metadata.version(name) for name in ("trl", "math-verify")}


def trl_needs(source: str, args: Mapping[str, Any]) -> frozenset[str]:
    """The columns that the function requires."""
    return needed_columns(_function(source, args))


def _function(source: str, args: Mapping[str, Any]) -> Function:
    packages = {"trl": "trl", "math-verify": "math_verify"}
    missing = [name for name, module in packages.items() if not find_spec(module)]
    if missing:
        why = f"it needs {' and '.join(missing)} (pip install -e '.[trl]')."
        raise ConfigError(Complaint(source, why))
    from trl import rewards

    name = source.removeprefix("trl:")
    known = sorted(each for each in dir(rewards) if callable(getattr(rewards, each)))
    if name not in known:
        why = f"trl.rewards has no such function.{did_you_mean(name, known)}"
        raise ConfigError(Complaint(source, why, f"It has {', '.join(known)}."))
    function: Function = getattr(rewards, name)
    try:
        inspect.signature(function).bind_partial(**args)
        return function(**args) if name.startswith(FACTORY_PREFIX) else partial(function, **args)
    except TypeError as error:
        fix = f"It takes {inspect.signature(function)}."
        raise ConfigError(Complaint(source, f"its args {dict(args)}: {error}.", fix)) from None
