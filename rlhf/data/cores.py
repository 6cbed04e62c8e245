"""A function over many pieces of work, on all cores."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing import Pipe, connection, get_context, parent_process
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any, TypeVar

from rlhf.config import ConfigError
from rlhf.distributed.signals import STOPPING, uninterrupted

Piece = TypeVar("Piece")
Result = TypeVar("Result")

FEW = 4
"""So many pieces are not worth another process."""

LOOK_SECONDS = 0.1
"""Longest time from a signal until it stops the wait for a result."""

GARBAGE = 100_000
"""New objects after which a worker looks for garbage among them."""
STOP = signal.SIGALRM
"""What a worker's second thread sends to its first one."""

_function: Callable[[Any], Any]
_stopped: Connection
_is_working = False
"""Of a worker. In `_stopped` there is something to read when the parent wants no more results."""


def on_all_cores(function: Callable[[Piece], Result], pieces: Iterable[Piece]) -> Iterator[Result]:
    """function(piece) of each piece, in their order. Results do not depend on the number of cores.

    Pieces and results travel between processes; the function does not, so it may hold anything. Only a few
    pieces are taken ahead of the results, so that they need not fit into memory together.

    Raises:
        ConfigError: a process was killed.
        Exception: what the function raised.
    """
    pieces, num_cores = iter(pieces), len(os.sched_getaffinity(0))
    first = list(islice(pieces, FEW))
    if len(first) < FEW or num_cores == 1:
        yield from map(function, chain(first, pieces))
        return
    stopped, stop = Pipe(duplex=False)
    # Forked, as roles, tokenizers and functions of the user's are objects that need not pickle.
    with (
        stopped,
        stop,
        ProcessPoolExecutor(num_cores, get_context("fork"), _begin, (function, stopped)) as pool,
    ):
        waiting: deque[Future[Any]] = deque()
        try:
            for piece in chain(first, pieces):
                with uninterrupted():  # the pool would forget the workers that it forks at the first piece
                    waiting.append(pool.submit(_call, piece))
                if len(waiting) > 2 * num_cores:
                    yield _result(waiting.popleft())
            while waiting:
                yield _result(waiting.popleft())
        except BrokenProcessPool:
            raise ConfigError(
                "A process that works on rows was killed. The system does this when memory is short: give it "
                f"more, or let fewer than {num_cores} cores work (`taskset -c 0-3 python -m rlhf ...`)."
            ) from None
        finally:
            stop.send_bytes(b"stop")  # they all see it, as nobody reads it
            pool.shutdown(wait=True, cancel_futures=True)


def _result(future: Future[Result]) -> Result:
    """A signal raises between two looks: within one it could leave a lock that the pool's thread needs."""
    while True:
        with uninterrupted():
            if wait([future], LOOK_SECONDS).done:
                return future.result()


def _begin(function: Callable[[Any], Any], stopped: Connection) -> None:
    """In a worker, before its first piece."""
    global _function, _stopped
    _function, _stopped = function, stopped
    gc.freeze()  # to look for garbage in what the parent had would take a tenth of the time
    gc.set_threshold(GARBAGE)
    signal.set_wakeup_fd(-1)
    for signum in STOPPING:
        signal.signal(signum, signal.SIG_IGN)  # what stops the run reaches the parent too, which stops us
    signal.signal(STOP, _give_up)
    threading.Thread(target=_hear_parent, args=(threading.get_ident(),), daemon=True).start()


def _hear_parent(worker: int) -> None:
    """Wait until the parent wants no more results, or is killed, which leaves nobody who would end us."""
    parent = parent_process()
    assert parent is not None
    if parent.sentinel in connection.wait([parent.sentinel, _stopped]):
        os._exit(1)
    signal.pthread_kill(worker, STOP)
    parent.join()
    os._exit(1)


def _give_up(signum: int, frame: FrameType | None) -> None:
    """Stop the piece, but not a result that is on its way: half of one would keep the parent waiting."""
    if _is_working:
        raise KeyboardInterrupt


def _call(piece: Any) -> Any:
    global _is_working
    _is_working = True
    try:
        if _stopped.poll():  # it came between two pieces
            raise KeyboardInterrupt
        return _function(piece)
    finally:
        _is_working = False
