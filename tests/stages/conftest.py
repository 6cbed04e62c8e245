"""Data sets to prepare."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.jobs import TINY
from helpers.stages import Bench, ShorterBase
from rlhf.models.base import base_files


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> ShorterBase:
    def build(content: list[str], write: Callable[[Path], None]) -> Path:
        directory = tmp_path_factory.mktemp(content[0])
        write(directory)
        return directory

    files = base_files(TINY, "tiny", build)
    return ShorterBase(files.directory, files.identity, files.config)


@pytest.fixture
def bench(tmp_path: Path, base: ShorterBase) -> Bench:
    return Bench(tmp_path, base)
