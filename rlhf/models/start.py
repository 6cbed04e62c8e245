"""The model that a stage starts from: another stage's (such as `sft`), `base`, or the user's directory."""

from __future__ import annotations

import math
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.config import Complaint, ConfigError, did_you_mean
from rlhf.data.chat_template import sequences, tokenizer_digest
from rlhf.data.cores import on_all_cores
from rlhf.data.schema import Row
from rlhf.data.tokens import in_pieces
from rlhf.digests import DirectoryDigest, directory_digest
from rlhf.models.alike import other_setting
from rlhf.models.base import BaseModelFiles
from rlhf.models.intact import check_tokenizer, check_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BASE = "base"


class ModelDirectory(str):
    """A model that is the user's own: what a key of the type `Model` says where it names neither `base` nor a
    stage that makes a policy. A directory of such a name is written `./NAME`."""

    __slots__ = ()


def as_model(name: str, policies: Collection[str]) -> str:
    """What a key of the type `Model` says: a `ModelDirectory`, or the word as it is.

    Args:
        policies: the stages that make a policy.
    """
    return name if name == BASE or name in policies else ModelDirectory(name)


def directory_of(init: str) -> Path | None:
    """The user's own directory; None for `base` and for a stage's policy."""
    return Path(init) if isinstance(init, ModelDirectory) else None


def inputs_of(init: str) -> tuple[str, ...]:
    """The stages that make this model."""
    return () if init == BASE or isinstance(init, ModelDirectory) else (init,)


def init_in_key(init: str) -> str:
    """What an artifact's key contains: the word, or `directory`, whose content is in `init_digest`."""
    return init if directory_of(init) is None else "directory"


def init_digest(
    key: str,
    init: str,
    digest: DirectoryDigest = directory_digest,
    *,
    name: str = "init",
    policies: Collection[str] = (),
) -> dict[str, str]:
    """Digest of the user's own directory, for the keys of everything that is made from it.

    Args:
        key: what the user calls it, such as `ppo.init`.
        digest: as of `rlhf.pipeline.key.external_digests`.
        name: in these digests.
        policies: stages that make a policy, one of which the key may be meant to name.

    Raises:
        ConfigError: there is no model.
    """
    directory = directory_of(init)
    if directory is None:
        return {}
    if not (directory / "config.json").is_file():
        raise ConfigError(
            f"{key}={init}: no config.json there.{did_you_mean(init, policies)} Use base, a stage that "
            f"makes a policy ({', '.join(sorted(policies))}), or a save_pretrained directory."
        )
    if not any(directory.glob("*.safetensors")):
        raise ConfigError(
            f"{key}={init}: no *.safetensors there. Training starts from plain weights: merge an adapter "
            "first, and save other formats again with save_pretrained."
        )
    return {name: digest(directory)}


def check_start(key: str, init: str, base: BaseModelFiles) -> BaseModelFiles:
    """The files of the model that a stage starts from. Another stage's policy does not exist yet, so for it
    these are the base model's.

    Raises:
        ConfigError: the user's own model has damaged weights, or a tokenizer that does not encode.
    """
    files = files_of(init, base)
    if files is not base:
        check_weights(files.directory, f"{key}={init}")
        check_tokenizer(files, f"{key}={init}")
    return files


def files_of(init: str, base: BaseModelFiles) -> BaseModelFiles:
    """The files of the model that a stage starts from, as of `check_start`."""
    directory = directory_of(init)
    return base if directory is None else BaseModelFiles(directory, "", base.config)


def of_two_architectures(models: Iterable[tuple[str, str]], base: BaseModelFiles) -> Iterator[Complaint]:
    """Complain if vLLM's single engine would have to run models of different architectures.

    Args:
        models: as of `rlhf.pipeline.graph.sampled_models`.
    """
    first = None
    for key, init in models:
        directory = directory_of(init)
        said = base.config.said if directory is None else f"{key}={init}"
        files = base if directory is None else BaseModelFiles(directory, "", base.config)
        first = first or (said, files.architecture)
        if setting := other_setting(first[1], files.architecture):
            yield Complaint(
                "generation=vllm",
                f"one engine answers for all models of a run, and {first[0]} and {said} are of two "
                f"architectures ({setting}).",
                "Use generation=local, or leave one of them out (evaluate.policies, compare.artifacts).",
            )
            return


def misfits(
    key: str,
    init: str,
    base: BaseModelFiles,
    source: str,
    rows: Iterable[Row],
    *,
    beside: int,
    fix: str,
    most: float = math.inf,
) -> Iterator[Complaint]:
    """Say which rows do not fit the user's own model that a stage starts from. `prepare` counts with the base
    model's tokenizer and context. If the model has the same tokenizer and no shorter context, nothing is
    counted.

    Args:
        key: what the user calls the model, such as `ppo.init`.
        source: what the user calls the rows.
        beside: tokens to leave for an answer and for virtual tokens.
        fix: what to do, as a sentence.
        most: the stage leaves out rows with more tokens than this.
    """
    from jinja2 import TemplateError

    directory = directory_of(init)
    if directory is None:
        return
    start = BaseModelFiles(directory, "", base.config)
    tokenizer, context = start.load_tokenizer(), start.context_length
    if counts_alike(tokenizer, base) and context >= base.context_length:
        return
    try:
        lengths = array("i", chain.from_iterable(on_all_cores(partial(_longest, tokenizer), in_pieces(rows))))
    except TemplateError as error:  # some refuse a system turn, or two turns of one speaker
        why = f"the chat template of {key}={init} refuses a conversation: {error}."
        yield Complaint(source, why, "Leave it out.")
        return
    too_long = [length for length in lengths if context - beside < length <= most]
    if too_long:
        yield Complaint(
            source,
            f"{len(too_long)} of {len(lengths)} rows do not fit the model of {key}={init}: they have up to "
            f"{max(too_long)} of its tokens, and its context of {context} has room for "
            f"{max(0, context - beside)}.",
            fix,
        )


def counts_alike(tokenizer: PreTrainedTokenizerBase, base: BaseModelFiles) -> bool:
    """Whether rows have as many tokens with this tokenizer as `prepare` counted."""
    return tokenizer_digest(tokenizer) == tokenizer_digest(base.load_tokenizer())


def _longest(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[int]:
    """Tokens of the longest sequence of each row."""
    return [max(map(len, sequences(tokenizer, row))) for row in rows]
