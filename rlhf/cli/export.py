"""`python -m rlhf export`: a policy as a directory of its own, with a model card. Needs no torch."""

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
from rlhf.models.peft.methods import KINDS, METHODS
from rlhf.models.peft.saved import ADAPTER, CONFIG, WEIGHTS, base_of, described
from rlhf.pipeline.store import Artifact

HELP = """python -m rlhf export RUN DIR [policy=STAGE] [push=OWNER/NAME] [private=false] [runs_dir=DIR]

Write the policy of a run to DIR: plain files that transformers and vLLM load and that can be moved, with
the tokenizer, its chat template and a model card (README.md). RUN is a run's name or its directory. Without
policy it is the one that evaluate judged, or else the last one. What cannot be merged into the weights
(prefix, prompt, p_tuning) becomes a directory for PEFT.

push=OWNER/NAME also uploads DIR to the Hugging Face Hub, or to HF_ENDPOINT. It needs the token in HF_TOKEN.
A new repository is private, unless private=false says otherwise.
"""
NO_MODEL = re.compile(r"manifest\.json|.*\.(jsonl|arrow)")
"""Files of an artifact that are no part of the model: what it measured, and the texts that it did so on."""
BASE = "base"
"""The directory of the model below an adapter, where it has no public name."""


def export(arguments: Sequence[str], defaults: Mapping[str, Any]) -> int:
    """Write a policy's files, and upload them if told to."""
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
    """The run of a directory or of a name."""
    named = Path(word)
    return RunFiles(named if (named / "summary.json").is_file() else find_run(runs_dir, word))


def write(run: RunFiles, policy: str, target: Path) -> None:
    """Write a policy's directory. It is there whole or not at all.

    Raises:
        ConfigError: it is damaged, or only this package could load it, or no directory can be made there.
    """
    artifact = run.artifact(policy)
    beside = target.with_name(f".{target.name}.{uuid4().hex[:8]}")
    try:
        beside.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"{target}: no directory can be made there ({error.strerror}). Name another."
        ) from None
    try:
        with naming(target):
            base, below = base_of(artifact.path), None
            if base is None:
                copy(artifact.path, beside)
            else:
                below = write_adapter(run, artifact, base, beside)
            card = model_card(run, policy, artifact, target.name, below)
            (beside / "README.md").write_text(card, encoding="utf-8")
            beside.rename(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)  # empty after the renaming


def write_adapter(run: RunFiles, artifact: Artifact, base: Path, target: Path) -> str:
    """Write what PEFT loads. Gives the name of the model below it: on the Hub, or `base`, a directory in it.

    Raises:
        ConfigError: PEFT has no such method.
    """
    content = described(artifact.path)
    if content["peft_type"] not in KINDS:
        merging = ", ".join(name for name, each in METHODS.items() if each.merges)
        raise ConfigError(
            f"{artifact.path}: neither transformers nor PEFT knows the layers that peft=adapter adds, and "
            f"they cannot be merged into the weights. Train with another method ({merging}), or use the "
            "model as it is: `python -m rlhf chat`."
        )
    model = run.config["model"]
    is_on_hub = model["kind"] == "hub" and base.parent.name == "snapshots"  # of the Hub's cache
    below: str = model["id"] if is_on_hub else BASE
    content["base_model_name_or_path"] = below
    content["revision"] = base.name if is_on_hub else None
    for path in files_of(artifact.path):
        if path.name != "config.json":  # with it transformers would look for weights here
            shutil.copyfile(path, target / path.name)
    (target / CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shutil.copyfile(artifact.path / ADAPTER / WEIGHTS, target / WEIGHTS)
    if not is_on_hub:
        (target / BASE).mkdir()
        copy(base, target / BASE)
    return below


def copy(directory: Path, target: Path) -> None:
    """Copy a model's files; a link becomes what it leads to."""
    for path in files_of(directory):
        shutil.copyfile(path, target / path.name)


def files_of(directory: Path) -> Iterator[Path]:
    """The files of a model."""
    for path in sorted(directory.iterdir()):
        if path.is_file() and not NO_MODEL.fullmatch(path.name) and not path.name.startswith("."):
            yield path


def hub_token(name: str) -> str:
    """The token of the environment. Other places, such as a token kept by a login, are not looked at.

    Raises:
        ConfigError: there is none.
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
    """Upload a directory to the Hub. Gives the model's address.

    Raises:
        ConfigError: the Hub refuses it, or cannot be reached. DIR stays.
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
