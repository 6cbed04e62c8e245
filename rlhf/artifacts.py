"""The store: finished artifacts under their keys, published atomically, computed once.

Layout: STORE/STAGE/KEY/manifest.json beside the stage's files. A directory without a manifest is not an
artifact. KEY is a hash of the *recipe*: all that decides the content.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError

from rlhf.config import ConfigError

FORMAT = 1
KEY_LENGTH = 16

Recipe = dict[str, Any]


class Manifest(BaseModel):
    """What an artifact is, where it came from and what it measured."""

    model_config: ClassVar[ConfigDict] = ConfigDict(ser_json_inf_nan="strings")  # null would not come back

    format: int = FORMAT
    stage: str
    key: str
    recipe: Recipe
    config: dict[str, Any]
    """The whole resolved config of the run that made it."""
    metrics: dict[str, float]
    seconds: float
    created: str
    git_revision: str | None
    packages: dict[str, str]
    hardware: str
    tokenizer: str | None = None
    """Digest of tokenizer, chat template and special tokens, where the artifact holds one."""
    files: dict[str, str]
    """Relative path -> sha256."""
    made_from: dict[str, str] = {}
    """Stage -> digest of the content of its artifact that this one was made from."""


@dataclass(frozen=True)
class Artifact:
    """A finished directory in the store."""

    path: Path
    manifest: Manifest

    @property
    def key(self) -> str:
        """The hash it is stored under."""
        return self.manifest.key


def digest_of(value: Any) -> str:
    """sha256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def directory_digest(directory: Path) -> str:
    """sha256 over the names and bytes of all files below a directory."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return digest_of([[str(path.relative_to(directory)), file_digest(path)] for path in files])


def weights_digest(directory: Path) -> str:
    """sha256 over a saved model's weights and config: equal for equal models, whoever wrote them."""
    files = [directory / "config.json", *sorted(directory.glob("*.safetensors"))]
    return digest_of([[path.name, file_digest(path)] for path in files])


def leads_out(directory: Path, names: Iterable[str]) -> str | None:
    """The first of these names, or of the links below a directory, that lies elsewhere; None if none does."""
    root = directory.resolve()
    links = [str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_symlink()]
    return next((name for name in (*names, *links) if not (root / name).resolve().is_relative_to(root)), None)


def recipe_key(recipe: Recipe) -> str:
    """The name an artifact made by this recipe is stored under."""
    return digest_of(recipe)[:KEY_LENGTH]


class Store:
    """Artifacts shared by runs and sweep trials."""

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"store_dir={root}: cannot be created ({error.strerror}).") from None

    def find(self, stage: str, key: str) -> Artifact | None:
        """The finished artifact, or None.

        Raises:
            ConfigError: it is there but cannot be read: damaged, or written by another version.
        """
        path = self.root / stage / key
        if not path.parent.exists() or path not in path.parent.iterdir():
            return None  # listed, because NFS remembers for a while that a name was not there
        if not (path / "manifest.json").exists():
            return None
        try:
            manifest = Manifest.model_validate_json((path / "manifest.json").read_bytes())
        except ValidationError:
            raise ConfigError(f"{path}: its manifest.json cannot be read. Remove the directory.") from None
        if manifest.format != FORMAT:
            raise ConfigError(
                f"{path}: written in store format {manifest.format}, this version reads {FORMAT}. "
                "Use another store_dir or remove the directory."
            )
        outside = leads_out(path, manifest.files)
        if outside is not None:
            raise ConfigError(
                f"{path}: {outside} leads out of the directory. It was tampered with: remove it."
            )
        missing = [name for name in manifest.files if not (path / name).exists()]
        if missing:
            raise ConfigError(f"{path}: {missing[0]} is missing. Remove the directory; it is then made anew.")
        return Artifact(path, manifest)

    def lock(self, stage: str, key: str) -> FileLock:
        """Held while an artifact is made. The kernel frees it when its holder dies."""
        (self.root / stage).mkdir(exist_ok=True)
        return FileLock(self.root / stage / f".{key}.lock")

    def checkpoints(self, stage: str, key: str) -> Path:
        """Where a stage that is making the artifact keeps its checkpoints."""
        return self.root / stage / f".{key}.checkpoints"

    def checkpoint_bytes(self, stage: str, key: str) -> int:
        """What those take."""
        files = self.checkpoints(stage, key).rglob("*")
        return sum(path.stat().st_size for path in files if path.is_file())

    def scratch(self, stage: str, key: str) -> Path:
        """An empty directory to make the artifact in; call it under the lock only.

        What an interrupted attempt left is removed: holding the lock proves that nobody writes there.
        """
        for stale in (self.root / stage).glob(f".{key}.part-*"):
            shutil.rmtree(stale)
        path = self.root / stage / f".{key}.part-{uuid4().hex[:8]}"
        path.mkdir()
        return path

    def publish(self, scratch: Path, manifest: Manifest) -> Artifact:
        """Write the manifest, flush everything, and rename into place."""
        manifest.files = {
            str(path.relative_to(scratch)): file_digest(path)
            for path in sorted(scratch.rglob("*"))
            if path.is_file()
        }
        (scratch / "manifest.json").write_text(manifest.model_dump_json(indent=2), encoding="utf-8")
        for path in [*scratch.rglob("*"), scratch]:
            flush(path)
        final = self.root / manifest.stage / manifest.key
        replaced = final.with_name(f".{final.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)  # an interrupted publication left it
        if final.exists():  # force=[stage], or a directory without a manifest
            final.rename(replaced)
        scratch.rename(final)
        flush(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)  # on NFS it may still be read: the next one removes it
        return Artifact(final, manifest)

    def explain(self, stage: str, recipe: Recipe) -> str:
        """Why there is no artifact for this recipe: the difference to the most similar one there is."""
        differences: list[list[str]] = []
        for path in (self.root / stage).glob("[!.]*/manifest.json"):  # not what is being made
            with suppress(ValidationError):
                differences.append(_changes(Manifest.model_validate_json(path.read_bytes()).recipe, recipe))
        if not differences:
            return "none was made before"
        fewest = min(differences, key=len)
        return "; ".join(fewest)


def flush(path: Path) -> None:
    """Have the disk hold what was written to a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for name in sorted({*old, *new}):
        before, after, key = old.get(name), new.get(name), f"{prefix}{name}"
        if isinstance(before, dict) and isinstance(after, dict):
            lines += _changes(before, after, f"{key}.")
        elif before != after:
            lines.append(f"{key}: {before!r} -> {after!r}")
    return lines
