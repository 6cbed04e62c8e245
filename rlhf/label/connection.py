"""A connection to the labelling page that nobody can hold open for nothing, and short complaints."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_SECONDS = 10.0
"""Time for a request to come whole, but for its body."""
MOST_CONNECTIONS = 300
"""Open at a time. A process may open about 1000 files, and a run has others."""
AGAIN_SECONDS = 60.0
"""Time in which a complaint is not said again."""


class Connection(H11Protocol):
    """Of HTTP. It ends where no request comes, and where there are too many: those that have waited longest
    end first, so that somebody new is heard."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as the base
        """Wait for a request."""
        super().connection_made(transport)
        self._wait()
        there = [each for each in self.connections if not each.transport.is_closing()]
        if len(there) > MOST_CONNECTIONS:
            waiting = [each for each in there if isinstance(each, Connection) and each._timer is not None]
            min(waiting, key=lambda each: each._timer.when() if each._timer else 0.0).transport.close()

    def data_received(self, data: bytes) -> None:
        """A part of a request, or more."""
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._wait()
        else:
            self._end_wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """It ended."""
        super().connection_lost(exc)
        self._end_wait()

    def _wait(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(REQUEST_SECONDS, self.transport.close)

    def _end_wait(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class OneLine(logging.Handler):
    """Says a complaint in one line, without a traceback, and the same one not again for a while."""

    def __init__(self, say: Callable[[str], object]) -> None:
        super().__init__(logging.WARNING)
        self.say = say
        self.said: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """One of uvicorn's or asyncio's."""
        error: Any = record.exc_info[1] if record.exc_info else None
        what = record.getMessage().strip().partition("\n")[0]
        text = f"{what}: {type(error).__name__}: {error}" if error is not None else what
        now = time.monotonic()
        if now - self.said.get(text, -AGAIN_SECONDS) >= AGAIN_SECONDS:
            self.said = {name: then for name, then in self.said.items() if now - then < AGAIN_SECONDS}
            self.said[text] = now
            self.say(text)


@contextmanager
def one_line_complaints(say: Callable[[str], object]) -> Iterator[None]:
    """While open, uvicorn's and asyncio's complaints are said in one line each."""
    handler, loggers = OneLine(say), [logging.getLogger(name) for name in ("uvicorn.error", "asyncio")]
    before = [logger.propagate for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, propagates in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.propagate = propagates
