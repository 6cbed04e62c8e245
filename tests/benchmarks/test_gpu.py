"""The benchmark for GPUs, with a tiny model on this machine, and TRL's GRPO beside it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from helpers.vllm import needs_vllm

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


SMALL = ("--sizes", "tiny", "--steps", "2", "--episodes", "8", "--new-tokens", "8")


def printed(directory: Path, *options: str) -> list[list[str]]:
    """The words of each line."""
    command = [sys.executable, str(SCRIPT), *SMALL, *options, "--directory", str(directory)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=directory)
    assert result.returncode == 0, result.stderr
    return [line.split() for line in result.stdout.splitlines()]


@pytest.mark.slow
def test_a_tiny_model_and_its_peer_run(tmp_path: Path) -> None:
    *_, row = printed(tmp_path, "--peer-python", sys.executable)
    assert row[0] == "tiny" and len(row) == 9
    assert all(float(value) > 0 for value in (*row[1:4], *row[5:]))


@needs_vllm
@pytest.mark.slow
def test_a_tiny_model_is_sampled_from_by_vllm(tmp_path: Path) -> None:
    *lines, row = printed(tmp_path, "--generation", "vllm")
    assert row[0] == "tiny" and all(float(value) > 0 for value in row[1:4])
    assert [float(line[1]) > 0 for line in lines if line[:1] == ["sync"]] == [True]
