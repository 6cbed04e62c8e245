"""What an answer costs, what was paid before the first one, and when that has paid off."""

from __future__ import annotations

import math
from pathlib import Path

from rlhf.models.peft.saved import base_of


def cost_of(seconds: float, price_per_hour: float) -> float:
    """What a machine costs for so long."""
    return seconds / 3600 * price_per_hour


def break_even(setup: float, per_request: float, other_setup: float, other_per_request: float) -> float:
    """After how many requests the first way has cost as little as the other in total.

    Solves setup + n * per_request = other_setup + n * other_per_request for n; in money, or in seconds of
    one machine.

    Returns:
        0 where it is no dearer from the first request on, infinity where it never is for good.
    """
    dearer, saving = setup - other_setup, other_per_request - per_request
    if dearer <= 0 and saving >= 0:
        return 0.0
    if dearer > 0 and saving > 0:
        return dearer / saving
    return math.inf


def model_bytes(directory: Path) -> int:
    """Bytes of what answers: a plain model, without the adapter that is merged into it; or an adapter and its
    base model."""
    base = base_of(directory)
    if base is None:
        return sum(path.stat().st_size for path in directory.iterdir() if path.is_file())
    own = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    return own + model_bytes(base)
