"""The user's own advantage estimators and losses, `python:MODULE:FUNCTION`. What they raise, and wrong
return values, become errors that name the user's key.

Dimensions: B episodes, R response tokens (padded).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf.config import STAGE, Complaint, ConfigError
from rlhf.losses.policy import PolicyLoss, with_figures
from rlhf.rewards.code import imported_object
from rlhf.rewards.function import where_raised
from rlhf.rl.rollout import Advantages, Values


class OwnFunction:
    """A user's function."""

    def __init__(self, key: str, source: str) -> None:
        """Raises:
        ConfigError: it cannot be imported, or is none.
        """
        self.setting, self._function = f"{STAGE}.{key}={source}", imported_object(source)
        if not callable(self._function):
            raise self.error(
                f"names a value of the type {type(self._function).__name__}.", "Name a function."
            )

    def error(self, did: str, fix: str = "Fix it.") -> ConfigError:
        """The error to raise, with what the function did."""
        return ConfigError(Complaint(self.setting, f"it {did}", fix))

    def called(self, *arguments: Any, **named: Any) -> Any:
        """Call the function.

        Raises:
            ConfigError: the function raised.
        """
        function: Callable[..., Any] = self._function
        try:
            return function(*arguments, **named)
        except (Exception, SystemExit) as error:  # whatever a user's function raises
            place = where_raised(function, error)
            raise self.error(f"raised {type(error).__name__}: {error} ({place}).") from error


class OwnEstimator(OwnFunction):
    """A user's advantage estimator."""

    def __init__(self, source: str, *, has_critic: bool) -> None:
        super().__init__("advantage", source)
        self._has_critic = has_critic

    def __call__(self, rewarded: Any, config: Any) -> Advantages:
        """See `rlhf.ppo.objective.Estimator`. It gets copies, into which it may write.

        Raises:
            ConfigError: it raised, or returned something else.
        """
        mask_BR, shape = rewarded.mask_BR, tuple(rewarded.mask_BR.shape)
        copies = (each.clone() if isinstance(each, Tensor) else each for each in rewarded)
        found = self.called(type(rewarded)(*copies), config)
        if isinstance(found, Tensor) and not self._has_critic:
            found = Advantages(found, None)
        tensors = [found.advantage_BR] if isinstance(found, Advantages) else []
        if tensors and self._has_critic:
            tensors = [*tensors, *found.values] if isinstance(found.values, Values) else []
        shapes = [tuple(each.shape) for each in tensors]
        if not isinstance(found, Advantages) or shapes != [shape] * (3 if self._has_critic else 1):
            wanted = "a tensor"
            if self._has_critic:
                wanted = "rlhf.rl.rollout.Advantages(advantage_BR, Values(value_BR, return_BR)), all"
            got = (
                f"tensors of {', '.join(map(str, shapes))}"
                if shapes
                else _described(found, has_gradient=True)
            )
            raise self.error(f"must return {wanted} of shape {shape} (episodes, tokens), and returned {got}.")
        for each_BR in tensors:
            bad = int((mask_BR & ~each_BR.isfinite()).sum())
            if bad:
                raise self.error(f"returned nan or inf for {bad} of {int(mask_BR.sum())} tokens.")
        dtype = rewarded.reward_BR.dtype
        values = None if found.values is None else Values(*(each.to(dtype) for each in found.values))
        return Advantages(torch.where(mask_BR, found.advantage_BR, 0.0).to(dtype), values)


class OwnLoss(OwnFunction):
    """A user's policy loss."""

    def __init__(self, source: str) -> None:
        super().__init__("policy_loss", source)

    def __call__(
        self, logp_BR: Tensor, sampled_logp_BR: Tensor, advantage_BR: Tensor, mask_BR: Tensor, **named: Any
    ) -> PolicyLoss:
        """See `rlhf.ppo.objective.Loss`.

        Raises:
            ConfigError: it raised, or returned something else than a number with a gradient.
        """
        found = self.called(logp_BR, sampled_logp_BR, advantage_BR, mask_BR, **named)
        loss = found.loss if isinstance(found, PolicyLoss) else found
        if not isinstance(loss, Tensor) or loss.ndim > 0 or loss.requires_grad < logp_BR.requires_grad:
            has_gradient = isinstance(loss, Tensor) and loss.requires_grad
            raise self.error(
                "must return a tensor with one number that carries the gradient of logp_BR, and returned "
                f"{_described(loss, has_gradient=has_gradient)}."
            )
        if isinstance(found, PolicyLoss):
            return PolicyLoss(loss, *(figure.detach() for figure in found[1:]))
        return with_figures(loss, logp_BR, sampled_logp_BR, mask_BR)


def _described(value: object, *, has_gradient: bool) -> str:
    """A value in words, for an error. `has_gradient`: whether it has the gradient that it should."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"a tensor of {tuple(value.shape)}{'' if has_gradient else ' without a gradient'}"
