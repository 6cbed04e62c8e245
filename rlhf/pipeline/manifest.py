"""Makes an artifact's manifest: the code and hardware that made it, its config and its inputs."""

from __future__ import annotations

import importlib.metadata
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf import __version__
from rlhf.digests import PACKAGES, Recipe, digest_of, file_digest
from rlhf.distributed.device import hardware
from rlhf.pipeline.store import Artifact, Manifest, recipe_key
from rlhf.tracking.tracker import Tracker

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def make_manifest(
    stage: str,
    recipe: Recipe,
    scratch: Path,
    *,
    config: dict[str, Any],
    metrics: Mapping[str, float],
    seconds: float,
    peak: float | None = None,
    num_ranks: int,
    input_digests: dict[str, str],
) -> Manifest:
    """The manifest of the artifact in `scratch`; the store adds the files.

    Args:
        config: the full resolved config of the run, without secrets.
        seconds: the time of all attempts.
        peak: see `Manifest.peak_bytes`.
        input_digests: stage -> `content_digest`.
    """
    tokenizer_files = {
        path.name: file_digest(path) for name in TOKENIZER_FILES if (path := scratch / name).exists()
    }
    return Manifest(
        stage=stage,
        key=recipe_key(recipe),
        recipe=recipe,
        config=config,
        metrics=dict(metrics),
        seconds=round(seconds, 2),
        peak_bytes=peak,
        tokenizer=digest_of(tokenizer_files) if tokenizer_files else None,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        git_revision=git_revision(),
        packages={"rlhf": __version__} | {name: importlib.metadata.version(name) for name in PACKAGES},
        hardware=hardware() + (f", {num_ranks} ranks" if num_ranks > 1 else ""),
        files={},
        input_digests=input_digests,
    )


def content_digest(artifact: Artifact) -> str:
    """Digest of all files of an artifact except the logs."""
    logs = (Tracker.METRICS, Tracker.SAMPLES)
    return digest_of({name: each for name, each in artifact.manifest.files.items() if name not in logs})


def git_revision() -> str | None:
    """The commit of the checkout that this package runs from, with a mark for uncommitted changes."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
        )  # fmt: skip
    except FileNotFoundError:  # no git on this machine
        return None
    return described.stdout.strip() or None
