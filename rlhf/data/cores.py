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
from rlhf.distributed.compute import portable
from rlhf.distributed.signals import STOP_SIGNALS, uninterrupted

Piece = TypeVar("Piece")
Result = TypeVar("Result")

MIN_PIECES = 4
"""With fewer pieces no worker is started."""

LOOK_SECONDS = 0.1
"""Longest time from a signal until it stops the wait for a result."""

GARBAGE_THRESHOLD = 100_000
"""New objects after which a worker's garbage collector runs."""
STOP = signal.SIGALRM
"""The signal from a worker's second thread to its first one."""

_function: Callable[[Any], Any]
_stopped: Connection
_is_working = False
"""State of a worker process. `_stopped` becomes readable when the parent wants no more results."""


def on_all_cores(function: Callable[[Piece], Result], pieces: Iterable[Piece]) -> Iterator[Result]:
    """function(piece) for each piece, in order. Results do not depend on the number of cores.

    Pieces and results are pickled; the function is not, so it may hold anything. Only a few pieces are taken
    ahead of the results, so they need not fit into memory together.

    Raises:
        ConfigError: a worker was killed.
        Exception: the function's own error; a RuntimeError with its text if it cannot be pickled.
    """
    pieces, num_cores = iter(pieces), len(os.sched_getaffinity(0))
    first = list(islice(pieces, MIN_PIECES))
    if len(first) < MIN_PIECES or num_cores == 1:
        yield from map(function, chain(first, pieces))
        return
    stopped, stop = Pipe(duplex=False)
    # Forked: roles, tokenizers and functions of the user need not pickle.
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
            stop.send_bytes(b"stop")  # never read, so every worker sees it
            pool.shutdown(wait=True, cancel_futures=True)


def _result(future: Future[Result]) -> Result:
    """Wait for a result. A signal raises between two short waits: within one it could keep a lock that the
    pool's thread needs."""
    while True:
        with uninterrupted():
            if wait([future], LOOK_SECONDS).done:
                return future.result()


def _begin(function: Callable[[Any], Any], stopped: Connection) -> None:
    """In a worker, before its first piece."""
    global _function, _stopped
    _function, _stopped = function, stopped
    gc.freeze()  # the parent's objects would be searched again and again
    gc.set_threshold(GARBAGE_THRESHOLD)
    signal.set_wakeup_fd(-1)
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)  # the parent gets it too, and stops us
    signal.signal(STOP, _give_up)
    threading.Thread(target=_hear_parent, args=(threading.get_ident(),), daemon=True).start()


def _hear_parent(worker: int) -> None:
    """Wait until the parent wants no more results, or is killed: then this worker ends itself."""
    parent = parent_process()
    assert parent is not None
    if parent.sentinel in connection.wait([parent.sentinel, _stopped]):
        os._exit(1)
    signal.pthread_kill(worker, STOP)
    parent.join()
    os._exit(1)


def _give_up(signum: int, frame: FrameType | None) -> None:
    """Interrupt the function, but never the sending of a result: the parent would wait for its other half."""
    if _is_working:
        raise KeyboardInterrupt


def _call(piece: Any) -> Any:
    global _is_working
    _is_working = True
    try:
        if _stopped.poll():  # it came between two pieces
            raise KeyboardInterrupt
        return _function(piece)
    except Exception as error:  # any error of the function: the parent raises it
        if (sent := portable(error)) is error:
            raise
        raise sent from error  # whose traceback travels with it
    finally:
        _is_working = False
