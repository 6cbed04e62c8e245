"""A model with its optimizer and learning rates, in full on every rank or sharded."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from rlhf.distributed.compute import Compute, MicroBatch
from rlhf.training.config import OptimConfig
from rlhf.training.optimizer import MasterAdamW, parameter_group, rate_factor
from rlhf.training.trained import TrainedFiles, owners

Part = TypeVar("Part")
Loss = Callable[[Part], tuple[Tensor, Mapping[str, Tensor]]]
"""A micro-batch -> its part of the loss, and its part of the sums for metrics. Losses are divided by global
counts, so the parts of all micro-batches and ranks add up to the loss of the batch."""
Groups = Sequence[tuple[Iterable[nn.Parameter], OptimConfig]]
Gather = Callable[[Sequence[nn.Module]], AbstractContextManager[None]]
"""Opens a context in which the own weights of modules, without submodules, are gathered on each rank."""


class Access(NamedTuple):
    """How to run a model, or read its weights. Each field opens a context for this."""

    alone: Callable[[], AbstractContextManager[None]] = nullcontext
    """Each rank runs the model independently, any number of times."""
    together: Callable[[], AbstractContextManager[None]] | None = None
    """Ranks that share the weights run the model equally often and gather layer by layer. None: each rank has
    the full model."""
    weights: Gather = lambda modules: nullcontext()
    """The own weights of some modules, without submodules, are gathered on each rank, to be copied."""

    @property
    def reading(self) -> Callable[[], AbstractContextManager[None]]:
        """The context for passes that all ranks make equally often. Sharded weights are gathered layer by
        layer."""
        return self.together or self.alone


FULL_MODEL = Access()
"""The access to a model that is complete on each rank, on the device where it runs."""


class Engine(ABC):
    """A model with its optimizer. One optimizer step is any number of calls of `backward` and one of `step`.

    All ranks make the same calls. Losses are divided by global counts, so gradients are *summed* over ranks
    and micro-batches.
    """

    model: nn.Module
    grad_norms: list[float]
    """Gradient norms of the last step: one per group, over all ranks, before clipping. If the step was
    skipped, not all of them are finite."""
    skipped_steps: int
    """Number of steps that were skipped because a gradient was not finite."""

    def __init__(self, compute: Compute, configs: Sequence[OptimConfig]) -> None:
        self.compute, self._configs = compute, list(configs)
        self.grad_norms, self.skipped_steps = [], 0

    @property
    def grad_norm(self) -> float:
        """The gradient norm of the last step, over all groups."""
        return math.hypot(*self.grad_norms)

    def set_rates(
        self, step: int, num_steps: int, *, first_steps: Mapping[int, int] = MappingProxyType({})
    ) -> list[float]:
        """Set each group's learning rate for `step` (counted from 0) by its schedule.

        Args:
            first_steps: group -> its first step, if that is later than 0. Its schedule covers the steps from
                there on. Before, its rate is 0, and its optimizer state stays new.
        """
        rates, waits = [], []
        for index, config in enumerate(self._configs):
            first = first_steps.get(index, 0)
            remaining = num_steps - first
            warmup = config.num_warmup_steps(remaining)
            factor = rate_factor(config.schedule, step - first, remaining, warmup)
            waits.append(step < first)
            rates.append(0.0 if waits[-1] else config.lr * factor)
        for group, rate, waiting in zip(self._param_groups(), rates, waits, strict=True):
            group.update(lr=rate, waits=waiting)
        return rates

    @abstractmethod
    def _param_groups(self) -> list[dict[str, Any]]: ...

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of the loss. `last`: the next call is `step`."""

    def backward_part(self, loss: Tensor) -> None:
        """Add the gradients of a loss that uses only a part of the model. `backward` of the rest must follow.

        So the graphs of the two parts are not in memory at the same time.
        """
        self.backward(loss, last=False)

    def accumulate(
        self,
        passes: Iterable[MicroBatch],
        part_of: Callable[[Sequence[int]], Part],
        *losses: Loss[Part],
        count: Callable[[float, Mapping[str, Tensor]], None],
    ) -> None:
        """Add up the gradients of a batch. `step` follows.

        Args:
            passes: this rank's micro-batches, from `Compute.micro_batches`.
            part_of: makes a micro-batch from the indices of its rows.
            losses: the backward pass of each is done before the next one is computed, so two graphs are
                never in memory together. Each uses its own part of the model.
            count: gets the weight of each micro-batch and its sums. The weight is 0 if a rank repeats a
                row.
        """
        *first, final = losses
        for rows, weight, last in passes:
            part, sums = part_of(rows), dict[str, Tensor]()
            for loss in first:
                value, figures = loss(part)
                self.backward_part(weight * value)
                sums |= figures
            value, figures = final(part)
            self.backward(weight * value, last=last)
            count(weight, {**sums, **figures})

    def learn(
        self,
        lengths: Sequence[int],
        part_of: Callable[[Sequence[int]], Part],
        loss: Loss[Part],
        micro_batch_tokens: int,
    ) -> dict[str, float]:
        """Learn a batch in one step. Each rank reads its own share of the rows.

        Args:
            lengths: tokens of each row of the batch.
            part_of: makes a micro-batch from the indices of its rows.
            loss: its sums are scalars, with the same names for each micro-batch.
            micro_batch_tokens: tokens per forward pass.

        Returns:
            The sums of the loss over all micro-batches and ranks; and `grad_norm`, before clipping.
        """
        totals: dict[str, Tensor] = {}

        def count(weight: float, sums: Mapping[str, Tensor]) -> None:
            for name, value in sums.items():
                totals[name] = weight * value.detach() + totals.get(name, 0.0)

        self.accumulate(self.compute.micro_batches(lengths, micro_batch_tokens), part_of, loss, count=count)
        self.step()
        sums = torch.stack([value.float() for value in totals.values()])
        global_sums = self.compute.global_sum(sums).tolist()
        return {**dict(zip(totals, global_sums, strict=True)), "grad_norm": self.grad_norm}

    @abstractmethod
    def step(self) -> None:
        """Clip each group by its own norm and update. If a norm is not finite, skip the step and count it."""

    @abstractmethod
    def gathered(self, module: nn.Module) -> AbstractContextManager[None]:
        """A context in which every rank can run a part of the model alone, for generation."""

    def by_layers(self, module: nn.Module) -> AbstractContextManager[None]:
        """A context in which all ranks run a part of the model equally often, outside the engine's own
        passes. Each layer is gathered while it runs."""
        return nullcontext()

    def gathered_weights(self, modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
        """A context in which every rank sees the full own weights of a few modules, without submodules."""
        return nullcontext()

    def save_trained(self, module: nn.Module, directory: Path) -> None:
        """Write the trained weights of a part of the model, for `load_trained`: each full weight, under its
        name in the part; tied weights once. Every rank calls it with the same directory.

        One weight at a time is gathered, and one rank writes it. So a rank holds at most one file's weights.
        """
        trained = [(name, each) for name, each in module.named_parameters() if each.requires_grad]
        sizes = [_elements(each) * each.element_size() for _, each in trained]
        directory.mkdir(exist_ok=True)
        files = TrainedFiles(directory, self.compute.rank)
        ranks = owners(sizes, self.compute.world_size)
        for (name, parameter), size, owner in zip(trained, sizes, ranks, strict=True):
            is_owner = owner == self.compute.rank
            if is_owner:
                with self.compute.busy():
                    files.make_room(size)
            weight = self._full_weight(parameter, is_owner=is_owner)
            if is_owner:
                files.add(name, weight)
            del weight
            self.compute.count_progress()
        with self.compute.busy():
            files.close()
        self.compute.barrier()

    @abstractmethod
    def _full_weight(self, parameter: nn.Parameter, *, is_owner: bool) -> Tensor:
        """One weight, gathered. Only the owner uses the result."""

    def state(self) -> dict[str, Any] | None:
        """The state that this rank saves: file -> content. It is the live state, not a copy. None if the
        engine saves in its own way."""
        return None

    def save(self, directory: Path) -> None:
        """Write everything that `load` needs. Every rank calls it with the same directory."""
        for name, content in (self.state() or {}).items():
            torch.save(content, directory / name)

    @abstractmethod
    def load(self, directory: Path) -> None:
        """Restore the state that `save` wrote."""


def _elements(parameter: nn.Parameter) -> int:
    """Elements of the full weight. A weight that DeepSpeed shards is empty itself."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


class PlainEngine(Engine):
    """The full model on every rank. Gradients are added up over ranks in fp32."""

    STATE = "optimizer.pt"

    def __init__(self, model: nn.Module, groups: Groups, compute: Compute) -> None:
        super().__init__(compute, [config for _, config in groups])
        self.model = model
        self.optimizer = MasterAdamW(
            [parameter_group(parameters, config) for parameters, config in groups],
            global_sum=compute.global_sum if compute.world_size > 1 else None,
        )

    def _param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the loss's gradients to the masters'."""
        loss.backward()

    def step(self) -> None:
        """Add up over ranks, clip, update the masters, round them into the model."""
        self.optimizer.step()
        self.grad_norms = self.optimizer.grad_norms
        self.skipped_steps = self.optimizer.skipped_steps

    def gathered(self, module: nn.Module) -> AbstractContextManager[None]:
        """An empty context: every rank has the full model."""
        return nullcontext()

    def _full_weight(self, parameter: nn.Parameter, *, is_owner: bool) -> Tensor:
        return parameter.detach()

    def state(self) -> dict[str, Any]:
        """Masters and moments, on rank 0 only: the other ranks have the same."""
        return {self.STATE: self.optimizer.state_dict()} if self.compute.is_main else {}

    def load(self, directory: Path) -> None:
        """Read the file of rank 0 on every rank."""
        state = torch.load(directory / self.STATE, weights_only=True, mmap=True, map_location="cpu")
        self.optimizer.load_state_dict(state)
        self.skipped_steps = self.optimizer.skipped_steps
