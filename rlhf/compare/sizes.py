"""Size of a candidate's files."""

from __future__ import annotations

import re
from pathlib import Path

from rlhf.models.peft.saved import base_of

NOT_OF_MODEL = re.compile(r"\.jsonl$|^manifest\.json$")
"""Files of an artifact that no model needs: logs and the manifest."""


def model_bytes(directory: Path) -> int:
    """Bytes of a policy's files: of a plain model, without a subdirectory for its merged adapter; or of an
    adapter and its base model."""
    base = base_of(directory)
    files = directory.iterdir() if base is None else directory.rglob("*")
    own = sum(each.stat().st_size for each in files if each.is_file() and not NOT_OF_MODEL.search(each.name))
    return own if base is None else own + model_bytes(base)
