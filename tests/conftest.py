"""Fixtures that many tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_chain import Chain, Outcome

from rlhf.models.load import _write_tiny


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the random two-layer model of `model=tiny` and its byte-level tokenizer."""
    directory = tmp_path_factory.mktemp("tiny")
    _write_tiny(directory)
    return directory


@pytest.fixture(scope="session")
def finished_chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Chain, Outcome]:
    """A small chain that has run once, on the tiny model; tests add runs to it, never remove anything."""
    chain = Chain(tmp_path_factory.mktemp("chain"))
    outcome = chain.run()
    assert outcome.code == 0, outcome.err
    return chain, outcome
