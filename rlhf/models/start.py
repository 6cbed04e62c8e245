"""The model that a stage starts from: `sft` (that stage's), `base`, or a directory of the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from rlhf.artifacts import DirectoryDigest, directory_digest
from rlhf.config import ConfigError
from rlhf.models.intact import check_tokenizer, check_weights
from rlhf.models.load import BaseModelFiles

Init = Annotated[str, Field(min_length=1)]
"""`sft`, `base` or a `save_pretrained` directory."""


def directory_of(init: str) -> Path | None:
    """The user's own directory; None of `sft` and `base`."""
    return None if init in ("sft", "base") else Path(init)


def inputs_of(init: str) -> tuple[str, ...]:
    """The stages that make it."""
    return ("sft",) if init == "sft" else ()


def kind_of(init: str) -> str:
    """What an artifact's key says of it: a directory's content counts (`digest_of_start`), not its place."""
    return init if directory_of(init) is None else "directory"


def digest_of_start(key: str, init: str, digest: DirectoryDigest = directory_digest) -> dict[str, str]:
    """What the user's own directory holds, for the keys of all that is made from it.

    Args:
        key: what the user calls it, such as `ppo.init`.
        digest: as of `Stage.external`.

    Raises:
        ConfigError: there is no model.
    """
    directory = directory_of(init)
    if directory is None:
        return {}
    if not (directory / "config.json").is_file():
        raise ConfigError(
            f"{key}={init}: no config.json there. Use sft, base or a save_pretrained directory."
        )
    if not any(directory.glob("*.safetensors")):
        raise ConfigError(
            f"{key}={init}: no *.safetensors there. Training starts from plain weights: an adapter must be "
            "merged first, and other formats are not read."
        )
    return {"init": digest(directory)}


def check_start(key: str, init: str, base: BaseModelFiles) -> BaseModelFiles:
    """The files of the model that a stage starts from; of the SFT model, which is not there yet, the base
    model's.

    Raises:
        ConfigError: it is the user's own, and its weights are not whole, or its tokenizer does not encode.
    """
    directory = directory_of(init)
    if directory is None:
        return base
    check_weights(directory, f"{key}={init}")
    files = BaseModelFiles(directory, "", base.config)
    check_tokenizer(files, f"{key}={init}")
    return files
