"""The optimizer of every stage: AdamW on fp32 masters, a linear schedule, clipping, learning-rate groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from rlhf.config import OptimConfig

COPIED = ("lr", "weight_decay", "eps")
"""What a schedule or a user changes in the outer parameter groups, and AdamW reads in the inner ones."""


class MasterAdamW(torch.optim.Optimizer):
    """AdamW whose state and master weights are fp32 while the model computes in its own dtype.

    Gradients are added up in fp32 as soon as autograd has finished with a parameter, so that accumulating
    many micro-batches loses nothing in bf16. `step` clips each group by its own norm (a critic's large
    gradients must not shrink the policy's) and is skipped, and counted, when a norm is not finite: one NaN
    would otherwise poison every parameter.
    """

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        super().__init__(list(groups), {})
        self._pairs: list[tuple[Tensor, Tensor]] = []
        inner_groups = []
        for group in self.param_groups:
            masters = []
            for parameter in group["params"]:
                master = parameter.detach().float().clone().requires_grad_(True)
                parameter.register_post_accumulate_grad_hook(_accumulate_into(master))
                self._pairs.append((parameter, master))
                masters.append(master)
            inner_groups.append({"params": masters, **{name: group[name] for name in COPIED}})
        self._inner = AdamW(inner_groups, fused=True)
        self.grad_norms: list[float] = []
        """Of the last step, one a group, before clipping."""
        self.skipped_steps = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Clip, update the masters, and round them into the model."""
        assert closure is None
        self.grad_norms = [
            float(nn.utils.clip_grad_norm_(inner["params"], outer["max_grad_norm"]))
            for outer, inner in zip(self.param_groups, self._inner.param_groups, strict=True)
        ]
        if not all(math.isfinite(norm) for norm in self.grad_norms):
            self.skipped_steps += 1
            self.zero_grad()
            return
        for outer, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            inner.update({name: outer[name] for name in COPIED})
        self._inner.step()
        for parameter, master in self._pairs:
            parameter.copy_(master)
        self.zero_grad()  # transformers' Trainer clears the model's gradients only, never the optimizer's

    @property
    def grad_norm(self) -> float:
        """The last step's, over all groups."""
        return math.hypot(*self.grad_norms)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of both copies."""
        super().zero_grad(set_to_none)
        self._inner.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Masters and moments."""
        return {
            "masters": [master.detach() for _, master in self._pairs],
            "adamw": self._inner.state_dict(),
            "groups": [{name: group[name] for name in COPIED} for group in self.param_groups],
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore masters, moments and the model's rounded copy."""
        for (parameter, master), saved in zip(self._pairs, state_dict["masters"], strict=True):
            master.copy_(saved)
            parameter.copy_(saved)
        self._inner.load_state_dict(state_dict["adamw"])
        for group, saved in zip(self.param_groups, state_dict["groups"], strict=True):
            group.update(saved)


def _accumulate_into(master: Tensor) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.detach()
        if master.grad is None:
            master.grad = gradient.float()
        else:
            master.grad.add_(gradient)
        parameter.grad = None

    return hook


def parameter_group(parameters: Iterable[nn.Parameter], config: OptimConfig) -> dict[str, Any]:
    """One learning-rate group of everything that trains."""
    return {
        "params": [parameter for parameter in parameters if parameter.requires_grad],
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "eps": config.eps,
        "max_grad_norm": config.max_grad_norm,
        "warmup_fraction": config.warmup_fraction,
    }


def make_optimizer(groups: Sequence[tuple[Iterable[nn.Parameter], OptimConfig]]) -> MasterAdamW:
    """One optimizer, each group of parameters with its own rate, epsilon and clipping."""
    return MasterAdamW([parameter_group(parameters, config) for parameters, config in groups])


def make_schedule(optimizer: MasterAdamW, num_steps: int) -> LambdaLR:
    """Linear warm-up over each group's own fraction, then linear decay that reaches 0 after the last step."""

    def factor_of(warmup: int) -> Callable[[int], float]:
        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            return max(0.0, (num_steps - step) / max(1, num_steps - warmup))

        return factor

    warmups = [round(num_steps * group["warmup_fraction"]) for group in optimizer.param_groups]
    return LambdaLR(optimizer, [factor_of(warmup) for warmup in warmups])


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter that trains."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_trainable(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put a `trainable_state` back."""
    parameters = dict(model.named_parameters())
    for name, value in state.items():
        parameters[name].copy_(value)


class WeightAverage:
    """An exponential moving average of the weights that train, in fp32."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model, self._decay = model, decay
        self._average = {name: value.float() for name, value in trainable_state(model).items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the current weights."""
        for name, value in self._model.named_parameters():
            if name in self._average:
                self._average[name].lerp_(value.float(), 1 - self._decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """While open, the model has the averaged weights."""
        current = trainable_state(self._model)
        load_trainable(self._model, self._average)
        try:
            yield
        finally:
            load_trainable(self._model, current)
