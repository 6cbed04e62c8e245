"""Fixtures that many tests share."""

from __future__ import annotations

import gc
import os
import shutil
from pathlib import Path

import pytest

from helpers.chains import Chain, Outcome
from rlhf.cli.execute import set_up_libraries
from rlhf.models.base import _write_tiny

set_up_libraries()  # before a test imports them
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # TRL's trainers, which parity tests make themselves, send it


def pytest_collection_finish() -> None:
    """Libraries and collected tests stay: no search for garbage looks through them, as in a run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the random two-layer model of `model=tiny` and its byte-level tokenizer."""
    directory = tmp_path_factory.mktemp("tiny")
    _write_tiny(directory)
    return directory


@pytest.fixture(scope="session")
def _finished_chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Chain, Outcome, Path]:
    directory = tmp_path_factory.mktemp("finished")
    (directory / "chain").mkdir()
    chain = Chain(directory / "chain")
    outcome = chain.run()
    assert outcome.code == 0, outcome.err
    return chain, outcome, shutil.copytree(chain.directory, directory / "as-finished", symlinks=True)


@pytest.fixture(scope="session")
def finished_chain(_finished_chain: tuple[Chain, Outcome, Path]) -> tuple[Chain, Outcome]:
    """A small chain that has run once, on the tiny model; tests add runs to it, never remove anything."""
    return _finished_chain[:2]


@pytest.fixture(scope="session")
def as_finished(_finished_chain: tuple[Chain, Outcome, Path]) -> Path:
    """The directory of `finished_chain` as its one run left it, to copy: nobody changes anything in it."""
    return _finished_chain[2]
