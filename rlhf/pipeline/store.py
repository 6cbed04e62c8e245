"""The store: finished artifacts under their keys, published atomically, computed once.

Layout: STORE/STAGE/KEY/manifest.json next to the stage's files. KEY is a hash of the *recipe*: everything
that decides the content. STORE/STAGE/.KEY.digests.json remembers the digests of files that were read, so
that an artifact is verified again without reading it.
"""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, ValidationError

from rlhf.config import Complaint, ConfigError
from rlhf.digests import (
    MANIFEST,
    Recipe,
    digest_of,
    directory_digest,
    file_digests,
    files_below,
    first_outside,
    flush,
)
from rlhf.disk import content_of, naming
from rlhf.locks import Lock
from rlhf.pipeline.why import Change, changes

FORMAT = 3
KEY_LENGTH = 16

INPUT_PREFIXES = ("model.", "data.", "external.", "inputs.")
"""Recipe entries with these prefixes describe what a stage reads, not its settings."""


class Manifest(BaseModel):
    """What an artifact is, where it came from and what it measured."""

    model_config: ClassVar[ConfigDict] = ConfigDict(ser_json_inf_nan="strings")  # null would not come back

    format: int = FORMAT
    stage: str
    key: str
    recipe: Recipe
    config: dict[str, Any]
    """The full resolved config of the run that made it."""
    metrics: dict[str, float]
    seconds: float
    """Time of all attempts."""
    peak_bytes: float | None = None
    """Memory of the rank that held most, in the last attempt: rlhf/distributed/peak.py."""
    created: str
    git_revision: str | None
    packages: dict[str, str]
    hardware: str
    tokenizer: str | None = None
    """Digest of tokenizer, chat template and special tokens, if the artifact holds a tokenizer."""
    files: dict[str, str]
    """Relative path -> sha256."""
    input_digests: dict[str, str] = {}
    """Stage (or `base`) -> digest of the content of its artifact that this one was made from."""
    digest: str = ""
    """sha256 of all the other fields; the store fills it in."""


@dataclass(frozen=True)
class Artifact:
    """A finished directory in the store."""

    path: Path
    manifest: Manifest

    @property
    def key(self) -> str:
        """The hash it is stored under."""
        return self.manifest.key


class DamagedError(ConfigError):
    """An artifact is not what was published. Nothing was loaded from it.

    `extra` names files in its directory that are not its own, if nothing else is wrong.
    """

    def __init__(self, path: Path, complaint: str, extra: Sequence[str] = ()) -> None:
        super().__init__(path, complaint, extra)
        self.path, self.complaint, self.extra = path, complaint, extra

    @property
    def complaints(self) -> list[Complaint | str]:
        """One sentence."""
        return [
            f"{self.path} is damaged: {self.complaint}. The next command that needs it sets it aside "
            "and rebuilds it. `python -m rlhf verify` checks the whole store."
        ]


def read_manifest(directory: Path) -> Manifest:
    """The manifest of an artifact.

    Raises:
        DamagedError: it is not what was written.
        ConfigError: it was written by another version.
    """
    try:
        with naming(directory / MANIFEST):
            values = json.loads(content_of(directory / MANIFEST))
        written_as = int(values["format"])
    except FileNotFoundError:
        raise DamagedError(directory, f"{MANIFEST} is missing") from None
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise DamagedError(directory, f"its {MANIFEST} is no regular file") from None
    except (ValueError, TypeError, KeyError):
        raise DamagedError(directory, f"its {MANIFEST} cannot be read") from None
    if written_as != FORMAT:
        raise ConfigError(
            f"{directory}: written in store format {written_as}, this version reads {FORMAT}. "
            "Use another store_dir, or remove the directory."
        )
    if values.get("digest") != _manifest_digest(values):
        raise DamagedError(directory, f"its {MANIFEST} is not what was written")
    try:
        return Manifest.model_validate(values)
    except ValidationError:
        raise DamagedError(directory, f"its {MANIFEST} cannot be read") from None


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write a manifest with its own digest."""
    manifest.digest = _manifest_digest(json.loads(manifest.model_dump_json()))
    (directory / MANIFEST).write_text(manifest.model_dump_json(indent=2), encoding="utf-8")


def _manifest_digest(values: Mapping[str, Any]) -> str:
    return digest_of({name: value for name, value in values.items() if name != "digest"})


def _digest_cache_of(artifact: Path) -> Path:
    return artifact.with_name(f".{artifact.name}.digests.json")


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
            raise ConfigError(
                f"store_dir={root}: cannot be created ({error.strerror}). Choose another store_dir."
            ) from None

    def find(self, stage: str, key: str, *, read: bool = False) -> Artifact | None:
        """The finished artifact, verified, or None. Files whose digests are remembered are not read again.

        Args:
            read: as in `file_digests`.

        Raises:
            DamagedError: it is not what was published.
            ConfigError: it was written by another version, or leads out of its directory.
        """
        path = self.root / stage / key
        if not path.parent.exists() or path not in path.parent.iterdir():
            return None  # listed, because NFS remembers for a while that a name was not there
        artifact = Artifact(path, read_manifest(path))
        manifest = artifact.manifest
        if (manifest.stage, manifest.key) != (stage, key):
            raise DamagedError(path, f"its {MANIFEST} belongs to {manifest.stage}/{manifest.key}")
        self.verify(artifact, read=read)
        return artifact

    def verify(self, artifact: Artifact, *, read: bool = False) -> None:
        """Compare an artifact's files with its manifest.

        Args:
            read: as in `file_digests`: for files that will be loaded.

        Raises:
            DamagedError: a file is missing, is not what was published, or is not one of its own.
            ConfigError: a name or a link leads out of its directory.
        """
        path, files = artifact.path, artifact.manifest.files
        outside = first_outside(path, files)
        if outside is not None:
            raise ConfigError(
                f"{path}: {outside} leads out of the directory, or to itself. It was tampered with: remove "
                "it."
            )
        present = {name for name in files_below(path) if name != MANIFEST}
        missing = sorted(files.keys() - present)
        if missing:
            raise DamagedError(path, f"{missing[0]} is missing")
        memory = _digest_cache_of(path)
        try:
            digests = file_digests(path, files, memory, read=read)
            if digests != files and not read:  # perhaps the remembered digests are wrong: read the files
                digests = file_digests(path, files, memory, read=True)
        except FileNotFoundError as error:  # another run replaces it just now
            raise DamagedError(path, f"{Path(error.filename).name} is missing") from None
        wrong = [name for name in files if digests[name] != files[name]]
        if wrong:
            raise DamagedError(path, f"{wrong[0]} is not what was written")
        # hidden files are the file system's own: NFS keeps deleted files that are still open under such names
        extra = sorted(name for name in present - files.keys() if "/." not in f"/{name}")
        if extra:
            raise DamagedError(path, f"{extra[0]} is not one of its files", extra)

    def set_aside(self, stage: str, key: str, *, read: bool = False) -> str | None:
        """Rename a damaged artifact, so that it is made again. If its only damage is extra files, rename
        these, so that it is found again. Call it under the lock.

        Args:
            read: as in `file_digests`.

        Returns:
            What was done, in words; None if nothing is damaged.

        Raises:
            ConfigError: it cannot be renamed.
        """
        try:
            self.find(stage, key, read=read)
        except DamagedError as damage:
            path = damage.path
            aside = path.with_name(f".{key}.damaged-{uuid4().hex[:4]}")
            moves = {path / name: aside / name for name in damage.extra} or {path: aside}
            try:
                for source, target in moves.items():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    source.rename(target)
            except OSError as error:
                raise ConfigError(
                    f"{path} is damaged: {damage.complaint}. It cannot be set aside ({error.strerror}): "
                    "remove it, or use another store_dir."
                ) from None
            return f"{path} is damaged ({damage.complaint}): set aside as {aside}"
        return None

    def digest_cache(self, directory: Path) -> Path:
        """The file with the remembered digests of a directory outside the store: see `file_digests`."""
        return self.root / ".digests" / f"{digest_of(str(directory.resolve()))[:KEY_LENGTH]}.json"

    def directory_digest(self, directory: Path, *, read: bool = False) -> str:
        """Digest of a directory outside the store. Remembered digests are trusted, unless `read` is set."""
        return directory_digest(directory, self.digest_cache(directory), read=read)

    def lock(self, stage: str, key: str) -> Lock:
        """Held while an artifact is made. The kernel frees it when its holder dies."""
        (self.root / stage).mkdir(exist_ok=True)
        return Lock(self.root / stage / f".{key}.lock")

    def checkpoints(self, stage: str, key: str) -> Path:
        """Where a stage that is making the artifact keeps its checkpoints."""
        return self.root / stage / f".{key}.checkpoints"

    def last_checkpoint(self, stage: str, key: str) -> Path:
        """Where the last checkpoint of a finished stage stays, for a longer run: rlhf/pipeline/longer.py."""
        return self.root / stage / f".{key}.last"

    def checkpoint_bytes(self, stage: str, key: str) -> int:
        """Size of these checkpoints. A file under several names counts once."""
        files = [path.stat() for path in self.checkpoints(stage, key).rglob("*") if path.is_file()]
        return sum({(status.st_dev, status.st_ino): status.st_size for status in files}.values())

    def checkpoint_progress(self, stage: str, key: str) -> tuple[float, float]:
        """Seconds spent until the newest checkpoint, and the share of the steps that it holds. 0 if it cannot
        be read, so that the stage does not continue from it, or does not say how many steps there are."""
        newest = max(self.checkpoints(stage, key).glob(f"step-*/{MANIFEST}"), default=None)
        try:
            saved = {} if newest is None else json.loads(content_of(newest))
            return float(saved.get("seconds", 0.0)), saved.get("step", 0) / (saved.get("steps") or math.inf)
        except (OSError, ValueError, AttributeError, TypeError):
            return 0.0, 0.0

    def stale_checkpoints(self, stage: str, recipe: Recipe) -> tuple[Path, list[Change]] | None:
        """Checkpoints of an artifact that differs from this recipe only in its inputs: their directory, and
        the differences."""
        for path in sorted((self.root / stage).glob(f".*.checkpoints/step-*/{MANIFEST}")):
            try:
                other = json.loads(content_of(path))["recipe"]
            except (
                OSError,
                ValueError,
                KeyError,
                TypeError,
            ):  # damaged, being removed, or of an earlier version
                continue
            differences = [*changes(other, recipe)]
            if differences and all(f"{each.name}.".startswith(INPUT_PREFIXES) for each in differences):
                return path.parents[1], differences
        return None

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
        """Write the manifest, flush everything, and rename into place, readable as the umask allows."""
        final = self.root / manifest.stage / manifest.key
        mode = scratch.stat().st_mode & 0o666  # a new directory's, by the umask
        for path in scratch.rglob("*"):
            if path.is_file() and not path.is_symlink():
                path.chmod(mode)  # safetensors lets only the owner read its files
        manifest.files = file_digests(
            scratch, sorted(files_below(scratch)), _digest_cache_of(final), read=True
        )
        with naming(scratch / MANIFEST):
            write_manifest(scratch, manifest)
        for path in [*scratch.rglob("*"), scratch]:
            flush(path)
        replaced = final.with_name(f".{final.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)  # an interrupted publication left it
        if final.exists():  # force=[stage], or a directory without a manifest
            final.rename(replaced)
        scratch.rename(final)
        flush(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)  # on NFS it may still be read: the next one removes it
        return Artifact(final, manifest)

    def differences(self, stage: str, recipe: Recipe) -> list[Change] | None:
        """How this recipe differs from that of the most similar artifact of the stage; None if there is no
        artifact."""
        differences: list[list[Change]] = []
        for path in (self.root / stage).glob(f"[!.]*/{MANIFEST}"):  # hidden ones are being made
            with suppress(OSError, ValidationError):  # another run replaces it just now, or it is damaged
                differences.append([*changes(Manifest.model_validate_json(content_of(path)).recipe, recipe)])
        return min(differences, key=len, default=None)
