"""One engine for as many tests as possible: starting one takes long."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from helpers.models import sharper
from helpers.vllm import (
    LENGTHS,
    Engines,
    written,
)
from rlhf.generation.vllm import Vllm


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("tiny32"), head_dim=32)


@pytest.fixture
def model(directory: Path) -> PreTrainedModel:
    return sharper(directory)


@pytest.fixture(scope="module")
def engines() -> Iterator[Engines]:
    found = Engines()
    yield found
    found.close()


@pytest.fixture
def engine(engines: Engines) -> Vllm:
    return engines.get()


@pytest.fixture(scope="module")
def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 259, (length,), generator=generator) for length in LENGTHS]
