"""A launcher touches nothing of a run directory that another run holds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rlhf.cli.launcher import launch, ranks_wanted
from rlhf.config import ConfigError
from rlhf.pipeline.run import Run
from rlhf.pipeline.settings import LaunchConfig


@pytest.mark.parametrize("lock", [".lock", ".launcher.lock"])
def test_the_ranks_files_of_a_run_that_goes_on_are_left_alone(tmp_path: Path, lock: str) -> None:
    errors = tmp_path / "ranks" / "rank0.err"
    errors.parent.mkdir()
    errors.write_text("why it failed")
    with (
        Run(tmp_path).locked(lock),  # of rank 0; of the launcher, before its ranks are up
        pytest.raises(
            ConfigError, match=rf"run_name={tmp_path.name}: another run is .*\(pid {os.getpid()} on"
        ),
    ):
        launch({}, tmp_path, 2)
    assert errors.read_text() == "why it failed"


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"runs_dir=.*file: .* cannot be written"):
        launch({}, tmp_path / "file" / "run", 2)


def test_more_ranks_than_the_memory_can_hold_are_not_started() -> None:
    config = LaunchConfig(processes=100_000)
    with pytest.raises(ConfigError, match=r"launch\.processes=100000: a rank needs about .* Use fewer ranks"):
        ranks_wanted(config, "cpu")
    assert ranks_wanted(LaunchConfig(processes=2), "cpu") == 2
