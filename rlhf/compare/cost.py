"""Cost per answer, setup cost, and the number of requests after which the setup has paid off."""

from __future__ import annotations

import math
import re
from pathlib import Path

from rlhf.models.peft.saved import base_of


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


NOT_OF_MODEL = re.compile(r"\.jsonl$|^manifest\.json$")
"""Files of an artifact that no model needs: logs and the manifest."""


def model_bytes(directory: Path) -> int:
    """Bytes of a policy's files: of a plain model, without a subdirectory for its merged adapter; or of an
    adapter and its base model."""
    base = base_of(directory)
    files = directory.iterdir() if base is None else directory.rglob("*")
    own = sum(each.stat().st_size for each in files if each.is_file() and not NOT_OF_MODEL.search(each.name))
    return own if base is None else own + model_bytes(base)
