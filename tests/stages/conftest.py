"""Data sets to prepare."""

import pytest
from small_prepare import Bench, ShorterBase

from rlhf.models.base import ModelConfig, base_files


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    def build(content, write):
        directory = tmp_path_factory.mktemp(content[0])
        write(directory)
        return directory

    files = base_files(ModelConfig(kind="tiny"), "tiny", build)
    return ShorterBase(files.directory, files.identity, files.config)


@pytest.fixture
def bench(tmp_path, base):
    return Bench(tmp_path, base)
