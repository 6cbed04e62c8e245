"""The optimizer of every stage: AdamW on fp32 masters, schedules, clipping, learning-rate groups."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from rlhf.training.config import OptimConfig, Schedule

COPIED_SETTINGS = ("lr", "eps")
"""Settings copied at each step from the outer parameter groups, which a schedule changes, to AdamW's own."""

NUM_THRESHOLDS, GOLDEN_STRIDE = 1 << 16, 40503
"""NUM_THRESHOLDS: number of thresholds for rounding to bf16, which is the number of fp32 steps in a bf16
step. GOLDEN_STRIDE: odd and near NUM_THRESHOLDS / golden ratio. So every threshold is used once, and
neighbours have distant thresholds."""

QUIET_NAN = 0x7FC00000
"""Larger bit patterns are set to this before rounding: CUDA's NaN, 0x7FFFFFFF, would become -0."""

UPPER_HALF = 1 if sys.byteorder == "little" else 0

BUCKET_ELEMENTS = 25_000_000
"""About how many gradient elements are added up over ranks at once: enough for few messages, and small
copies."""

SQUARED_ELEMENTS = 1 << 22
"""Elements of gradients that are squared at once, in double precision. This takes 64 MiB."""


class MasterAdamW(torch.optim.Optimizer):
    """AdamW with fp32 state and fp32 master weights. The model computes in its own dtype.

    Gradients of several micro-batches are added up in fp32, as soon as autograd has finished with a
    parameter. So no precision is lost to bf16. The gradients of a single micro-batch stay in bf16 until
    `step`, which takes half the memory. `step` clips each group by its own norm, because a critic's large
    gradients must not shrink the policy's. If a norm is not finite, the step is skipped and counted: one NaN
    would spoil every parameter.

    Args:
        groups: each from `parameter_group`: params, lr, decay, eps, max_grad_norm, and whether it waits for
            its first step.
        global_sum: sums a tensor over the ranks that hold the same parameters; None for a single rank.
    """

    def __init__(
        self, groups: Sequence[dict[str, Any]], global_sum: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__(list(groups), {})
        self._global_sum = global_sum
        self._pairs: list[tuple[Tensor, Tensor]] = []
        inner_groups = []
        for group in self.param_groups:
            masters = []
            for parameter in group["params"]:
                master = parameter.detach().to(torch.float32, copy=True).requires_grad_(True)
                master.grad_dtype = None  # any dtype
                parameter.register_post_accumulate_grad_hook(_accumulate_into(master))
                self._pairs.append((parameter, master))
                masters.append(master)
            inner_groups.append({"params": masters, **{name: group[name] for name in COPIED_SETTINGS}})
        self._inner = AdamW(inner_groups, weight_decay=0.0, fused=True)
        self.grad_norms: list[float] = []
        """Gradient norms of the last step: one per group, before clipping."""
        self.skipped_steps = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # without a loss
        """Clip, update the masters, and round them into the model."""
        assert closure is None
        for _, master in self._pairs:
            master.grad = None if master.grad is None else master.grad.float()
        if self._global_sum is not None:
            self._add_up_over_ranks(self._global_sum)
        self.grad_norms = [
            float(nn.utils.clip_grad_norm_(inner["params"], outer["max_grad_norm"]))
            for outer, inner in zip(self.param_groups, self._inner.param_groups, strict=True)
        ]
        if not all(math.isfinite(norm) for norm in self.grad_norms):
            # all ranks skip, because each has the same sums
            self.skipped_steps += 1
            self.zero_grad()
            return
        for outer, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            inner.update({name: outer[name] for name in COPIED_SETTINGS})
            decay(
                [master for master in inner["params"] if master.ndim > 1 and master.grad is not None], outer
            )
        self._inner.step()
        for outer, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            if outer["waits"]:
                reset_state(self._inner, inner["params"])
        for parameter, master in self._pairs:
            round_into(parameter, master)
        self.zero_grad()  # transformers' Trainer clears the model's gradients only, never the optimizer's

    def _add_up_over_ranks(self, global_sum: Callable[[Tensor], Tensor]) -> None:
        bucket: list[Tensor] = []
        gradients = [master.grad for _, master in self._pairs if master.grad is not None]
        for place, gradient in enumerate(gradients, 1):
            bucket.append(gradient)
            if place == len(gradients) or sum(each.numel() for each in bucket) >= BUCKET_ELEMENTS:
                total = global_sum(torch.cat([each.flatten() for each in bucket]))
                for each, part in zip(bucket, total.split([each.numel() for each in bucket]), strict=True):
                    each.copy_(part.view_as(each))
                bucket = []

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Remove the gradients of the model and of the masters."""
        super().zero_grad(set_to_none)
        self._inner.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Masters and moments."""
        return {
            "masters": [master.detach() for _, master in self._pairs],
            "adamw": self._inner.state_dict(),
            "skipped_steps": self.skipped_steps,
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore masters, moments and the model's rounded copy."""
        for (parameter, master), saved in zip(self._pairs, state_dict["masters"], strict=True):
            master.copy_(saved)
            round_into(parameter, master)
        self._inner.load_state_dict(state_dict["adamw"])
        for state in self._inner.state.values():  # copies: a checkpoint's tensors may be mapped from its file
            state.update({name: value.clone() for name, value in state.items()})
        self.skipped_steps = state_dict["skipped_steps"]


@torch.no_grad()
def round_into(parameter: Tensor, master: Tensor, start: int = 0) -> None:
    """Round fp32 masters into the weights that the model computes with.

    Numbers in bf16 are 0.4 to 0.8% apart, and weights start exactly on such numbers. With rounding to the
    nearest number, an update of less than half a step changes no weight, and training does nothing at first.
    Here each weight has its own threshold for rounding up. The thresholds are spread evenly from 0 to a full
    step, so all weights together follow their masters. A weight's threshold never changes, so no weight jumps
    back and forth. Values that bf16 has are kept exactly.

    Args:
        start: position of the first element in the full parameter, if this is a shard.
    """
    if parameter.dtype != torch.bfloat16:
        parameter.copy_(master)
        return
    bits = master.detach().flatten().view(torch.int32)
    upper = torch.empty_like(parameter, memory_format=torch.contiguous_format).view(torch.int16).view(-1)
    added = _thresholds(bits.device, start % NUM_THRESHOLDS)
    buffer = torch.empty_like(added)
    for begin in range(0, len(bits), len(added)):
        piece = bits[begin : begin + len(added)]
        total = torch.clamp(piece, max=QUIET_NAN, out=buffer[: len(piece)])
        total += added[: len(piece)]
        upper[begin : begin + len(added)] = total.view(torch.int16)[UPPER_HALF::2]
    parameter.copy_(upper.view(torch.bfloat16).view(parameter.shape))


@lru_cache(maxsize=4)
def _thresholds(device: torch.device, start: int) -> Tensor:
    """Numbers to add to the bits of masters (int32) before the lower half is cut off: all thresholds,
    repeated. Their count is the number of weights rounded at once: it fits a CPU's cache, and fills a GPU's
    kernels."""
    repeats = 4 if device.type == "cpu" else 64
    places = torch.arange(start, start + repeats * NUM_THRESHOLDS, device=device)
    return (places * GOLDEN_STRIDE + NUM_THRESHOLDS // 2).remainder_(NUM_THRESHOLDS).int()


class ClippedAdamW(AdamW):
    """AdamW on this rank's fp32 shards. It clips each group by its own norm over all ranks, like MasterAdamW.

    DeepSpeed's and torch's own clipping use one norm for all groups.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        global_sum: Callable[[Tensor], Tensor],
    ) -> None:
        placed = [{**group, "place": place} for place, group in enumerate(groups)]
        super().__init__(placed, weight_decay=0.0, fused=True)
        self._global_sum = global_sum
        self.num_matrix_elements: Sequence[int] | None = None
        """Per group, if each is one flat shard: number of elements of matrices, which come first. None: the
        parameters have their own shapes."""
        self.grad_norms: list[float] = []
        """Gradient norms from `step` since the list was emptied: one for each group with gradients."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # without a loss
        """Clip and update. If a norm is not finite, no weight changes."""
        assert closure is None
        for group in self.param_groups:
            gradients = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
            if not gradients:
                continue
            square = torch.stack([_square_sum(gradient) for gradient in gradients]).sum()
            norm = float(self._global_sum(square[None])) ** 0.5
            self.grad_norms.append(norm)
            factor = min(1.0, group["max_grad_norm"] / (norm + 1e-6))  # as torch's clip_grad_norm_
            for gradient in gradients:
                gradient.mul_(factor)
        if all(map(math.isfinite, self.grad_norms)):
            for group in self.param_groups:
                updated = [parameter for parameter in group["params"] if parameter.grad is not None]
                if self.num_matrix_elements is None:
                    decay([parameter for parameter in updated if parameter.ndim > 1], group)
                else:
                    decay(
                        [parameter[: self.num_matrix_elements[group["place"]]] for parameter in updated],
                        group,
                    )
            super().step()
            for group in self.param_groups:
                if group["waits"]:
                    reset_state(self, group["params"])


def _square_sum(values: Tensor) -> Tensor:
    """Sum of squares in double precision, piece by piece, because one tensor may be a full model."""
    pieces = values.flatten().split(SQUARED_ELEMENTS)
    return torch.stack([piece.double().square().sum() for piece in pieces]).sum()


def _accumulate_into(master: Tensor) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.detach()
        master.grad = gradient if master.grad is None else master.grad.float().add_(gradient)
        parameter.grad = None

    return hook


def decay(weights: Sequence[Tensor], group: Mapping[str, Any]) -> None:
    """AdamW's decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2).

    It is done here, not by torch's AdamW, so that only matrices decay while each group is clipped as one.
    Biases and the gains of norms have one dimension and do not decay.
    """
    if weights and group["decay"]:
        torch._foreach_mul_(list(weights), 1 - group["lr"] * group["decay"])


def reset_state(optimizer: AdamW, parameters: Iterable[Tensor]) -> None:
    """Reset AdamW's moments and its step count, which corrects their bias, to the state before the first
    step.

    Source: Kingma and Ba 2015, arXiv:1412.6980, section 3.
    """
    for parameter in parameters:
        for value in optimizer.state.get(parameter, {}).values():
            value.zero_()


def parameter_group(parameters: Iterable[nn.Parameter], config: OptimConfig) -> dict[str, Any]:
    """One optimizer group with the parameters that train."""
    return {
        "params": [parameter for parameter in parameters if parameter.requires_grad],
        "lr": config.lr,
        "decay": config.weight_decay,
        "eps": config.eps,
        "max_grad_norm": config.max_grad_norm,
        "waits": False,
    }


def rate_factor(schedule: Schedule, step: int, num_steps: int, warmup: int) -> float:
    """Factor of the learning rate in `step` (counted from 0): a linear warm-up, then the schedule. A decaying
    schedule reaches 0 one step after the last.

    Args:
        warmup: number of steps in which the factor rises.

    Source of cosine: Loshchilov and Hutter 2017 (arXiv:1608.03983), without restarts.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    left = max(0.0, (num_steps - step) / max(1, num_steps - warmup))
    match schedule:
        case "constant":
            return 1.0
        case "linear":
            return left
        case "cosine":
            return (1 - math.cos(math.pi * left)) / 2
