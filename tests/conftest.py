"""Fixtures that many tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.models.load import _write_tiny


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the random two-layer model of `model=tiny` and its byte-level tokenizer."""
    directory = tmp_path_factory.mktemp("tiny")
    _write_tiny(directory)
    return directory
