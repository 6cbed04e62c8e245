"""What several tests of the labelling page need."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing

import pytest


@pytest.fixture
def port() -> Iterator[int]:
    """A free one."""
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        found = taken.getsockname()[1]
    yield found
