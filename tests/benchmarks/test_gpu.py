"""The benchmark for GPUs, with a tiny model on this machine, and TRL's GRPO beside it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_a_tiny_model_and_its_peer_run(tmp_path: Path) -> None:
    small = ("--sizes", "tiny", "--steps", "2", "--episodes", "8", "--new-tokens", "8")
    command = [
        sys.executable,
        str(SCRIPT),
        *small,
        "--peer-python",
        sys.executable,
        "--directory",
        str(tmp_path),
    ]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    row = result.stdout.splitlines()[-1].split()
    assert row[0] == "tiny" and len(row) == 9
    assert all(float(value) > 0 for value in (*row[1:4], *row[5:]))
