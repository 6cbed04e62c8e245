"""Write a model directory that transformers can load without this package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.data.chat_template import stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a policy's model directory. Its generation config stops at the token that ends a turn of the chat
    template."""
    save_settings(model, tokenizer, directory)
    write_model(model, directory)


def save_settings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a policy's config, generation config and tokenizer, without its weights."""
    from transformers import GenerationConfig

    generation = model.generation_config
    assert generation is not None
    generation.eos_token_id = stop_ids(tokenizer, generation.eos_token_id)
    try:
        generation.validate(strict=True)
    except ValueError:  # sampling values without do_sample (Llama 2), which transformers refuses to write
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        generation = GenerationConfig(**{name: getattr(generation, name) for name in ids})
        model.generation_config = generation
    model.config.save_pretrained(directory)
    generation.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def write_model(model: PreTrainedModel, directory: Path) -> None:
    """Write config and weights. transformers writes file by file, directly from the weights, so mapped
    weights take no memory."""
    from rlhf.training import trained  # imports torch

    model.save_pretrained(directory, max_shard_size=trained.FILE_BYTES)
