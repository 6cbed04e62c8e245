"""DeepSpeed ZeRO behind the engine's interface. Only this module imports deepspeed.

Stage 1 shards optimizer states and masters over ranks, 2 also gradients, 3 also the weights (Rajbhandari et
al. 2020, arXiv:1910.02054). zero3_offload keeps all three in the host's memory.
"""

from __future__ import annotations

import logging
import os
import shutil
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import serialization

from rlhf.config import ConfigError
from rlhf.distributed.compute import SHARDINGS, Compute
from rlhf.training.engine import Access, Engine, Groups
from rlhf.training.optimizer import ClippedAdamW, parameter_group

TAG, UNIVERSAL = "zero", "zero_universal"
BUCKET_ELEMENTS, LIVE_ELEMENTS, PREFETCH_ELEMENTS, UNSHARDED_ELEMENTS = 5 * 10**8, 10**9, 5 * 10**7, 10**5
"""Upper limits, in elements: the gradients in one send buffer, the weights that stage 3 keeps gathered, the
weights that it gathers in advance, and the largest weight that it does not shard. They are DeepSpeed's
defaults, which would hold all of a small model on each rank."""


def bucket_elements(trained: int) -> int:
    """Gradients in one send buffer: a 16th of the `trained` parameters, or the upper limit."""
    return max(1, min(BUCKET_ELEMENTS, trained // 16))


def live_elements(total: int) -> int:
    """Weights that stage 3 keeps gathered: a 16th of the `total` parameters, or the upper limit."""
    return min(LIVE_ELEMENTS, total // 16)


def gather_settings(total: int) -> dict[str, int]:
    """DeepSpeed's settings for gathering the weights of a model with `total` parameters."""
    return {
        "stage3_max_live_parameters": live_elements(total),
        "stage3_max_reuse_distance": live_elements(total),
        "stage3_prefetch_bucket_size": min(PREFETCH_ELEMENTS, total // 32),
        "stage3_param_persistence_threshold": min(UNSHARDED_ELEMENTS, max(1000, total // 10_000)),
    }


class ZeroEngine(Engine):
    """A model sharded by DeepSpeed."""

    def __init__(
        self, model: nn.Module, groups: Groups, compute: Compute, *, universal: bool, in_turns: bool
    ) -> None:
        super().__init__(compute, [config for _, config in groups])
        trains = [[each for each in parameters if each.requires_grad] for parameters, _ in groups]
        matrices = [[each for each in group if each.ndim > 1] for group in trains]
        others = [[each for each in group if each.ndim < 2] for group in trains]
        self._client = ClippedAdamW(
            [
                parameter_group([*first, *then], config)
                for first, then, (_, config) in zip(matrices, others, groups, strict=True)
            ],
            compute.global_sum,
        )
        trained = sum(weight.numel() for group in self._client.param_groups for weight in group["params"])
        total = sum(weight.numel() for weight in model.parameters())
        config = zero_config(compute, trained, total) | {"checkpoint": {"load_universal": universal}}
        if in_turns:  # it would gather the weights that the last pass used, and discard them
            config["zero_optimization"]["stage3_prefetch_bucket_size"] = 0
        self._universal = universal
        self._waiting: list[Tensor] = []
        deepspeed = _deepspeed(compute)
        if compute.shards_weights:
            _read_slices(deepspeed, model, config, compute)
        self._engine, _, _, _ = deepspeed.initialize(
            model=model, optimizer=self._client, config=config, dist_init_required=False
        )
        self._sharded = self._engine.zero_optimization_partition_weights()
        self._client.num_matrix_elements = [
            self._num_matrix_elements(*group)
            for group in zip(matrices, others, self._client.param_groups, strict=True)
        ]
        _forget_running(model)
        # its gradient hooks hold it, and the garbage collector does not see that
        weakref.finalize(self, _destroy, self._engine).atexit = False
        self._engine.optimizer.check_grad_overflow = True  # fp32 would take a step with NaN
        self.model = self._engine

    def _num_matrix_elements(
        self, matrices: Sequence[nn.Parameter], others: Sequence[nn.Parameter], group: Mapping[str, Any]
    ) -> int:
        """Number of elements of matrices in this rank's shard of a group. The matrices come first.

        Stages 1 and 2 join a group's weights and cut the result into equal parts. Stage 3 cuts each weight.
        """
        if self._sharded:
            return sum(each.partition_numel() for each in matrices)  # type: ignore[attr-defined]  # DeepSpeed's
        (shard,) = group["params"]
        if not others:
            return len(shard)
        start = int(others[0].storage_offset()) - int((matrices or others)[0].storage_offset())
        return min(max(0, start - self.compute.rank * len(shard)), len(shard))

    def _param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._client.param_groups
        return groups

    def backward_part(self, loss: Tensor) -> None:
        """Hold the loss until `backward`. DeepSpeed needs all gradients at once: stage 3 would add late ones
        to the next step, and offloading would lose early ones."""
        self._waiting.append(loss)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Multiply by the number of ranks: DeepSpeed averages over ranks, but our losses must be added up."""
        loss = torch.stack([*self._waiting, loss]).sum()
        self._waiting = []
        self._engine.set_gradient_accumulation_boundary(is_boundary=last)
        self._engine.backward(loss * self.compute.world_size)
        if not last:
            self._engine.step()  # counts the micro-batch

    def step(self) -> None:
        """Update this rank's partition, and fetch the updates that it needs from the others."""
        self._client.grad_norms = []  # DeepSpeed calls the optimizer once per group
        self._engine.step()
        if self._engine.optimizer.overflow:
            self.skipped_steps += 1
            self.grad_norms = [float("nan")] * len(self._configs)
        else:
            self.grad_norms = self._client.grad_norms

    @contextmanager
    def gathered(self, module: nn.Module) -> Iterator[None]:
        """Gather the module's weights."""
        self._free_prefetched()
        with _gathered(self._engine.optimizer.parameter_offload, module) if self._sharded else nullcontext():
            yield

    def by_layers(self, module: nn.Module) -> AbstractContextManager[None]:
        """Let DeepSpeed's hooks gather. The hooks forget the order of modules from training, because the
        order of this pass is different."""
        if (
            self._sharded
            and not (
                coordinator := self._engine.optimizer.parameter_offload.param_coordinator
            ).is_invalid_trace()
        ):
            coordinator._invalidate_trace()
        return nullcontext()

    def gathered_weights(self, modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
        """Gather the weights on every rank."""
        self._free_prefetched()
        return _gathered_weights(modules) if self._sharded else nullcontext()

    def _free_prefetched(self) -> None:
        """Free the weights that the last pass gathered in advance: until then, no other code can gather
        them."""
        if not self._sharded:
            return
        parameters = self._engine.module.parameters()
        if any(each.ds_status.name != "NOT_AVAILABLE" for each in parameters if not each.ds_persist):
            self._engine.empty_partition_cache()

    def _full_weight(self, parameter: nn.Parameter, *, is_owner: bool) -> Tensor:
        if not self._sharded:
            return parameter.detach()
        import deepspeed

        self._free_prefetched()
        with deepspeed.zero.GatheredParameters([parameter]):  # frees it at the end
            return parameter.detach().to("cpu", copy=True) if is_owner else parameter.detach()

    def save(self, directory: Path) -> None:
        """Write each rank's partition into DeepSpeed's own files."""
        self._engine.save_checkpoint(
            str(directory), tag=TAG, client_state={"skipped": self.skipped_steps}, save_latest=True,
            exclude_frozen_parameters=True,
        )  # fmt: skip

    def load(self, directory: Path) -> None:
        """Restore this rank's partition. A checkpoint of another number of ranks is first made universal.

        Rank 0 does this. It copies one weight of one old rank at a time, and needs disk space for two more
        optimizer states. Then each rank reads its slice of each file.
        """
        tag = TAG
        settings: Any = serialization.config  # untyped in torch
        mmap_files = settings.patch({"load.mmap": self._universal})  # otherwise ranks read every file in full
        with only_tensors_and_numbers(), mmap_files:
            if self._universal:
                self.compute.main_only(lambda: to_universal(directory))
                tag = UNIVERSAL
            path, state = self._engine.load_checkpoint(str(directory), tag=tag, load_module_strict=False)
        assert path is not None, f"{directory}: DeepSpeed found nothing to load"
        if self._universal:
            self._repair_optimizer()
        self.skipped_steps = state["skipped"]

    def _repair_optimizer(self) -> None:
        """Repair the optimizer after DeepSpeed's universal loading for stage 3. It gives all groups the
        settings of the first one, and one shared step counter, which each group would advance."""
        for place, (group, config) in enumerate(zip(self._client.param_groups, self._configs, strict=True)):
            settings = parameter_group((), config) | {"place": place}
            group.update({name: value for name, value in settings.items() if name != "params"})
        for state in self._client.state.values():
            # fused AdamW needs the counter on the device of the moments
            device = state["exp_avg"].device
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=device).clone()


def zero_config(compute: Compute, trained: int, total: int) -> dict[str, Any]:
    """DeepSpeed's configuration for `zero=` and a model with `total` parameters, of which `trained` train."""
    stage = int(compute.zero.removeprefix("zero")[0])
    zero: dict[str, Any] = {
        "stage": stage,
        "sub_group_size": 10**12,  # no smaller groups: each parameter group is clipped as one
        "reduce_bucket_size": bucket_elements(trained),
        **gather_settings(total),
    }
    if SHARDINGS[compute.zero].offloads:
        zero |= {"offload_optimizer": host_offload(compute), "offload_param": host_offload(compute)}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # our loops count their own micro-batches
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW runs on the host without compilation
        "gradient_clipping": 0.0,  # ClippedAdamW does it; the default here is 1
        "steps_per_print": 10**9,
    }
    if compute.dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        config["communication_data_type"] = "fp32"  # otherwise gradients are added up over ranks in bf16
        if stage > 1:  # in stage 1 it selects another optimizer, which refuses a gradient of 0
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def host_offload(compute: Compute) -> dict[str, Any]:
    """DeepSpeed's settings for offloading to the host. Memory is pinned for GPUs, because this makes copies
    several times faster."""
    return {"device": "cpu", "pin_memory": compute.device.type == "cuda"}


@contextmanager
def _gathered(offload: Any, module: nn.Module) -> Iterator[None]:
    """While open, a module's weights are gathered. DeepSpeed's hooks are removed meanwhile, because they
    would shard it again.

    Args:
        offload: the `DeepSpeedZeRoOffload` of the model that the module is a part of.
    """
    import deepspeed

    for parameter in offload.module.parameters():
        parameter.ds_active_sub_modules.clear()
    for hook in (*offload.forward_hooks, *offload.backward_hooks):
        hook.remove()
    offload.forward_hooks, offload.backward_hooks = [], []
    try:
        with deepspeed.zero.GatheredParameters(list(module.parameters())):
            yield
    finally:
        offload._register_deepspeed_module(offload.module)


def _gathered_weights(modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
    """While open, the own weights of these modules, without submodules, are gathered on every rank."""
    import deepspeed

    weights = [weight for each in modules for weight in each.parameters(recurse=False)]
    gathered: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(weights)
    return gathered


def _destroy(engine: Any) -> None:
    """Remove all references to an engine from DeepSpeed's hooks and caches, so that it can be freed. The
    error of a stop may hold an engine longer than its process group: then the process ends, and nothing is
    done."""
    from deepspeed import comm
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Order

    if not comm.is_initialized():
        return
    engine.destroy()
    cached: Any = vars(Order)["_PartitionedParameterCoordinator__params_to_release"]
    for each in (cached, *(cell.cell_contents for cell in cached.__closure__ or ())):  # may be decorated
        if hasattr(each, "cache_clear"):
            each.cache_clear()


def _forget_running(model: nn.Module) -> None:
    """Remove a model from DeepSpeed's list of running modules, which would hold it until the process ends."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    FWD_MODULE_STACK[:] = [each for each in FWD_MODULE_STACK if each is not model]


def shard_frozen(model: nn.Module, compute: Compute) -> Access:
    """Shard a model that does not train (ZeRO-3 inference)."""
    total = sum(weight.numel() for weight in model.parameters())
    stage3: dict[str, Any] = {"stage": 3, **gather_settings(total)}
    if "offload" in compute.zero:
        stage3["offload_param"] = host_offload(compute)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": stage3, "steps_per_print": 10**9}
    if compute.dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True}
    deepspeed = _deepspeed(compute)
    _read_slices(deepspeed, model, config, compute)
    engine, *_ = deepspeed.initialize(model=model, config=config, dist_init_required=False)
    engine.eval()
    _forget_running(model)
    offload = engine.optimizer
    # it records the order of modules, which changes from pass to pass, and keeps weights for the next pass
    offload.fwd_pre_hook.remove()
    return Access(lambda: _gathered(offload, model), nullcontext, _gathered_weights)


def _read_slices(deepspeed: Any, model: nn.Module, config: Mapping[str, Any], compute: Compute) -> None:
    """Shard weights as DeepSpeed does, but each rank copies its slices to its device. From a mapped file it
    reads only these slices. DeepSpeed's own way is that rank 0 sends every full weight."""

    class FromThisRank(deepspeed.zero.Init):  # type: ignore[misc]  # untyped
        def _convert_to_zero_parameters(self, parameters: Iterable[nn.Parameter]) -> None:
            for each in parameters:
                if compute.dtype == torch.bfloat16:  # also a critic's head, as DeepSpeed does
                    each.data = each.data.bfloat16()
                self._convert_to_deepspeed_param(each)
                each.partition()  # type: ignore[attr-defined]  # DeepSpeed's
                each.data = each.data.to(compute.device)  # empty, but gathered on this device

    FromThisRank(module=model, config_dict_or_path=dict(config))
    for buffer in model.buffers():
        buffer.data = buffer.data.to(compute.device)


@contextmanager
def only_tensors_and_numbers() -> Iterator[None]:
    """While open, DeepSpeed's files may hold only tensors and numbers, although it reads them with
    torch.load(weights_only=False)."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals(
            [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
        ):
            yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


def to_universal(directory: Path) -> None:
    """Convert a checkpoint so that any number of ranks can read it; within `only_tensors_and_numbers`."""
    import argparse

    from deepspeed.checkpoint.ds_to_universal import main

    shutil.rmtree(directory / UNIVERSAL, ignore_errors=True)  # the manifest does not cover its files
    main(
        argparse.Namespace(
            input_folder=str(directory / TAG), output_folder=str(directory / UNIVERSAL),
            num_extract_workers=1, num_merge_workers=1, keep_temp_folder=False, strict=True,
            inject_missing_state=True,
        )
    )  # fmt: skip


def _deepspeed(compute: Compute) -> Any:
    if compute.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")  # needed even for one rank without a launcher
    try:
        import deepspeed
    except ImportError:
        raise ConfigError(f"zero={compute.zero} needs DeepSpeed: pip install -e '.[deepspeed]'.") from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns that ClippedAdamW is not its own
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # otherwise first use compiles it
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed
