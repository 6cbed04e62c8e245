"""Connections to the labelling page, limited in time and number; and complaints in one line."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_SECONDS = 10.0
"""Time in which a request must arrive, without its body."""
MAX_CONNECTIONS = 300
"""Most open connections. A process may open about 1000 files, and a run needs others."""
REPEAT_SECONDS = 60.0
"""Time during which the same complaint is not repeated."""


class Connection(H11Protocol):
    """An HTTP connection. It closes if no request arrives in time. If there are too many connections, the one
    that has been idle longest closes, so that a new client is served."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as the base
        """Wait for a request, and close the longest idle connection if there are too many."""
        super().connection_made(transport)
        self._wait()
        open_now = [each for each in self.connections if not each.transport.is_closing()]
        if len(open_now) > MAX_CONNECTIONS:
            idle = [each for each in open_now if isinstance(each, Connection) and each._timer is not None]
            min(idle, key=lambda each: each._timer.when() if each._timer else 0.0).transport.close()

    def data_received(self, data: bytes) -> None:
        """Handle received bytes: a part of a request, or several requests."""
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._wait()
        else:
            self._end_wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer of a closed connection."""
        super().connection_lost(exc)
        self._end_wait()

    def _wait(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(REQUEST_SECONDS, self.transport.close)

    def _end_wait(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class OneLineHandler(logging.Handler):
    """Reports a complaint in one line, without a traceback, and does not repeat it for some time."""

    def __init__(self, say: Callable[[str], object]) -> None:
        super().__init__(logging.WARNING)
        self.say = say
        self.reported: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Report a record of uvicorn or asyncio."""
        error: Any = record.exc_info[1] if record.exc_info else None
        message = record.getMessage().strip().partition("\n")[0]
        text = f"{message}: {type(error).__name__}: {error}" if error is not None else message
        now = time.monotonic()
        if now - self.reported.get(text, -REPEAT_SECONDS) >= REPEAT_SECONDS:
            self.reported = {
                name: then for name, then in self.reported.items() if now - then < REPEAT_SECONDS
            }
            self.reported[text] = now
            self.say(text)


@contextmanager
def one_line_complaints(say: Callable[[str], object]) -> Iterator[None]:
    """While open, report each complaint of uvicorn and asyncio in one line."""
    handler, loggers = OneLineHandler(say), [logging.getLogger(name) for name in ("uvicorn.error", "asyncio")]
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
