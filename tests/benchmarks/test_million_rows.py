"""The benchmark of many rows, with few."""

from __future__ import annotations

import pytest
from million_rows import main


@pytest.mark.slow
def test_what_rows_take_is_measured() -> None:
    found = main(["--rows", "300", "--pairs", "100", "--model", "tiny"])
    assert found["tokens"] > 300 * 250 + 100 * 350  # a byte is a token
    assert found["all: seconds"] > 0 < found["all: peak MiB"]
    for peaks in found["ranks"]:
        assert {*peaks} == {"sft", "reward", "ppo"}
        assert max(peaks.values()) < 200
