"""`python -m rlhf export`: write a policy with a model card to a directory. Needs no torch."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from rlhf.cli.command import read_words
from rlhf.cli.model_card import model_card
from rlhf.cli.run_files import RunFiles
from rlhf.cli.runs import find_run
from rlhf.config import ConfigError
from rlhf.disk import naming
from rlhf.exit_codes import DONE
from rlhf.models.peft.methods import METHODS, VIRTUAL_TOKEN_METHODS
from rlhf.models.peft.saved import ADAPTER, CONFIG, WEIGHTS, adapter_config, base_of
from rlhf.pipeline.store import Artifact

HELP = """python -m rlhf export RUN DIR [policy=STAGE] [push=OWNER/NAME] [private=false] [runs_dir=DIR]

Write the policy of a run to DIR: plain files that transformers and vLLM load and that can be moved, with
the tokenizer, its chat template and a model card (README.md). RUN is a run's name or its directory. Without
policy it is the one that evaluate judged, or else the last one. What cannot be merged into the weights
(prefix, prompt, p_tuning) becomes a directory for PEFT.

push=OWNER/NAME also uploads DIR to the Hugging Face Hub, or to HF_ENDPOINT. It needs the token in HF_TOKEN.
A new repository is private, unless private=false says otherwise.
"""
NON_MODEL_FILES = re.compile(r"manifest\.json|.*\.(jsonl|arrow)")
"""Names of an artifact's files that are no part of the model: manifest, metrics and texts."""
BASE_DIRECTORY = "base"
"""Subdirectory for an adapter's base model, if that has no name on the Hub."""


def export(arguments: Sequence[str], defaults: Mapping[str, Any]) -> int:
    """Write a policy's files. With push=..., also upload them."""
    known = {"policy": "", "push": "", "private": "true", "runs_dir": defaults["runs_dir"]}
    given = read_words("export", arguments, known, HELP)
    if given is None:
        return DONE
    words, keys = given
    if len(words) != 2:
        raise ConfigError("export: name a run and a new directory, as in `python -m rlhf export RUN DIR`.")
    if keys["private"] not in ("true", "false"):
        raise ConfigError(f"export private={keys['private']}: true or false.")
    token = hub_token(keys["push"]) if keys["push"] else ""
    target = Path(words[1])
    if target.exists():
        raise ConfigError(f"{target} is there already. Name a new directory, or remove it.")
    run = run_of(words[0], Path(keys["runs_dir"]))
    policy = run.chosen_policy(keys["policy"])
    write(run, policy, target)
    print(f"{policy} of {run.directory} is in {target}; its model card is {target / 'README.md'}.")
    if keys["push"]:
        print(f"Uploaded to {push(target, keys['push'], token, private=keys['private'] == 'true')}")
    return DONE


def run_of(word: str, runs_dir: Path) -> RunFiles:
    """The run with this directory or name."""
    named = Path(word)
    return RunFiles(named if (named / "summary.json").is_file() else find_run(runs_dir, word))


def write(run: RunFiles, policy: str, target: Path) -> None:
    """Write a policy's directory. It appears complete, or not at all.

    Raises:
        ConfigError: the policy is damaged, only this package could load it, or the directory cannot be made.
    """
    artifact = run.artifact(policy)
    temporary = target.with_name(f".{target.name}.{uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"{target}: no directory can be made there ({error.strerror}). Name another."
        ) from None
    try:
        with naming(target):
            base, base_name = base_of(artifact.path), None
            if base is None:
                copy(artifact.path, temporary)
            else:
                base_name = write_adapter(run, artifact, base, temporary)
            card = model_card(run, policy, artifact, target.name, base_name)
            (temporary / "README.md").write_text(card, encoding="utf-8")
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # already gone after the renaming


def write_adapter(run: RunFiles, artifact: Artifact, base: Path, target: Path) -> str:
    """Write an adapter for PEFT. Gives its base model: a name on the Hub, or `base`, its subdirectory.

    Raises:
        ConfigError: PEFT has no such method.
    """
    content = adapter_config(artifact.path)
    if content["peft_type"] not in VIRTUAL_TOKEN_METHODS:
        merging = ", ".join(name for name, each in METHODS.items() if each.merges)
        raise ConfigError(
            f"{artifact.path}: neither transformers nor PEFT knows the layers that peft=adapter adds, and "
            f"they cannot be merged into the weights. Train with another method ({merging}), or use the "
            "model as it is: `python -m rlhf chat`."
        )
    model = run.config["model"]
    is_on_hub = model["kind"] == "hub" and base.parent.name == "snapshots"  # the base is in the Hub's cache
    base_name: str = model["id"] if is_on_hub else BASE_DIRECTORY
    content["base_model_name_or_path"] = base_name
    content["revision"] = base.name if is_on_hub else None
    for path in files_of(artifact.path):
        if path.name != "config.json":  # with a config.json, transformers would look for weights here
            shutil.copyfile(path, target / path.name)
    (target / CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shutil.copyfile(artifact.path / ADAPTER / WEIGHTS, target / WEIGHTS)
    if not is_on_hub:
        (target / BASE_DIRECTORY).mkdir()
        copy(base, target / BASE_DIRECTORY)
    return base_name


def copy(directory: Path, target: Path) -> None:
    """Copy a model's files. A link becomes a copy of its target."""
    for path in files_of(directory):
        shutil.copyfile(path, target / path.name)


def files_of(directory: Path) -> Iterator[Path]:
    """The files of a model."""
    for path in sorted(directory.iterdir()):
        if path.is_file() and not NON_MODEL_FILES.fullmatch(path.name) and not path.name.startswith("."):
            yield path


def hub_token(name: str) -> str:
    """The token in HF_TOKEN. A token saved by a login is not used.

    Raises:
        ConfigError: there is no token, or the name is not OWNER/NAME.
    """
    if name.count("/") != 1 or not all(name.split("/")):
        raise ConfigError(f"export push={name}: write OWNER/NAME.")
    token = os.environ.get("HF_TOKEN", "")
    if not token:
        raise ConfigError(
            f"export push={name}: the environment has no HF_TOKEN. Set it to a token that may write."
        )
    return token


def push(directory: Path, name: str, token: str, *, private: bool) -> str:
    """Upload a directory to the Hub. Gives the model's URL.

    Raises:
        ConfigError: the Hub refuses the upload or cannot be reached. The directory stays.
    """
    from httpx import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
    try:
        url = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=directory, commit_message=f"Export of {directory.name}")
    except (HfHubHTTPError, HFValidationError, HTTPError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"export push={name}: the upload failed ({reason}). {directory} is complete: upload it with "
            f"`hf upload {name} {directory}`, or remove it and export again."
        ) from None
    return str(url)
