"""Who computes what: dealt out by lengths alone, so every rank's part is known without asking it."""

from __future__ import annotations

import multiprocessing
import os
import random
import socket
import sys
import time
import traceback
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest
import torch
from accelerate import PartialState
from rich.console import Console

import rlhf.distributed.compute
from helpers.experiments import build
from helpers.jobs import on_cpu
from rlhf.cli.execute import LOST_PEER
from rlhf.cli.launcher import ranks_wanted
from rlhf.config import ConfigError
from rlhf.distributed.compute import Compute, MicroBatch, find_rank, leave_group, make_compute
from rlhf.distributed.device import choose_precision, has_gpu
from rlhf.distributed.shared_queue import SharedQueue
from rlhf.pipeline.runner import Pipeline
from rlhf.pipeline.settings import LaunchConfig

LENGTHS = {
    "alike": [7] * 12,
    "mixed": [3, 30, 1, 12, 12, 5, 9, 30, 2, 8, 17],
    "one": [4],
    "one_long": [400, 2, 2, 2, 2, 2],
    "many": [random.Random(0).randrange(1, 200) for _ in range(97)],
}
RANKS = [1, 2, 3, 4, 8]


def ranks(world_size: int) -> list[Compute]:
    return [on_cpu(rank, world_size) for rank in range(world_size)]


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("world_size", RANKS)
def test_shares_cover_everything_once_and_evenly(lengths: list[int], world_size: int) -> None:
    shares = [compute.shard_indices(lengths) for compute in ranks(world_size)]
    assert sorted(index for share in shares for index in share) == list(range(len(lengths)))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    tokens = [sum(lengths[index] for index in share) for share in shares]
    assert max(tokens) - min(tokens) <= max(lengths)  # the longest are dealt out, not heaped on one rank


def test_a_share_by_hand() -> None:
    lengths = [5, 9, 1, 9, 7]  # by falling length, ties in their order: 1, 3, 4, 0, 2
    assert [compute.shard_indices(lengths) for compute in ranks(2)] == [[1, 4, 2], [3, 0]]


def test_one_rank_collects_in_the_items_order() -> None:
    lengths = [5, 9, 1]
    compute = on_cpu()
    assert compute.shard_indices(lengths) == [1, 0, 2]
    assert compute.collect([f"item {index}" for index in compute.shard_indices(lengths)], lengths) == [
        "item 0", "item 1", "item 2",
    ]  # fmt: skip


def test_one_rank_takes_what_is_left() -> None:
    queue = SharedQueue(on_cpu(), "mine", 5)
    assert [[*queue.take(most)] for most in (2, 2, 2, 2)] == [[0, 1], [2, 3], [4], []]
    assert queue.is_empty
    assert SharedQueue(on_cpu(), "none", 0).is_empty


def everything(lengths: list[int], world_size: int, budget: int) -> list[list[MicroBatch]]:
    return [list(compute.micro_batches(lengths, budget)) for compute in ranks(world_size)]


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("world_size", RANKS)
@pytest.mark.parametrize("budget", [1, 40, 100_000])
def test_micro_batches_keep_their_promises(lengths: list[int], world_size: int, budget: int) -> None:
    found = everything(lengths, world_size, budget)
    counted = Counter(
        index for mine in found for each in mine if each.weight == 1.0 for index in each.indices
    )
    assert counted == dict.fromkeys(range(len(lengths)), 1)  # each row counts once, on one rank
    assert len({len(mine) for mine in found}) == 1  # sharded models move in step
    for mine in found:
        assert [each.last for each in mine] == [False] * (len(mine) - 1) + [True]
        for each in mine:
            assert each.weight in (0.0, 1.0)
            assert sum(lengths[index] for index in each.indices) <= budget or len(each.indices) == 1
            if each.weight == 0.0:  # as cheap as it can be
                assert [lengths[index] for index in each.indices] == [min(lengths)]


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("world_size", RANKS)
def test_a_rank_works_on_its_share(lengths: list[int], world_size: int) -> None:
    for compute in ranks(world_size):
        rows = [index for group, weight, _ in compute.micro_batches(lengths, 40) if weight for index in group]
        assert sorted(rows) == sorted(compute.shard_indices(lengths))


def test_micro_batches_by_hand() -> None:
    lengths = [2, 6, 3, 4, 1]  # by falling length: 1, 3, 2, 0, 4
    first, second = everything(lengths, 2, budget=6)
    assert first == [([1], 1.0, False), ([2, 4], 1.0, True)]  # 6; 3 + 1 tokens
    assert second == [([3, 0], 1.0, False), ([4], 0.0, True)]  # 4 + 2; the shortest row again, without weight
    first, second = everything([5, 2], 2, budget=2)
    assert (first, second) == ([([0], 1.0, True)], [([1], 1.0, True)])
    first, second, third = everything([5, 2], 3, budget=100)  # more ranks than rows
    assert third == [([1], 0.0, True)]


def test_rows_of_a_unit_are_on_one_rank_and_side_by_side() -> None:
    """Units are dealt by their longest row; one that is larger than a pass is cut."""
    lengths, units = [5, 1, 4, 4, 2, 3], [[0, 1, 2], [3, 4], [5]]
    first, second = (list(compute.micro_batches(lengths, 8, units)) for compute in ranks(2))
    assert first == [([0, 1], 1.0, False), ([2, 5], 1.0, True)]  # 5 + 1; 4 + 3 tokens
    assert second == [([3, 4], 1.0, False), ([1], 0.0, True)]  # and the shortest row without weight
    (whole,) = (list(compute.micro_batches(lengths, 100, units)) for compute in ranks(1))
    assert whole == [([0, 1, 2, 3, 4, 5], 1.0, True)]


def test_sizes_that_the_ranks_and_the_groups_can_share() -> None:
    (complaint,) = on_cpu(0, 6).uneven_batch("grpo.batch_episodes", 52, unit=4)
    assert complaint.fix == "Use 48 or 60."
    assert not [*on_cpu(0, 6).uneven_batch("grpo.batch_episodes", 48, unit=4)]


@pytest.mark.parametrize(
    ("value", "world_size", "advice"),
    [(100, 8, "Use 96 or 104."), (3, 8, "Use 8."), (9, 8, "Use 8 or 16."), (15, 2, "Use 14 or 16.")],
)
def test_a_batch_that_cannot_be_shared_equally(value: int, world_size: int, advice: str) -> None:
    (complaint,) = on_cpu(0, world_size).uneven_batch("ppo.batch_episodes", value)
    assert str(complaint) == (
        f"ppo.batch_episodes={value}: it cannot be divided equally over {world_size} ranks. {advice}"
    )


@pytest.mark.parametrize(("value", "world_size"), [(96, 8), (8, 8), (7, 1)])
def test_a_batch_that_can_be_shared(value: int, world_size: int) -> None:
    assert not [*on_cpu(0, world_size).uneven_batch("ppo.batch_episodes", value)]


TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "node0",
    "MASTER_PORT": "1234",
}  # fmt: skip
KUBERNETES = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
"""What the PyTorchJob operator sets: one process a pod, so no local rank."""
SRUN = {
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_TASKS_PER_NODE": "2(x2)",
    "MASTER_ADDR": "node0",
}  # fmt: skip


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("rlhf.cli.launcher.has_gpu", lambda: True)  # two GPUs, which a test machine lacks
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert ranks_wanted(LaunchConfig(processes=None), "auto") == 2
    assert ranks_wanted(LaunchConfig(processes=4), "cpu") == 4
    with pytest.raises(ConfigError, match=r"launch\.processes=3: this machine has 2 visible GPU"):
        ranks_wanted(LaunchConfig(processes=3), "auto")


def test_alone_there_is_one_rank() -> None:
    environment: dict[str, str] = {"HOME": "/"}
    assert find_rank(environment) == (0, 1)
    assert environment == {"HOME": "/"}


def test_torchrun_is_believed_in_everything() -> None:
    environment = dict(TORCHRUN)
    assert find_rank(environment) == (5, 8)
    assert environment == TORCHRUN


def test_a_kubernetes_pod_takes_its_first_device() -> None:
    environment = dict(KUBERNETES)
    assert find_rank(environment) == (1, 2)
    assert environment == KUBERNETES | {"LOCAL_RANK": "0"}


def test_torchrun_inside_a_slurm_step_counts_more() -> None:
    assert find_rank(SRUN | TORCHRUN) == (5, 8)


def test_a_single_slurm_task_is_no_group() -> None:
    assert find_rank({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}) == (0, 1)


def test_srun_without_an_address_is_told() -> None:
    environment = {name: value for name, value in SRUN.items() if name != "MASTER_ADDR"}
    with pytest.raises(ConfigError, match="srun started 4 tasks, but MASTER_ADDR is not set"):
        find_rank(environment)


WAITS_SECONDS = 2.0
"""What two ranks give each other, once they have met."""
LATE_SECONDS = 3.0
"""Longer than that. Ranks that sleep are late for real: being late is what is tested."""


def refuse() -> None:
    raise ConfigError("only rank 0 tried")


def refuse_late() -> None:
    time.sleep(LATE_SECONDS)
    refuse()


def take_long() -> str:
    time.sleep(LATE_SECONDS)
    return "made at last"


def models_read(compute: Compute, directory: Path, model: Path) -> list[str]:
    """The weights that this rank reads to know a local model by what it holds."""
    experiment = build("model=local", f"model.path={model}", f"store_dir={directory}/store", "stage=sft")
    read: list[str] = []
    sys.addaudithook(lambda event, details: read.append(str(details[0])) if event == "open" else None)
    Pipeline(experiment, "run", Console(quiet=True), compute)
    return [path for path in read if path.endswith(".safetensors")]


def share(compute: Compute) -> list[list[int]]:
    """What this rank takes from a queue of five: each one, then rank 0 more, then rank 1 of what is left."""
    queue = SharedQueue(compute, "five", 5)
    taken = []
    for rank, most in ((0, 1), (1, 1), (0, 2), (1, 4), (0, 1)):
        if compute.rank == rank:
            taken.append([*queue.take(most)])
        compute.barrier()
    queue.close()
    return taken


def share_in_step(compute: Compute) -> list[list[int]]:
    """What a group of two takes at the same turns; twice, by the name that is free again."""
    taken = []
    for _ in range(2):
        queue = SharedQueue(compute, "in step", 3, group_size=2)
        while not queue.is_empty:
            taken.append([*queue.take(2)])
        compute.barrier()
        queue.close()
        compute.barrier()
    return taken


def is_told_lost(compute: Compute) -> bool:
    """Whether the second rank of a group hears in time that the first one does not come to take anything."""
    store: Any = torch.distributed.distributed_c10d._get_default_store()  # torch's stub lacks its timeout
    patience, said = store.timeout, ""
    if compute.rank == 1:
        store.set_timeout(timedelta(seconds=0.2))
        with pytest.raises(RuntimeError) as raised:
            SharedQueue(compute, "alone", 3, group_size=2).take(1)
        said = str(raised.value)
        store.set_timeout(patience)
    compute.barrier()
    return LOST_PEER.search(said) is not None


def talk(rank: int, port: int, directory: Path, model: Path, results: Any) -> None:
    """What one of two ranks hears of the other."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )  # fmt: skip
    try:
        compute, how = make_compute("cpu", "fp32", timeout=60.0)
        mine = torch.tensor([1.0 + rank, -5.0 * rank])
        lengths = [5, 9, 1, 9, 7]
        failures = []
        rlhf.distributed.compute.TURN_SECONDS = 0.2
        torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=WAITS_SECONDS))
        for work in (refuse, refuse_late):
            try:
                compute.main_only(work)
            except ConfigError as error:
                failures.append(str(error))
        heard = {
            "how": how,
            "sum": compute.global_sum(mine).tolist(),
            "max": compute.global_max(mine).tolist(),
            "unchanged": mine.tolist(),
            "broadcast": compute.broadcast(f"from {rank}"),
            "main_only": compute.main_only(lambda: f"made by {rank}"),
            "main_only, for long": compute.main_only(take_long),
            "failures": failures,
            "listens": {
                each.laddr.ip for each in psutil.Process().net_connections() if each.status == "LISTEN"
            },
            "models read": models_read(compute, directory, model),
            "collected": compute.collect(
                [(index, rank) for index in compute.shard_indices(lengths)], lengths
            ),
            "shared": share(compute),
            "shared in step": share_in_step(compute),
            "told lost": is_told_lost(compute),
        }
        results.put((rank, heard))
        compute.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:  # the test shows what ended this rank
        results.put((rank, traceback.format_exc()))
        raise


def test_two_ranks_hear_the_same(tmp_path: Path, tiny_model: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [
        context.Process(target=talk, args=(rank, port, tmp_path, tiny_model, results), daemon=True)
        for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    heard = dict(results.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    expected = {
        "how": "fp32 on cpu (as configured), 2 ranks",
        "sum": [3.0, -5.0],
        "max": [2.0, 0.0],
        "broadcast": "from 0",
        "main_only": "made by 0",
        "main_only, for long": "made at last",
        "failures": ["only rank 0 tried"] * 2,
        "listens": {"127.0.0.1"},
        "collected": [(0, 1), (1, 0), (2, 0), (3, 1), (4, 0)],
        "shared in step": 2 * [[0, 1], [2]],
    }
    own: list[dict[str, Any]] = [{"unchanged": [1.0 + rank, -5.0 * rank]} for rank in range(2)]
    own[0]["models read"], own[1]["models read"] = [str(tiny_model / "model.safetensors")], []
    own[0]["shared"], own[1]["shared"] = [[0], [2, 3], []], [[1], [4]]
    own[0]["told lost"], own[1]["told lost"] = False, True
    assert heard == {rank: expected | own[rank] for rank in range(2)}


def test_device_and_precision_found_without_torch_are_those_that_torch_finds() -> None:
    assert has_gpu() == torch.cuda.is_available()
    devices: tuple[Literal["auto", "cpu"], ...] = ("auto", "cpu")
    for device in devices:
        PartialState._reset_state()
        compute, how = make_compute(device, "auto")
        assert compute.device == PartialState(cpu=device == "cpu").device
        name, why = choose_precision(str(compute.device))
        assert how == f"{name} on {compute.device.type} ({why})"
        assert compute.dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def test_a_cpu_rank_chooses_its_precision_as_a_single_cpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = choose_precision("cpu")
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    PartialState._reset_state()
    compute, how = make_compute("cpu", "auto", "zero2")
    try:
        assert how == f"{alone[0]} on cpu ({alone[1]}), zero2"
    finally:
        leave_group(compute)
        PartialState._reset_state()


def test_a_gpu_without_bf16_computes_in_fp32_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    name, why = choose_precision("cuda")
    assert (name, why) == ("fp32", "this GPU has no bf16, and fp16 is not offered")
