"""Data sets to prepare."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

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


@pytest.fixture(scope="session")
def published(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where each policy lies: SFT equals the base model, PPO strayed from it."""
    directory = tmp_path_factory.mktemp("ppo")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(directory)
    return {"base": tiny_model, "sft": tiny_model, "ppo": directory}
