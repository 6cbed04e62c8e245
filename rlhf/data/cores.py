"""A function over many pieces of work, on all cores."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

from rlhf.config import ConfigError

Piece = TypeVar("Piece")
Result = TypeVar("Result")

FEW = 4
"""So many pieces are not worth another process."""

_function: Callable[[Any], Any]
"""Of a worker."""


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
    # Forked, as roles, tokenizers and functions of the user's are objects that need not pickle.
    with ProcessPoolExecutor(num_cores, get_context("fork"), _begin, (function,)) as pool:
        waiting: deque[Future[Any]] = deque()
        try:
            for piece in chain(first, pieces):
                waiting.append(pool.submit(_call, piece))
                if len(waiting) > 2 * num_cores:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise ConfigError(
                "A process that works on rows was killed. The system does this when memory is short: give it "
                f"more, or let fewer than {num_cores} cores work (`taskset -c 0-3 python -m rlhf ...`)."
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _begin(function: Callable[[Any], Any]) -> None:
    """In a worker, before its first piece."""
    global _function
    _function = function
    signal.set_wakeup_fd(-1)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)  # what stops the run reaches the parent too, which ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent leaves nobody who would end its workers."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(piece: Any) -> Any:
    return _function(piece)
