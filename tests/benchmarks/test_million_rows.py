"""The benchmark of many rows, with few."""

from __future__ import annotations

import pytest
from million_rows import main


@pytest.mark.nightly
def test_what_rows_take_is_measured() -> None:
    found = main(["--rows", "300", "--pairs", "100", "--model", "tiny"])
    assert found["tokens"] > 300 * 250 + 100 * 350  # a byte is a token
    assert found["all: seconds"] > 0 < found["all: peak MiB"]
    for peaks in found["ranks"]:
        assert {*peaks} == {"sft", "reward", "ppo"}
        assert max(peaks.values()) < 200


@pytest.mark.slow
def test_what_the_time_goes_into_is_measured() -> None:
    parts = main(["--rows", "2000", "--pairs", "100", "--model", "tiny", "--profile"])["parts"]
    assert set(parts) == {
        "tokenizing", "chat template", "parsing, checking, deduplicating", "ids and texts as columns",
        "reading, splitting, writing",
    }  # fmt: skip
    assert min(parts.values()) > 0.01
