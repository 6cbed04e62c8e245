"""Ranks and how they share work; device and precision.

Every rank runs the same program with the same seeds and the same global batches. Only the lengths of a
batch's rows decide which rank gets which rows. So ranks need not ask each other, and the results do not
depend on the number of ranks, up to rounding.
"""

from __future__ import annotations

import math
import os
import pickle
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from pydantic import PositiveFloat

from rlhf.config import Complaint, ConfigError, Strict
from rlhf.distributed.batching import budget_batches
from rlhf.distributed.device import Precision, choose_precision, has_gpu, keep_freed_memory
from rlhf.distributed.signals import uninterrupted

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Zero = Literal["none", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2", "hsdp"]


class Sharding(NamedTuple):
    """What a value of `zero=` shards over the ranks, beside the optimizer's states."""

    library: Literal["deepspeed", "torch"] | None = None
    """The library that shards; None: nothing is sharded."""
    gradients: bool = False
    """Whether gradients are sharded."""
    weights: bool = False
    """Whether weights are sharded, those of frozen models too."""
    offloads: bool = False
    """Whether weights, gradients and optimizer states are in the host's memory."""
    within_node: bool = False
    """Whether each node has a full copy, sharded over its own ranks."""

    @property
    def is_zero3(self) -> bool:
        """Whether DeepSpeed shards the weights, not torch."""
        return self.library == "deepspeed" and self.weights


SHARDINGS: Mapping[Zero, Sharding] = {
    "none": Sharding(),
    "zero1": Sharding("deepspeed"),
    "zero2": Sharding("deepspeed", gradients=True),
    "zero3": Sharding("deepspeed", gradients=True, weights=True),
    "zero3_offload": Sharding("deepspeed", gradients=True, weights=True, offloads=True),
    "fsdp2": Sharding("torch", gradients=True, weights=True),
    "hsdp": Sharding("torch", gradients=True, weights=True, within_node=True),
}
LOOPBACK = "lo"
"""The loopback network interface, which no other host can reach."""
TURN_SECONDS = 1.0
"""Seconds between messages of rank 0 to the ranks that wait for it. `distributed.timeout` is longer."""
Result = TypeVar("Result")


class DistributedConfig(Strict):
    """`distributed.*`: how long ranks wait for each other."""

    timeout: PositiveFloat
    """Seconds that a rank waits for the others. Then the run ends and names the missing one."""


class MicroBatch(NamedTuple):
    """Rows of a batch for one forward pass of this rank."""

    indices: list[int]
    """Row indices in the whole batch."""
    weight: float
    """1; or 0 for a pass whose results do not count, which only keeps this rank in step with the others."""
    last: bool
    """Whether it is the last micro-batch of the batch."""


@dataclass(frozen=True)
class Compute:
    """Device, dtype and ranks. Device and dtype are stored as names, because importing torch is slow."""

    device_name: str
    """`cpu`, `cuda:0`, ..."""
    dtype_name: str
    """`bfloat16` or `float32`."""
    zero: Zero = "none"
    rank: int = 0
    world_size: int = 1
    node_ranks: int = 1
    """Ranks per node. The ranks of a node have consecutive numbers."""
    position: dict[str, Any] = field(default_factory=dict)
    """This rank's stage, step and number of `count_progress` calls. Shows which rank hangs."""
    timeout: float = 1800.0
    """Seconds that a rank waits for the others (`distributed.timeout`)."""

    @cached_property
    def device(self) -> torch.device:
        """The device of this rank's tensors."""
        import torch

        return torch.device(self.device_name)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and activations. Optimizers keep fp32 masters."""
        import torch

        found: torch.dtype = getattr(torch, self.dtype_name)
        return found

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    @property
    def shards_weights(self) -> bool:
        """Whether the weights are sharded, so that no rank has the whole model."""
        return SHARDINGS[self.zero].weights

    @property
    def uses_fsdp(self) -> bool:
        """Whether torch's FSDP2 shards the model, and not DeepSpeed."""
        return SHARDINGS[self.zero].library == "torch"

    @property
    def num_shards(self) -> int:
        """Number of ranks that share one copy of the model: with hsdp the ranks of a node, otherwise all."""
        return self.node_ranks if SHARDINGS[self.zero].within_node else self.world_size

    @property
    def shard(self) -> int:
        """Index of this rank among the ranks that share a copy."""
        return self.rank % self.num_shards

    @property
    def num_replicas(self) -> int:
        """Number of copies of the model: with hsdp one per node, otherwise one."""
        return self.world_size // self.num_shards

    @property
    def replica(self) -> int:
        """Index of the copy that this rank has a part of."""
        return self.rank // self.num_shards

    @property
    def loads_on(self) -> torch.device:
        """Device to load a model to before an engine takes it. An engine that shards weights copies this
        rank's slices from memory-mapped files. So neither the GPU nor the host holds a full model."""
        import torch

        return torch.device("cpu") if self.shards_weights else self.device

    def ask_once(self, work: Callable[[], Result]) -> Result:
        """The result of work that inspects a full model. If ranks shard weights, only rank 0 does the work
        and sends the result to the others.

        Raises:
            Exception: the error of `work`.
        """
        return self.main_only(work) if self.shards_weights else work()

    def count_progress(self) -> None:
        """Count one finished piece of work. Shows others that this rank does not hang."""
        self.position["moves"] = self.position.get("moves", 0) + 1

    @contextmanager
    def busy(self) -> Iterator[None]:
        """While open, this rank counts as alive even without progress, for example on a slow disk."""
        self.position["busy"] = True
        try:
            yield
        finally:
            self.position["busy"] = False

    @contextmanager
    def limited(self) -> Iterator[None]:
        """While open, the heartbeat ends this rank after `timeout` seconds without progress. For waits
        without a limit of their own, such as in an engine that ranks run together."""
        self.count_progress()
        self.position["limited"] = True
        try:
            yield
        finally:
            self.position["limited"] = False

    def global_sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over ranks."""
        from torch import distributed

        return self._reduced(values, distributed.ReduceOp.SUM)

    def global_max(self, values: Tensor) -> Tensor:
        """Element-wise maximum over ranks."""
        from torch import distributed

        return self._reduced(values, distributed.ReduceOp.MAX)

    def broadcast(self, value: Result) -> Result:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        from torch import distributed

        box = [value]
        distributed.broadcast_object_list(box, src=0)
        self.count_progress()
        return box[0]

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        import torch

        self.global_sum(torch.zeros(1))

    def main_only(self, work: Callable[[], Result]) -> Result:
        """Run `work` on rank 0, with no time limit. Every rank gets its result, or its error.

        Raises:
            Exception: the error of `work` on rank 0.
        """
        outcome: tuple[Any, Exception | None] | None = None  # None: not done yet
        if self.is_main:
            with self.others_waiting() if self.world_size > 1 else nullcontext():
                try:
                    outcome = (work(), None)
                except Exception as error:  # raised below, on every rank
                    outcome = (None, error if self.world_size == 1 else portable(error))
        while (received := self.broadcast(outcome)) is None:
            pass
        result, failure = received
        if failure is not None:
            raise failure
        return result  # type: ignore[no-any-return]  # it was pickled

    @contextmanager
    def others_waiting(self) -> Iterator[None]:
        """While open, rank 0 sends the others a message every second, so that none times out.

        The messages come from a second thread. The work stays in this thread, because only the main thread
        gets signals.
        """
        done = threading.Event()

        def send_messages() -> None:
            with suppress(RuntimeError):  # a rank is lost; the broadcast of the outcome will report it
                while not done.wait(TURN_SECONDS):
                    self.broadcast(None)

        sender = threading.Thread(target=send_messages, daemon=True)
        sender.start()
        try:
            yield
        finally:
            done.set()
            sender.join()

    def shard_indices(self, lengths: Sequence[int]) -> list[int]:
        """Indices of this rank's items: of all items sorted by decreasing length, every n-th, for n ranks."""
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        return order[self.rank :: self.world_size]

    def collect(self, mine: Sequence[Result], lengths: Sequence[int]) -> list[Result]:
        """The results of all items in order, on every rank. `mine` are the results for `shard_indices`."""
        indices = self.shard_indices(lengths)
        return self.collect_taken(dict(zip(indices, mine, strict=True)), len(lengths))

    def collect_taken(self, mine: Mapping[int, Result], count: int) -> list[Result]:
        """The results of all items in order, on every rank.

        Args:
            mine: index -> result of this rank's items. Several ranks may have the result of the same item.
            count: number of all items.
        """
        parts = [mine]
        if self.world_size > 1:
            from torch import distributed

            parts = [{} for _ in range(self.world_size)]
            distributed.all_gather_object(parts, dict(mine))
            self.count_progress()
        results = {index: result for part in parts for index, result in part.items()}
        return [results[index] for index in range(count)]

    def micro_batches(
        self, lengths: Sequence[int], max_tokens: int, units: Sequence[Sequence[int]] | None = None
    ) -> Iterator[MicroBatch]:
        """This rank's share of a batch, as micro-batches of at most max_tokens tokens.

        Every rank gets the same number of passes, because sharded models need all ranks in each pass. A rank
        with fewer passes repeats the batch's shortest row with weight 0.

        Args:
            units: all rows, in groups that should stay together; None if every row may go anywhere.
        """
        if units is None:
            units = [[index] for index in range(len(lengths))]
        order = sorted(units, key=lambda unit: -max(lengths[index] for index in unit))
        shortest = min(range(len(lengths)), key=lambda index: (lengths[index], -index))
        groups = []
        for rank in range(self.world_size):
            mine = [index for unit in order[rank :: self.world_size] for index in unit]
            groups.append(budget_batches(mine, lengths, max_tokens))
        count = max(len(each) for each in groups)
        filled = [(group, 1.0) for group in groups[self.rank]]
        filled += [([shortest], 0.0)] * (count - len(filled))
        for place, (group, weight) in enumerate(filled):
            yield MicroBatch(group, weight, place == count - 1)
            self.count_progress()

    def uneven_batch(self, key: str, value: int, unit: int = 1) -> Iterator[Complaint]:
        """A complaint if the ranks cannot share a batch equally, with the nearest sizes that fit. `unit`:
        sizes must also be multiples of it."""
        if value % self.world_size:
            step = math.lcm(self.world_size, unit)
            below = value // step * step
            fitting = f"{below} or {below + step}" if below else str(step)
            why = f"it cannot be divided equally over {self.world_size} ranks."
            yield Complaint(f"{key}={value}", why, f"Use {fitting}.")

    def _reduced(self, values: Tensor, operation: Any) -> Tensor:
        if self.world_size == 1:
            return values
        from torch import distributed

        total = values.detach().clone()
        distributed.all_reduce(total, op=operation)
        self.count_progress()
        return total


def portable(error: Exception) -> Exception:
    """The error, or a RuntimeError with the same text if the error cannot be sent to other ranks."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # a class can raise anything when pickled; the text is kept
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def make_compute(
    device: Literal["auto", "cpu"], precision: Precision, zero: Zero = "none", timeout: float = 1800.0
) -> tuple[Compute, str]:
    """Join the other ranks, if the environment names any. Choose device and precision.

    Returns:
        The compute object, and a text about the precision and the reason for it.
    """
    on_cpu = device == "cpu" or not has_gpu()
    rank, world_size = find_rank(os.environ)
    if on_cpu:
        keep_freed_memory()
    is_alone = on_cpu and world_size == 1 and zero == "none"  # then torch is not needed before a stage runs
    device_name = "cpu" if is_alone else _joined(on_cpu, rank, world_size, zero, timeout)
    kind = device_name.partition(":")[0]
    ranks = f", {world_size} ranks" if world_size > 1 else ""
    node_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) if world_size > 1 else 1
    if SHARDINGS[zero].within_node:
        check_nodes(rank, world_size, node_ranks)
    sharding = f", {zero}" if zero != "none" else ""
    if zero == "hsdp" and node_ranks == world_size:
        sharding += " (on one node it is fsdp2)"
    compute = Compute(device_name, "float32", zero, rank, world_size, node_ranks, timeout=timeout)
    # rank 0's choice on every rank: hosts may have other CPUs
    chosen = (
        (precision, "as configured") if precision != "auto" else compute.broadcast(choose_precision(kind))
    )
    name, reason = chosen
    compute = replace(compute, dtype_name={"bf16": "bfloat16", "fp32": "float32"}[name])
    return compute, f"{name} on {kind} ({reason}){ranks}{sharding}"


def check_nodes(rank: int, world_size: int, node_ranks: int) -> None:
    """Refuse nodes with different numbers of ranks, or with ranks that are not consecutive.

    Raises:
        ConfigError: the nodes are refused. Raised on every rank.
    """
    if world_size == 1:
        return
    from torch import distributed

    nodes: list[tuple[int, int]] = [(0, 0)] * world_size
    distributed.all_gather_object(nodes, (node_ranks, int(os.environ.get("LOCAL_RANK", rank % node_ranks))))
    numbers = sorted({number for number, _ in nodes})
    if len(numbers) > 1 or world_size % node_ranks:
        raise ConfigError(
            f"zero=hsdp: nodes have {' and '.join(map(str, numbers))} ranks, and each node must hold a whole "
            "model in equal shares. Start equally many ranks on every node, or use zero=fsdp2."
        )
    if any(place != index % node_ranks for index, (_, place) in enumerate(nodes)):
        raise ConfigError(
            "zero=hsdp: the ranks of a node do not follow each other. Start them in blocks (srun "
            "--distribution=block), or use zero=fsdp2."
        )


def _joined(on_cpu: bool, rank: int, world_size: int, zero: Zero, timeout: float) -> str:
    """Join the group of ranks, if there is one. Returns this rank's device."""
    with uninterrupted():
        import torch
        from accelerate import PartialState
        from torch import distributed

    on_one_host = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == world_size
    if on_one_host:  # for the backends' own sockets: by default they listen on the address of the host's name
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = LOOPBACK
    if world_size == 1 and zero != "none" and not distributed.is_initialized():
        store = distributed.HashStore()  # type: ignore[attr-defined]  # torch's stub lacks it
        distributed.init_process_group(  # sharding needs a group, even with one rank
            "gloo" if on_cpu else "cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1
        )
    if world_size > 1 and not distributed.is_initialized():
        if on_cpu and "OMP_NUM_THREADS" not in os.environ:
            local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
        time_limit = timedelta(seconds=timeout)
        # torchrun may have its own store, which its ranks find through the environment
        is_ours = on_one_host and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        distributed.init_process_group(
            "gloo" if on_cpu else "cpu:gloo,cuda:nccl",
            store=store_of_this_host(rank, world_size, time_limit) if is_ours else None,
            rank=rank,
            world_size=world_size,
            timeout=time_limit,
        )
    return str(PartialState(cpu=on_cpu).device)


def leave_group(compute: Compute) -> None:
    """Leave the group that `make_compute` joined."""
    if compute.world_size > 1 or compute.zero != "none":
        from torch import distributed

        deepspeed: Any = sys.modules.get("deepspeed")
        if deepspeed is not None and deepspeed.comm.is_initialized():
            deepspeed.comm.destroy_process_group()  # also DeepSpeed's own reference to the group
        elif distributed.is_initialized():
            distributed.destroy_process_group()
        if "RANK" not in os.environ:
            os.environ.pop("LOCAL_RANK", None)  # set by DeepSpeed; other libraries would use it


GROUP_NUMBERS = count()
"""Number of each group that this process joins, as in a sweep under torchrun. Each group needs its own file:
a rank may join the next group while another still has the file of the last one."""


def store_of_this_host(rank: int, world_size: int, timeout: timedelta) -> Any:
    """The rendezvous store for ranks of one host.

    It is a file in RLHF_MEETING, a directory that our launchers make and only this user can read. Without
    this variable it is MASTER_PORT of 127.0.0.1: no network reaches it, but every user of this host does.
    torch's default would listen on every address of the host.
    """
    from torch import distributed

    if "RLHF_MEETING" in os.environ:
        store = distributed.FileStore(  # type: ignore[attr-defined]  # torch's stub lacks it
            f"{os.environ['RLHF_MEETING']}/store{next(GROUP_NUMBERS)}", world_size
        )
        store.set_timeout(timeout)
        return store
    port, listening = int(os.environ["MASTER_PORT"]), None
    if rank == 0:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen()
        listening = listener.detach()  # from now on the store owns the socket
    return distributed.TCPStore(  # type: ignore[attr-defined]  # torch's stub lacks it
        "127.0.0.1", port, world_size, is_master=rank == 0, timeout=timeout, master_listen_fd=listening
    )


def find_rank(environment: MutableMapping[str, str]) -> tuple[int, int]:
    """(rank, world size) from the variables of torchrun, srun, Kubernetes or our own launcher; else (0, 1).

    Under srun, sets the variables that torch reads from those of SLURM.

    Raises:
        ConfigError: SLURM started several tasks, but MASTER_ADDR is not set.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        environment.setdefault("LOCAL_RANK", "0")
        return int(environment["RANK"]), int(environment["WORLD_SIZE"])
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1 and "SLURM_PROCID" in environment:
        if "MASTER_ADDR" not in environment:
            raise ConfigError(
                f"srun started {tasks} tasks, but MASTER_ADDR is not set, so they cannot find "
                "the first one. Set it to the first one's host, or use launch/slurm.sbatch, which does."
            )
        environment.setdefault("MASTER_PORT", "29500")
        environment.update(
            {
                "RANK": environment["SLURM_PROCID"],
                "WORLD_SIZE": str(tasks),
                "LOCAL_RANK": environment["SLURM_LOCALID"],
                "LOCAL_WORLD_SIZE": str(tasks_on_node(environment)),
            }
        )
        return int(environment["RANK"]), tasks
    return 0, 1


def tasks_on_node(environment: Mapping[str, str]) -> int:
    """Number of this srun step's tasks on this node. SLURM writes `4(x2),3` for two nodes with four tasks and
    one with three."""
    counts: list[int] = []
    for part in environment["SLURM_STEP_TASKS_PER_NODE"].split(","):
        count, _, repeat = part.partition("(x")
        counts += [int(count)] * int(repeat.rstrip(")") or 1)
    return counts[int(environment["SLURM_NODEID"])]
