"""A checkpoint's files: the format, and a check that they are unchanged. Without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf.digests import MANIFEST, digest_of, file_digest, leads_out

CHECKPOINT_FORMAT = 4


def verified(checkpoint: Path) -> tuple[dict[str, Any] | None, str]:
    """The manifest of a checkpoint whose files are unchanged; otherwise None, and what is wrong."""
    try:
        manifest: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_bytes())
        if manifest["format"] != CHECKPOINT_FORMAT:
            return None, f"written in format {manifest['format']}, this version reads {CHECKPOINT_FORMAT}"
        if (
            digest_of({key: value for key, value in manifest.items() if key != "digest"})
            != manifest["digest"]
        ):
            return None, f"{MANIFEST} is not what was written"
        if manifest["name"] != checkpoint.name:
            return None, f"{MANIFEST} belongs to {manifest['name']}"
        outside = leads_out(checkpoint, manifest["files"])
        if outside is not None:
            return None, f"{outside} leads out of its directory"
        for name, digest in manifest["files"].items():
            if file_digest(checkpoint / name) != digest:
                return None, f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"{type(error).__name__}: {error}"
    return manifest, ""
