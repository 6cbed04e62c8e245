"""torch's FSDP2 behind the engine's interface: weights, gradients and optimizer states sharded over ranks.

Zhao et al. 2023 (arXiv:2304.11277). `fully_shard` splits each parameter by its first dimension. A layer is a
unit: its weights are gathered before it runs, and freed after it.

With `zero=hsdp` the ranks of a node shard (`Compute.shard` of `num_shards`), and each node has a replica.
Gradients are averaged over the ranks that shard, then over the replicas. Replicas stay equal, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from rlhf.distributed.compute import Compute
from rlhf.training.engine import Access, Engine, Groups
from rlhf.training.optimizer import ClippedAdamW, parameter_group, round_into


class FsdpEngine(Engine):
    """A model sharded by FSDP2. Each rank trains fp32 masters of its shards and rounds them into the
    shards."""

    def __init__(self, model: nn.Module, groups: Groups, compute: Compute) -> None:
        super().__init__(compute, [config for _, config in groups])
        self.model = model
        names = _trained_names(model, groups)
        self._units = _shard_for_training(model, compute)
        sharded = dict(model.named_parameters())  # new parameters under the old names
        self._parameters = [sharded[name] for group in names for name in group]
        self._shards = [_local(parameter.detach()) for parameter in self._parameters]
        self._masters = [nn.Parameter(shard.float().clone()) for shard in self._shards]
        masters = iter(self._masters)
        self._optimizer = ClippedAdamW(
            [
                parameter_group([next(masters) for _ in group], config)
                for group, (_, config) in zip(names, groups, strict=True)
            ],
            lambda values: compute.global_sum(values) / compute.num_replicas,  # each shard counts once
        )

    def _param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._optimizer.param_groups
        return groups

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Multiply by the number of ranks: FSDP2 averages over ranks (in fp32), but our losses must be added
        up."""
        (loss * self.compute.world_size).backward()
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            if parameter.grad is None:
                continue
            gradient = _local(parameter.grad)
            if master.grad is None:
                master.grad = gradient.float()
            else:
                master.grad.add_(gradient)
            parameter.grad = None

    def step(self) -> None:
        """Clip by norms over all ranks, update this rank's masters, round them into its shards."""
        self._reshard()
        self._optimizer.grad_norms = []
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.grad_norms = self._optimizer.grad_norms
        if math.isfinite(self.grad_norm):
            self._round()
        else:
            self.skipped_steps += 1

    @contextmanager
    def gathered(self, module: nn.Module) -> Iterator[None]:
        """Gather the module's weights and everything outside the layers (all embeddings, also a critic's)."""
        within = [each for each in module.modules() if each is not self.model]
        with self.by_layers(module), _unsharded([each for each in within if isinstance(each, FSDPModule)]):
            yield

    @contextmanager
    def by_layers(self, module: nn.Module) -> Iterator[None]:
        """Gather everything outside the layers. The layers' own hooks gather the layers."""
        assert isinstance(self.model, FSDPModule)
        self.model._get_fsdp_state()._lazy_init()  # otherwise the first layer to run becomes the root
        self.model.unshard()
        try:
            yield
        finally:
            self.model.reshard()

    def gathered_weights(self, modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
        """Replace the shards by full copies of the weights."""
        return _gathered_weights(self._units, modules)

    def save_trained(self, module: nn.Module, directory: Path) -> None:
        """Drop the weights that a forward pass left gathered, then write from the shards."""
        self._reshard()
        super().save_trained(module, directory)

    def _full_weight(self, parameter: nn.Parameter, *, is_owner: bool) -> Tensor:
        assert isinstance(parameter, DTensor)
        return parameter.full_tensor().detach()

    def state(self) -> dict[str, Any]:
        """This rank's masters and moments, in a file of its own. Other replicas have the same."""
        if self.compute.replica:
            return {}
        shards = [
            {"master": master.detach(), **self._optimizer.state.get(master, {})} for master in self._masters
        ]
        return {f"fsdp-{self.compute.shard:05d}.pt": {"shards": shards, "skipped": self.skipped_steps}}

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        """Read this rank's rows of each state from the mapped files. Any number of ranks may have written
        them."""
        saved = [
            torch.load(file, weights_only=True, mmap=True, map_location="cpu")
            for file in sorted(directory.glob("fsdp-*.pt"))
        ]
        for index, (master, parameter) in enumerate(zip(self._masters, self._parameters, strict=True)):
            pieces = [each["shards"][index] for each in saved]
            start, _ = _rows(len(parameter), self.compute)
            copy_rows(master.data, [each.pop("master") for each in pieces], start)
            state = {name: value.clone() for name, value in pieces[0].items() if name == "step"}
            for name in pieces[0].keys() - state.keys():
                state[name] = torch.empty_like(master)
                copy_rows(state[name], [each[name] for each in pieces], start)
            if state:
                self._optimizer.state[master] = state
        self.skipped_steps = saved[0]["skipped"]
        self._reshard()
        self._round()

    @torch.no_grad()
    def _round(self) -> None:
        for parameter, shard, master in zip(self._parameters, self._shards, self._masters, strict=True):
            start, _ = _rows(len(parameter), self.compute)
            round_into(shard, master, start * (parameter.numel() // len(parameter)))

    def _reshard(self) -> None:
        """Free gathered weights. The root unit keeps its own after a forward pass without gradients."""
        for unit in self._units:
            unit.reshard()


def _trained_names(model: nn.Module, groups: Groups) -> list[list[str]]:
    """Names of the trained parameters in each group. Names hold no parameters, so sharding can free these one
    by one."""
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    return [[name_of[each] for each in parameters if each.requires_grad] for parameters, _ in groups]


def _shard_for_training(model: nn.Module, compute: Compute) -> list[FSDPModule]:
    """Shard the model into units: each layer, the modules of another dtype (an fp32 head), and the rest. All
    parameters of a unit must have one dtype."""
    mesh = _mesh(compute)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    layers = _layers(model)
    in_layers = {module for layer in layers for module in layer.modules()}
    other_dtype = [
        module
        for module in model.modules()
        if module not in in_layers
        and any(each.dtype != compute.dtype for each in module.parameters(recurse=False))
    ]
    with _loading_slices(model, compute):
        for layer in layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        if other_dtype:
            fully_shard(other_dtype, mesh=mesh, mp_policy=policy)  # one unit, because some share a parameter
        fully_shard(model, mesh=mesh, mp_policy=policy)
    return _units(model)


def _units(module: nn.Module) -> list[FSDPModule]:
    return [each for each in module.modules() if isinstance(each, FSDPModule)]


@contextmanager
def _unsharded(units: Sequence[FSDPModule]) -> Iterator[None]:
    """While open, the weights of these units stay gathered on each rank, whichever modules run."""
    try:
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(True, recurse=False)


@contextmanager
def _gathered_weights(units: Sequence[FSDPModule], modules: Sequence[nn.Module]) -> Iterator[None]:
    """While open, full copies of the modules' own weights, without submodules, replace the shards.

    Args:
        units: the units of the full model. A pass may have left them gathered.
    """
    for unit in units:
        unit.reshard()
    places = [(each, name, weight) for each in modules for name, weight in each._parameters.items()]
    try:
        for each, name, weight in places:
            if isinstance(weight, DTensor):
                each._parameters[name] = nn.Parameter(weight.full_tensor().detach(), weight.requires_grad)
        yield
    finally:
        for each, name, weight in places:
            each._parameters[name] = weight


def shard_frozen(model: nn.Module, compute: Compute) -> Access:
    """Shard a model that does not train: each layer, embedding and output layer is a unit."""
    mesh = _mesh(compute)
    for unit in (*_layers(model), *_separate_tables(model)):
        with _loading_slices(unit, compute):
            fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    for tensor in (*model.parameters(), *model.buffers()):  # norms and a scalar head are not sharded
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(compute.device)
    units = _units(model)
    return Access(lambda: _unsharded(units), nullcontext, lambda modules: _gathered_weights(units, modules))


def _separate_tables(model: nn.Module) -> list[nn.Module]:
    """Embeddings and linear modules outside the layers. A tied weight becomes two parameters, because a unit
    that runs separately cannot share one."""
    in_layers = {part for layer in _layers(model) for part in layer.modules()}
    outside = [part for part in model.modules() if part not in in_layers]
    tables: list[nn.Module] = [part for part in outside if isinstance(part, nn.Embedding | nn.Linear)]
    others = {
        weight for part in outside if part not in tables for weight in part.parameters(recurse=False)
    }  # a scalar head shares its weight with a linear module that does not run
    tables = [part for part in tables if others.isdisjoint(part.parameters())]
    seen: set[nn.Parameter] = set()
    for part in tables:
        for name, weight in list(part.named_parameters()):
            if weight in seen:
                setattr(part, name, nn.Parameter(weight.detach(), requires_grad=False))
            seen.add(weight)
    return tables


@contextmanager
def _loading_slices(module: nn.Module, compute: Compute) -> Iterator[None]:
    """While open, a module's weights are on the meta device, so that sharding reads none of them. At the end,
    each rank copies its rows of each weight to its device. From a mapped file it reads only these rows."""
    full_weights = {name: parameter.detach() for name, parameter in module.named_parameters()}
    shapes = {
        parameter: nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in module.parameters()
    }
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
            setattr(part, name, shapes[parameter])
    shapes.clear()
    yield
    module._apply(lambda each: torch.empty_like(each, device=compute.device) if each.is_meta else each)
    for name, parameter in module.named_parameters():
        shard, source = _local(parameter.detach()), full_weights.pop(name)
        start, rows = _rows(len(source), compute)
        shard.copy_(source[start:][:rows])


def _mesh(compute: Compute) -> DeviceMesh:
    """The mesh of the ranks: one dimension that shards; with several replicas, replicas come first."""
    if compute.num_replicas == 1:
        return init_device_mesh(compute.device.type, (compute.world_size,))
    shape, names = (compute.num_replicas, compute.num_shards), ("replicate", "shard")
    return init_device_mesh(compute.device.type, shape, mesh_dim_names=names)


def _rows(length: int, compute: Compute) -> tuple[int, int]:
    """The first row of a weight on this rank, and the most rows that it has. FSDP2 splits like
    torch.chunk."""
    rows = math.ceil(length / compute.num_shards)
    return compute.shard * rows, rows


def copy_rows(target: Tensor, pieces: Sequence[Tensor], start: int) -> None:
    """Fill a tensor with the rows from `start` on of the concatenated pieces. Only these rows are read."""
    offset, copied = 0, 0
    for piece in pieces:
        first, last = max(start, offset), min(start + len(target), offset + len(piece))
        if first < last:
            target[first - start : last - start] = piece[first - offset : last - offset]
            copied += last - first
        offset += len(piece)
    assert copied == len(target), f"{copied} of {len(target)} rows from {start} on"


def _local(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.to_local()


def _layers(model: nn.Module) -> list[nn.Module]:
    """The modules that transformers declares as not to be split, of every transformers model inside."""
    layers = []
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            names = set(part._no_split_modules or ())
            layers += [each for each in part.modules() if type(each).__name__ in names]
    return list(dict.fromkeys(layers))
