"""Tuned models from the store, and the time it took to train them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rlhf.config import ConfigError
from rlhf.digests import DirectoryDigest
from rlhf.models.intact import check_weights
from rlhf.pipeline.manifest import content_digest
from rlhf.pipeline.stage import Stage
from rlhf.pipeline.store import Artifact, Store

NAMES = (
    "Name a stage of this run, such as sft, ppo or merge; or a directory, such as runs/NAME/artifacts/sft, "
    "store/sft/KEY or ./my-model."
)


def tuned_artifact(directory: str, stage: str, *, read: bool = False) -> Artifact | Path:
    """The artifact in a directory of a store, or behind a run's link to it; or the path of a plain
    `save_pretrained` directory, which has no manifest.

    Args:
        stage: the stage that names it, for errors.
        read: whether to read all files of an artifact and verify their digests.

    Raises:
        ConfigError: the directory is neither.
    """
    path, artifact = Path(directory).expanduser().resolve(), None
    if (path / "manifest.json").is_file():
        store = Store(path.parents[1])
        artifact = store.find(path.parent.name, path.name)
        if artifact is not None and read:
            store.verify(artifact, read=True)
    elif (path / "config.json").is_file():
        check_weights(path, f"{stage}: {directory}")
        if not any(path.glob("*.safetensors")):
            raise ConfigError(
                f"{stage}: {directory}: no *.safetensors there; other formats are not read. "
                "Save it again with save_pretrained."
            )
        return path
    if artifact is None:
        raise ConfigError(
            f"{stage}: {directory}: no finished artifact there, and no plain model (config.json, "
            f"*.safetensors). {NAMES}"
        )
    return artifact


def check_policy(directory: str, tuned: Artifact | Path, chain: Mapping[str, Stage], asks: str) -> None:
    """Refuse an artifact of a stage that makes no policy. Artifacts of stages that this run lacks pass.

    Args:
        asks: the stage that names it, for errors.

    Raises:
        ConfigError: with the names that are allowed.
    """
    stage = None if isinstance(tuned, Path) else chain.get(tuned.manifest.stage)
    if stage is not None and stage.makes != "policy":
        raise ConfigError(f"{asks}: {directory}: {stage.name} makes no policy, so it cannot answer. {NAMES}")


def content_of(tuned: Artifact | Path, digest: DirectoryDigest) -> str:
    """Digest of the model's files. `digest` computes it for a plain directory."""
    return digest(tuned) if isinstance(tuned, Path) else content_digest(tuned)


def path_of(tuned: Artifact | Path) -> Path:
    """The model's directory."""
    return tuned if isinstance(tuned, Path) else tuned.path


def lineage(artifact: Artifact) -> Iterator[Artifact]:
    """The artifact and all artifacts it was made from, each once. All are in the same store.

    Raises:
        ConfigError: one of them is no longer there.
    """
    store = Store(artifact.path.resolve().parents[1])
    waiting, seen = [artifact], {(artifact.manifest.stage, artifact.key)}
    while waiting:
        child = waiting.pop()
        yield child
        for stage, key in child.manifest.recipe.get("inputs", {}).items():
            if (stage, key) in seen:
                continue
            seen.add((stage, key))
            source = store.find(stage, key)
            if source is None:
                raise ConfigError(
                    f"{child.path} was made from {stage}/{key}, which is no longer in the "
                    f"store {store.root}, so the cost of its training is unknown. Run {stage} again, or "
                    "leave the artifact out."
                )
            waiting.append(source)


def training_seconds(tuned: Sequence[Artifact | Path]) -> float | None:
    """Wall time of all stages in the lineages of these models, each once, from their manifests, without data
    preparation. None if one is a plain directory, which has no manifest."""
    seconds: dict[tuple[str, str], float] = {}
    for each in tuned:
        if isinstance(each, Path):
            return None
        seconds |= {(one.manifest.stage, one.key): one.manifest.seconds for one in lineage(each)}
    return sum(seconds.values())
