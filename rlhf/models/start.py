"""The model that a stage starts from: another stage's (such as `sft`), `base`, or a directory of the user."""

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
from rlhf.models.alike import differing_setting
from rlhf.models.base import BaseModelFiles
from rlhf.models.intact import check_tokenizer, check_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BASE = "base"


class ModelDirectory(str):
    """A directory with a model of the user: the value of a `Model` key that is neither `base` nor a stage
    that makes a policy. If a directory has one of these names, write it as `./NAME`."""

    __slots__ = ()


def parse_model(name: str, policies: Collection[str]) -> str:
    """The value of a `Model` key: the name itself if it is `base` or a stage, otherwise a `ModelDirectory`.

    Args:
        policies: stages that make a policy.
    """
    return name if name == BASE or name in policies else ModelDirectory(name)


def directory_of(init: str) -> Path | None:
    """The user's model directory; None for `base` and for a stage's policy."""
    return Path(init) if isinstance(init, ModelDirectory) else None


def inputs_of(init: str) -> tuple[str, ...]:
    """The stage that makes this model, as a tuple; empty if no stage makes it."""
    return () if init == BASE or isinstance(init, ModelDirectory) else (init,)


def init_in_key(init: str) -> str:
    """The part of an artifact's key that names the model: the value itself, or the word `directory` for a
    user's directory, whose content is in `init_digest`."""
    return init if directory_of(init) is None else "directory"


def init_digest(
    key: str,
    init: str,
    digest: DirectoryDigest = directory_digest,
    *,
    name: str = "init",
    policies: Collection[str] = (),
) -> dict[str, str]:
    """Digest of the user's model directory, for the keys of all artifacts that depend on it; empty for `base`
    and for a stage's policy.

    Args:
        key: the config key, such as `ppo.init`.
        digest: as of `rlhf.pipeline.key.external_digests`.
        name: key of the returned dict.
        policies: stages that make a policy, for a hint at a misspelt name.

    Raises:
        ConfigError: the directory has no model.
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
    """Check the model that a stage starts from, and return its files. Another stage's policy does not exist
    yet, so the base model's files stand for it.

    Raises:
        ConfigError: the user's model has damaged weights, or a tokenizer that does not encode.
    """
    files = files_of(init, base)
    if files is not base:
        check_weights(files.directory, f"{key}={init}")
        check_tokenizer(files, f"{key}={init}")
    return files


def files_of(init: str, base: BaseModelFiles) -> BaseModelFiles:
    """The same files as `check_start` returns, without the checks."""
    directory = directory_of(init)
    return base if directory is None else BaseModelFiles(directory, "", base.config)


def architecture_complaints(models: Iterable[tuple[str, str]], base: BaseModelFiles) -> Iterator[Complaint]:
    """Complain if vLLM's single engine would have to run models of different architectures.

    Args:
        models: as of `rlhf.pipeline.graph.sampled_models`.
    """
    first = None
    for key, init in models:
        directory = directory_of(init)
        source = base.config.user_key if directory is None else f"{key}={init}"
        files = base if directory is None else BaseModelFiles(directory, "", base.config)
        first = first or (source, files.architecture)
        if setting := differing_setting(first[1], files.architecture):
            yield Complaint(
                "generation=vllm",
                f"one engine answers for all models of a run, and {first[0]} and {source} are of two "
                f"architectures ({setting}).",
                "Use generation=local, or leave one of them out (evaluate.policies, compare.artifacts).",
            )
            return


def row_complaints(
    key: str,
    init: str,
    base: BaseModelFiles,
    source: str,
    rows: Iterable[Row],
    *,
    reserved: int,
    fix: str,
    max_tokens: float = math.inf,
) -> Iterator[Complaint]:
    """Complain about rows that do not fit the user's model that a stage starts from. `prepare` has already
    counted with the base model's tokenizer and context. So nothing is counted if the user's model has the
    same tokenizer and no shorter context.

    Args:
        key: config key of the model, such as `ppo.init`.
        source: the user's name for the rows.
        reserved: tokens to leave free for an answer and for virtual tokens.
        fix: advice for the user, as a sentence.
        max_tokens: the stage itself skips longer rows, so these are not counted.
    """
    from jinja2 import TemplateError

    directory = directory_of(init)
    if directory is None:
        return
    start = BaseModelFiles(directory, "", base.config)
    tokenizer, context = start.load_tokenizer(), start.context_length
    if is_base_tokenizer(tokenizer, base) and context >= base.context_length:
        return
    try:
        lengths = array("i", chain.from_iterable(on_all_cores(partial(_longest, tokenizer), in_pieces(rows))))
    except TemplateError as error:  # some refuse a system turn, or two turns of the same role in a row
        why = f"the chat template of {key}={init} refuses a conversation: {error}."
        yield Complaint(source, why, "Leave it out.")
        return
    too_long = [length for length in lengths if context - reserved < length <= max_tokens]
    if too_long:
        yield Complaint(
            source,
            f"{len(too_long)} of {len(lengths)} rows do not fit the model of {key}={init}: they have up to "
            f"{max(too_long)} of its tokens, and its context of {context} has room for "
            f"{max(0, context - reserved)}.",
            fix,
        )


def is_base_tokenizer(tokenizer: PreTrainedTokenizerBase, base: BaseModelFiles) -> bool:
    """Whether this tokenizer equals the base model's, so that `prepare`'s token counts are valid for it."""
    return tokenizer_digest(tokenizer) == tokenizer_digest(base.load_tokenizer())


def _longest(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[int]:
    """Number of tokens of the longest sequence of each row."""
    return [max(map(len, sequences(tokenizer, row))) for row in rows]
