"""Ranks of a test: processes that are started together (warm.py), and what each of them found."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from helpers.warm import check_warm, context
from rlhf.distributed.compute import make_compute

Work = Callable[..., Any]


def start_ranks(
    work: Work,
    ranks: int,
    *arguments: Any,
    timeout: float,
    seconds: float,
    lost: Collection[int] = (),
) -> Callable[[], dict[int, Any]]:
    """Start ranks that call `work(compute, *arguments)`.

    Args:
        timeout: how long a rank waits for another.
        seconds: how long the test waits for them all.
        lost: ranks that end without a result.

    Returns:
        Waits for them: rank -> what it returned, or its traceback. The rank that was done first comes first.
    """
    forked = context()
    results = forked.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [
        forked.Process(
            target=_rank,
            args=(rank, ranks, port, timeout, results, dict(os.environ), work, arguments),
            daemon=True,
        )
        for rank in range(ranks)
    ]
    for worker in workers:
        worker.start()

    def wait() -> dict[int, Any]:
        found = dict(results.get(timeout=seconds) for _ in range(ranks - len(lost)))
        for worker in workers:
            worker.join()
        return found

    return wait


def _rank(
    rank: int,
    ranks: int,
    port: int,
    timeout: float,
    results: Any,
    environment: Mapping[str, str],
    work: Work,
    arguments: tuple[Any, ...],
) -> None:
    check_warm()
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu",
    )  # fmt: skip
    torch.set_num_threads(1)
    try:
        compute, _ = make_compute("cpu", "fp32", timeout=timeout)
        results.put((rank, work(compute, *arguments)))
        compute.barrier()
    except BaseException:  # the test shows what ended this rank
        results.put((rank, traceback.format_exc()))
    finally:
        results.close()
        results.join_thread()
        os._exit(0)  # threads of the backend may wait for ranks that are lost


def each_case(cases: Sequence[Any], work: Callable[[Any], Any]) -> dict[Any, Any]:
    """Case -> what the work finds; an error names its case."""
    found = {}
    for case in cases:
        try:
            found[case] = work(case)
        except Exception as error:  # whatever the work raises: raised again, with its case
            error.add_note(str(case))
            raise
    return found
