"""Checks of a model's files before any training: complete weights, a tokenizer that encodes, a template that
renders."""

from __future__ import annotations

import json
from pathlib import Path

from rlhf.config import ConfigError, in_user_keys
from rlhf.data.chat_template import PLAIN, end_of_turn_id, exchange_ids, missing_opening, prompt_ids
from rlhf.data.schema import Message
from rlhf.models.base import BaseModelFiles, load_tokenizer
from rlhf.models.on_disk import INDEX

LFS_POINTER = b"version https://git-lfs"
QUESTION, ANSWER = Message(role="user", content="How are you?"), "Fine, thank you."
OTHER_QUESTION = Message(role="user", content="Where is it?")


def check_weights(directory: Path, key: str) -> None:
    """Check that every safetensors file is complete and that none is missing. Only headers are read.

    Args:
        key: the config key that names the model, with its value, such as `model.path=DIR`.

    Raises:
        ConfigError: a file is damaged or missing.
    """
    from safetensors import SafetensorError, safe_open

    held: dict[str, set[str]] = {}
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as weights:
                held[file.name] = set(weights.keys())
        except (SafetensorError, OSError) as error:
            with file.open("rb") as content:
                is_pointer = content.read(len(LFS_POINTER)) == LFS_POINTER
            damage = str(error).removeprefix("Error while deserializing header: ")
            reason = (
                "a pointer of Git LFS, not the weights. Fetch them with `git lfs pull`."
                if is_pointer
                else f"not a whole safetensors file ({damage}). It was cut off or changed; fetch it again."
            )
            raise ConfigError(f"{key}: {file}: {reason}") from None
    if (directory / INDEX).is_file():
        check_index(directory / INDEX, held, key)


def check_index(index: Path, held: dict[str, set[str]], key: str) -> None:
    """Check that every tensor of the index is in its file.

    Args:
        held: name of a file -> names of its tensors.

    Raises:
        ConfigError: a tensor is not in its file, or the index cannot be read.
    """
    try:
        places: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{key}: {index}: not an index of weights ({error!r}). Fetch it again.") from None
    for tensor, file in places.items():
        if file not in held:
            raise ConfigError(f"{key}: {index.parent / file} is missing, but {INDEX} names it. Fetch it.")
        if tensor not in held[file]:
            raise ConfigError(
                f"{key}: {index.parent / file} does not hold {tensor}, but {INDEX} says that it does. The "
                "files are from two versions; fetch all of them again."
            )


def check_tokenizer(base: BaseModelFiles, key: str) -> None:
    """Check that the tokenizer encodes, that the template shows the question and opens an answer, and that
    the model has an embedding for each id.

    Args:
        key: as of `check_weights`.

    Raises:
        ConfigError: one of these checks fails.
    """
    own = base.config.chat_template
    template = "its chat template" if own is None else f"model.chat_template={own}"
    try:
        with in_user_keys({str(base.directory): key}):
            tokenizer = base.load_tokenizer()
            ids, _ = exchange_ids(tokenizer, [QUESTION], ANSWER)
            is_shown = ids != exchange_ids(tokenizer, [OTHER_QUESTION], ANSWER)[0]
            end_of_turn_id(tokenizer)
            header = missing_opening(tokenizer)
    except ConfigError:
        raise
    except Exception as error:  # a template may raise anything, and so may a tokenizer's file
        raise ConfigError(
            f"{key}: its tokenizer and {template.removeprefix('its ')} do not encode a question and its "
            f"answer ({type(error).__name__}: {error}). Fix the files in {base.directory}, or set "
            "model.chat_template=chatml, plain or a jinja file."
        ) from error
    if not is_shown:
        raise ConfigError(
            f"{key}: {template} does not show the question: {QUESTION['content']!r} and "
            f"{OTHER_QUESTION['content']!r} become the same prompt. Set model.chat_template=chatml, plain or "
            "a jinja file that shows each message's content."
        )
    if header:
        raise ConfigError(
            f"{key}: {template} writes {header!r} before an answer, but not where it shall open one: "
            "it ignores add_generation_prompt, so the model would have to write this itself. Use it in the "
            "template, or set model.chat_template=chatml, plain or a jinja file."
        )
    text_ids = tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
    if not text_ids or set(text_ids) == {tokenizer.unk_token_id}:
        raise ConfigError(
            f"{key}: its tokenizer does not encode {ANSWER!r} (ids: {text_ids}). Check that it is the "
            f"tokenizer of this model. Its files are in {base.directory}."
        )
    with in_user_keys({str(base.directory): key}):
        rows = base.architecture.get_text_config().vocab_size
    if max(ids) >= rows:
        raise ConfigError(
            f"{key}: its tokenizer gives the id {max(ids)}, but the model has only {rows} tokens. Give "
            "the tokenizer that the model was trained with, or another model.chat_template."
        )


def uses_other_template(base: BaseModelFiles) -> bool:
    """Whether `model.chat_template` renders a question differently from the tokenizer's own template. False
    if the tokenizer has no template of its own."""
    from jinja2 import TemplateError

    if base.config.chat_template is None:
        return False
    own = load_tokenizer(base.directory, base.config)
    if own.chat_template == PLAIN:
        return False
    try:
        return prompt_ids(own, [QUESTION]) != prompt_ids(base.load_tokenizer(), [QUESTION])
    except TemplateError:  # the own template does not render, so the user chose another one
        return True
