"""Times and counts as a reader says them."""

from __future__ import annotations

import pytest

from rlhf.printable import duration, quantity


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.0, "0 s"), (0.0012, "1.2 ms"), (0.35, "350 ms"), (1.2156, "1.22 s"), (59.0, "59 s"),
        (720.0, "12 min"), (4000.0, "66.7 min"), (5400.0, "1.5 h"), (11_520.0, "3.2 h"),
        (440_640.0, "5.1 days"), (0.9997, "1 s"), (1500 * 86_400.0, "1,500 days"),
    ],
)  # fmt: skip
def test_a_time_has_the_unit_that_one_would_say(seconds: float, said: str) -> None:
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0"), (850, "850"), (32_768, "32.8 thousand"), (1.2e6, "1.2 million"), (7.06e10, "70.6 billion"),
        (1.4e14, "140 trillion"), (999_700, "1 million"), (2e15, "2,000 trillion"),
    ],
)  # fmt: skip
def test_a_count_is_said_in_thousands_and_millions(count: float, said: str) -> None:
    assert quantity(count) == said
