"""The price of a machine's time, and when a set-up has paid off."""

from __future__ import annotations

import math


def cost_of(seconds: float, price_per_hour: float) -> float:
    """Cost of a machine for some seconds."""
    return seconds / 3600 * price_per_hour


def break_even(setup: float, other_setup: float, saving: float) -> float:
    """Number of requests after which the total cost of the first method is no higher than that of the other.

    Solves setup + n * cost = other_setup + n * (cost + saving) for n.

    Args:
        saving: by how much a request is cheaper than with the other method.

    Returns:
        0 if the first method is never dearer; infinity if it is not cheaper in the long run.
    """
    dearer = setup - other_setup
    if dearer <= 0 and saving >= 0:
        return 0.0
    return dearer / saving if dearer > 0 and saving > 0 else math.inf


def break_even_interval(
    setup: float, other_setup: float, saving: tuple[float, float, float]
) -> tuple[float, float, float]:
    """`break_even` with its interval: value, low, high.

    Args:
        saving: by how much a request is cheaper, as value, low and high. The most it may save pays off first.
    """
    value, low, high = (break_even(setup, other_setup, each) for each in saving)
    return value, high, low
