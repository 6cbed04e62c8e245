"""The benchmark of a busy core runs, and leaves no process behind that keeps a core busy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import busy_core
import pytest


@pytest.mark.nightly
def test_each_setting_takes_its_steps_beside_each_number_of_busy_cores(tmp_path: Path) -> None:
    command = [sys.executable, busy_core.__file__, "--model=tiny", "--rounds=1", "--steps=1"]
    done = subprocess.run(
        [*command, "--directory", str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[0] for row in rows if row and row[0].isdigit()] == ["0", "1"]


def test_no_core_stays_busy() -> None:
    with busy_core.busy(2) as others:
        assert [other.poll() for other in others] == [None, None]
    assert all(other.returncode is not None for other in others)
